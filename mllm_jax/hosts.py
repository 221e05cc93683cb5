"""Processes that work on one program: what each of them holds, and how they tell one another.

Values travel as bytes.  `process_allgather` narrows 64-bit numbers to 32 bits, and sums of floats depend on
the number of hosts; JSON in bytes does neither.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mllm_jax.sharding import host_share


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([len(data)], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    everything = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(everything, sizes)]


def agree(error: Exception | None) -> None:
    """Raises everywhere if any process has an error, so that none waits for one that has stopped."""
    errors = [e for e in gather(None if error is None else f"{type(error).__name__}: {error}") if e]
    if error is not None:
        raise error
    if errors:
        raise RuntimeError(f"another process stopped: {errors[0]}")


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a global array, sharded by rows alone, that this process holds, in their order."""
    shards = {shard.index[0].indices(x.shape[0])[0] if shard.index else 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def is_writer(mesh: Mesh) -> bool:
    """Whether this process is the first of those that hold the same rows of a batch, and so answers for them."""
    here = host_share(mesh)[0]
    return jax.process_index() == min(p for p in range(jax.process_count()) if host_share(mesh, p)[0] == here)
