"""Storage that fails on one of two hosts: both hear of it, go on when it comes back, and end when it does not."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

HOST = """
import resource, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
address, me, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(address, 2, me)
from mllm_jax.launch.runtime import quiet
from mllm_jax.sharding import Layout
from mllm_jax.train import checkpoint
from mllm_jax.train.checkpoint import CheckpointError, Checkpoints
from mllm_jax.train.state import TrainState
quiet()
mesh = Layout().make_mesh()
each, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", None))
noise = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
array = jax.make_array_from_callback(noise.shape, each, lambda index: noise[index])
state = TrainState(step=jax.device_put(np.zeros(1, np.int32), whole), params={"w": array}, frozen={}, opt_state={}, ema=None)
checkpoint.LEAST = 3
limit = lambda n: me == 1 and resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
checkpoints = Checkpoints(folder / "stage", patience=1)
checkpoints.save(1, state, None, {}, wait=True)
limit(2000)
checkpoints.save(2, state, None, {})
assert not checkpoints.settle()
limit(resource.RLIM_INFINITY)
checkpoints.save(3, state, None, {})
assert checkpoints.settle()
limit(2000)
try:
    for step in (4, 5, 6):
        checkpoints.save(step, state, None, {})
except CheckpointError as error:
    print(step, error)
"""


def test_storage_of_one_host_that_fails_for_a_while_or_for_good(tmp_path: Path):
    """Both wait for as long as they may, here three seconds, and then go on together."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    start = lambda i: subprocess.Popen([sys.executable, "-c", HOST, address, str(i), str(tmp_path)], env=env, text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    hosts = [start(0), start(1)]
    try:
        printed = [h.communicate(timeout=200) for h in hosts]
    finally:
        for h in hosts:
            h.kill()
    where = f"in {tmp_path / 'stage'}: "
    for said, error in printed:
        last = said.splitlines()[-1]
        assert last.startswith(f"6 could not save step 5, nor the one before {where}") and "the checkpoint of step 3 is intact" in last, error
    lines = [line for line in printed[0][1].splitlines() if line.startswith("mllm-jax: ")]
    assert [line.partition(where)[0] for line in lines] == [f"mllm-jax: could not save step {n} " for n in (2, 4)]
    assert all("ChainedFuture" not in line and line.endswith("; the next checkpoint is tried when it is due") for line in lines)
