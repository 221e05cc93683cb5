"""Programs that several tests look at, each compiled once."""

import pytest

from mllm_jax.config import load
from mllm_jax.launch import layouts


@pytest.fixture(scope="session")
def tpu():
    """`topology`, where libtpu is installed."""
    pytest.importorskip("libtpu")
    from mllm_jax.plan.topology import topology

    return topology


@pytest.fixture(scope="session")
def llava():
    return load("projector/llava_15", "stages.instruct.data.batch_size=16", tiny=True)


@pytest.fixture(scope="session")
def one_slice(tpu, llava):
    """(compiled, its Hlo, topology) of a step on a mesh of two axes."""
    return _compiled(llava, tpu("v5e:2x2"), "auto:mesh.fsdp=2,mesh.tensor=2")



def _compiled(recipe, on, layout):
    from mllm_jax.plan.program import compile, lower

    compiled = compile(lower(recipe, "instruct", layouts.find(layout, "tpu"), list(on.devices)))
    return compiled, compiled.hlo, on
