"""The runtime, seen from processes of its own: the environment counts before jax is imported."""

import json
import os
import signal
import subprocess
import sys

import pytest

from mllm_jax.config import RESTART
from mllm_jax.launch.runtime import cluster


def python(code: str, **env: str) -> dict:
    """Runs code that prints one JSON object, without the settings of the test process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "OMP_", "MALLOC_"))}
    out = subprocess.run([sys.executable, "-c", code], env=clean | {"JAX_PLATFORMS": "cpu"} | env, capture_output=True, text=True,
                         timeout=120)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


START = """
import json, os, sys
from mllm_jax.launch.runtime import start
assert "jax" not in sys.modules
runtime = start("cpu", cpu_devices=8)
import jax
print(json.dumps({"devices": jax.device_count(), "processes": runtime.processes, "omp": os.environ["OMP_NUM_THREADS"],
                  "loops": "xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"],
                  "cache": jax.config.jax_compilation_cache_dir, "stop": runtime.stop.is_set()}))
"""


def test_a_start_gives_devices_a_cache_and_one_process(tmp_path):
    got = python(START, XDG_CACHE_HOME=str(tmp_path), OMP_NUM_THREADS="3")
    assert got == {"devices": 8, "processes": 1, "omp": "3", "loops": True, "cache": str(tmp_path / "mllm_jax" / "xla"), "stop": False}


def test_devices_that_cannot_be_opened_end_a_run_with_the_code_that_restarts(tmp_path):
    """A platform that is not there stands for chips that the run before still holds."""
    done = subprocess.run([sys.executable, "-m", "mllm_jax.cli", "train", "first/digits", "--tiny", "--out", str(tmp_path / "run")],
                          env={**os.environ, "JAX_PLATFORMS": "abacus,cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == RESTART and not (tmp_path / "run").exists()
    assert done.stderr.splitlines()[-1].startswith("mllm-jax train: the devices or the other processes cannot be reached: Unable to initialize")


def test_sigterm_is_noticed_and_not_fatal():
    from mllm_jax.launch.runtime import on_sigterm

    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = on_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        os.kill(os.getpid(), signal.SIGTERM)        # at once: the same request, by another way
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("env", "found"), [
    ({}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "slurm"),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),              # inside an allocation, not inside a task
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
    ({"MLLM_JAX_CLUSTER": "tpu"}, "tpu"),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "jax"),
])
def test_a_cluster_is_known_by_its_variables(env, found):
    assert cluster(env) == found


def test_two_processes_find_each_other(free_port):
    code = """
import json
from mllm_jax.launch.runtime import start
r = start("cpu", cache=False)
import jax
print(json.dumps([r.process, r.processes, r.cluster, jax.device_count()]))
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))} | {"JAX_PLATFORMS": "cpu"}
    env = clean | {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port}", "JAX_NUM_PROCESSES": "2"}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
            for i in range(2)]
    out = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in runs]
    assert out == [[0, 2, "jax", 2], [1, 2, "jax", 2]]


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
