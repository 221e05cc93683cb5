"""Two processes with two devices each load their shards and export the whole together."""

import os
import socket
import subprocess
import sys

from tests.hf.test_convert import stored

HOST = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import flax.nnx as nnx
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.hub import folder_of
from mllm_jax.hf.load import load
from mllm_jax.nn.param import axes_of, split
from mllm_jax.sharding import Layout, sharding_of

cfg = describe(folder_of(sys.argv[3]))[1]
layout = Layout(mesh={"data": 1, "fsdp": 2, "tensor": 2})
mesh = layout.make_mesh()
module = jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
axes = axes_of(module)
shardings = {k: sharding_of(axes[k], x.shape, layout, mesh) for k, x in split(module)[1].items()}
_, params = load(sys.argv[3], shardings=shardings)
assert any(not x.is_fully_addressable for x in params.values())
export(params, cfg, sys.argv[4], max_shard_bytes=30_000)
assert (folder_of(sys.argv[4]) / "config.json").exists()
"""


def test_two_hosts_load_and_export(saved, tmp_path):
    folder = saved("qwen2").folder
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    start = lambda i: subprocess.Popen(
        [sys.executable, "-c", HOST, address, str(i), folder, tmp_path / "out"], env=env, stderr=subprocess.PIPE, text=True)
    hosts = [start(0), start(1)]
    try:
        errors = [h.communicate(timeout=180)[1] for h in hosts]
    finally:
        for h in hosts:
            h.kill()
    assert [h.returncode for h in hosts] == [0, 0], "\n".join(errors)[-4000:]
    assert stored(tmp_path / "out") == stored(folder)
