"""A trace holds the steps that were asked for."""

import os
import subprocess
import sys

from mllm_jax.train.trace import Trace
from tests.conftest import ROOT

CODE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from mllm_jax.train.trace import Trace

for folder, wanted in (("steps", (2, 2)), ("early", (3, 9)), ("none", None), ("late", (7, 1))):
    trace, x = Trace(wanted, Path(sys.argv[1]) / folder), None
    for step in range(1, 5):
        trace.before(step, x)
        with jax.profiler.StepTraceAnnotation(f"mark-{step}"):
            x = jax.jit(lambda x: x @ x)(jnp.ones((8, 8)))
        trace.after(step, x)
    trace.close()
"""


def test_the_steps_that_were_asked_for_are_traced_and_no_others(tmp_path):
    """In a process of its own: the profiler ends a process in which the compiler for TPUs was loaded on a machine without one."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], env=env, check=True, timeout=120)
    seen = {p.name: [f.read_bytes() for f in p.rglob("*.xplane.pb")] for p in tmp_path.iterdir()}
    assert {k: len(v) for k, v in seen.items()} == {"steps": 1, "early": 1}
    steps = lambda data: [n for n in range(1, 5) if f"mark-{n}".encode() in data]
    assert steps(seen["steps"][0]) == [2, 3] and steps(seen["early"][0]) == [3, 4]


def test_nothing_is_opened_for_a_step_that_does_not_come(tmp_path):
    trace = Trace((5, 1), tmp_path / "profile")
    for step in (1, 2):
        trace.before(step, None)
        trace.after(step, None)
    trace.close()
    assert not (tmp_path / "profile").exists()
