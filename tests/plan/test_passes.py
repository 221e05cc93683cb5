"""Plans without machine code: memory and schedule are those of the whole compile."""

import threading

import pytest

pytest.importorskip("libtpu")

from mllm_jax.config import ConfigError, load, override  # noqa: E402
from mllm_jax.launch import layouts  # noqa: E402
from mllm_jax.plan import program as programs  # noqa: E402
from mllm_jax.plan.executable import Sizes  # noqa: E402
from mllm_jax.plan.memory import memory  # noqa: E402
from mllm_jax.plan.passes import passes, quick  # noqa: E402
from mllm_jax.plan.report import plan_of  # noqa: E402
from mllm_jax.plan.topology import not_kept  # noqa: E402


@pytest.fixture(params=["v5e", "v6e"])
def whole(request, one_slice, llava, tpu):
    """(a step compiled to the end, topology); v6e gathers on its SparseCores, in operations that jaxlib cannot print."""
    if request.param == "v5e":
        return one_slice[0], one_slice[2]
    on = tpu("v6e:2x2")
    with not_kept():
        return programs.compile(programs.lower(llava, "instruct", layouts.find("auto", "tpu"), list(on.devices))), on


def test_buffers_and_order_are_those_of_the_whole_compile(whole):
    whole, on = whole
    with not_kept():
        part = passes(whole.program)
        for thread in threading.enumerate():
            if thread.name == "compiler":       # what it goes on with is not kept either
                thread.join()
    order = lambda c: [i.name for i in c.hlo.body(c.hlo.entry)]
    assert order(part) == order(whole)
    a, b = memory(part), memory(whole)
    assert a.code == 0 < b.code and a.arguments == b.arguments and a.total == pytest.approx(b.total - b.code, rel=0.01)
    # Which cycles the compiler expects of products is all that the estimate loses.
    a, b = (plan_of("", "instruct", on, c.program, compiled=c).estimate for c in (part, whole))
    assert a.by_kind()["pallas"] == pytest.approx(b.by_kind()["pallas"]) and a.flops == pytest.approx(b.flops)
    assert a.seconds == pytest.approx(b.seconds, rel=0.1)


def test_a_process_of_its_own_answers_with_a_plan_or_with_what_is_wrong(llava, tpu):
    on, layout = tpu("v5e:2x2"), layouts.find("auto", "tpu")
    made = quick("projector/llava_15", llava, None, on, layout)
    assert made.fits and made.on is on and made.memory.total > 0 and made.estimate.seconds > 0
    large = load("projector/llava_15", "stages.instruct.data.batch_size=256")
    refused = quick("projector/llava_15", large, None, on, layout)
    assert not refused.fits and "HBM" in refused.refusal
    with pytest.raises(ConfigError, match="batch_size is 7; the layout needs a multiple of 4"):
        quick("projector/llava_15", override(llava, "stages.instruct.data.batch_size=7"), None, on, layout)


def test_sizes_are_read_from_a_dump_by_kind_and_memory():
    text = """BufferAssignment:
allocation 0: size 64, page 0, thread-local:
allocation 1: size 100, page 0, parameter 6, shape |f32[25]| at ShapeIndex {}, maybe-live-out:
 value: <5975 param.96 @0> (size=100,offset=0): f32[25]{0}
allocation 2: size 30, page 0, parameter 7, shape |f32[5]| at ShapeIndex {}:
allocation 3: size 7, page 0, maybe-live-out:
allocation 4: size 500, page 0, preallocated-temp:
allocation 5: size 900, color 1, page 0, preallocated-temp:
allocation 6: size 11, color 5, page 0, parameter 8, shape |f32[2]| at ShapeIndex {}:
"""
    assert Sizes.of_dump(text) == Sizes(arguments=130, temporaries=500, outputs=107, shared=100, host=11)
