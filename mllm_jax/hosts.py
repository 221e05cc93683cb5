"""Processes that work on one program: what each of them holds, and how they tell one another.

Values travel as bytes.  `process_allgather` narrows 64-bit numbers to 32 bits, and sums of floats depend on
the number of hosts; JSON in bytes does neither.
"""

import contextlib
import itertools
import json
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state as cluster  # the client is public nowhere; Orbax has it from here
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mllm_jax.config import RESTART, ConfigError, Restart
from mllm_jax.sharding import host_share

T = TypeVar("T")
PATIENCE = 3_600                        # s that processes wait for the slowest; one that is dead is noticed much sooner
FAREWELL = 600                          # s that one with an error waits, lest the others are where they cannot hear of it


class StoppedElsewhere(RuntimeError):
    """Another process cannot go on; the message is its message."""


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
    others = gather(_said(error) if error is not None else None)
    if error is not None:
        raise error
    for said in filter(None, others):
        _raise(said)


def together(work: Callable[[], T]) -> T:
    """What `work` returns, when all processes have done theirs; raises on all what it raises on one."""
    value = error = None
    try:
        value = work()
    except Exception as e:              # noqa: BLE001  of any sort: the others must not wait for this process
        error = e
    agree(error)
    return value


class Lockstep:
    """Lets no process begin a step that another one will not take, for it would wait in that step for ever.

        with Lockstep() as lockstep:
            for n in range(steps):
                batch = next(batches)               # of this process; it may raise here alone
                if lockstep.meet(stop.is_set()):    # True everywhere if it is wished anywhere
                    break
                step(batch)

    What a process raises inside the context is raised by the others at their next meeting, the last of which is the
    end of the context, as ConfigError or StoppedElsewhere.

    Processes meet at a barrier of the coordinator, not by a collective of devices: that would queue behind the step
    that the devices are at, and the host would wait for it.  So it costs two messages (0.6 ms a meeting of two processes on
    one machine), while the devices work.
    """

    _count = itertools.count()          # every process makes the same ones in the same order

    def __init__(self) -> None:
        self.name, self.meetings, self.over = f"mllm_jax/lockstep/{next(self._count)}", 0, False

    def __enter__(self) -> Self:
        return self

    def meet(self, wish: bool = False) -> bool:
        """Waits for all processes; whether any of them has the wish.

        Raises:
          ConfigError, StoppedElsewhere: another process raised something.
        """
        if jax.process_count() == 1:
            return wish
        said = self._exchange({"wish": True} if wish else None, PATIENCE)
        for one in said:
            if "text" in one:
                self.over = True
                _raise(one)
        return bool(said)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.meet()
        elif jax.process_count() > 1 and not self.over:
            with contextlib.suppress(jax.errors.JaxRuntimeError):       # what this process has to say is more than that
                self._exchange(_said(error), FAREWELL)

    def _exchange(self, mine: dict[str, Any] | None, seconds: int) -> list[dict[str, Any]]:
        """What all processes have to say at this meeting; most often nothing."""
        self.meetings += 1
        place = f"{self.name}/{self.meetings}"
        if mine is not None:
            cluster.client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(mine))
        cluster.client.wait_at_barrier(place, 1_000 * seconds)
        return [json.loads(text) for _, text in sorted(cluster.client.key_value_dir_get(f"{place}/"))]


def _said(error: BaseException) -> dict[str, Any]:
    """An error as JSON.  Messages of our own are whole sentences; others need their kind."""
    kind = "" if type(error).__module__.startswith("mllm_jax.") else f"{type(error).__name__}: "
    code = 2 if isinstance(error, ConfigError) else RESTART if isinstance(error, Restart) else 1
    return {"process": jax.process_index(), "text": f"{kind}{error}", "code": code}


def _raise(said: dict[str, Any]) -> None:
    kind = {2: ConfigError, RESTART: Restart}.get(said["code"], StoppedElsewhere)
    raise kind(f"process {said['process']} stopped: {said['text']}")


def shout(what: str, text: str) -> None:
    """Leaves a word for all processes that `heard` finds, whatever they are doing."""
    if cluster.client is not None:
        cluster.client.key_value_set(f"mllm_jax/{what}/{jax.process_index()}", text, allow_overwrite=True)


def heard(what: str) -> list[str]:
    return [] if cluster.client is None else [text for _, text in cluster.client.key_value_dir_get(f"mllm_jax/{what}/")]


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a global array, sharded by rows alone, that this process holds, in their order."""
    shards = {shard.index[0].indices(x.shape[0])[0] if shard.index else 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def is_writer(mesh: Mesh) -> bool:
    """Whether this process is the first of those that hold the same rows of a batch, and so answers for them."""
    here = host_share(mesh)[0]
    return jax.process_index() == min(p for p in range(jax.process_count()) if host_share(mesh, p)[0] == here)
