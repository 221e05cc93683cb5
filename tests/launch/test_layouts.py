import math

import pytest

from mllm_jax.chips import CHIPS, chips_of, shape_of
from mllm_jax.config import ConfigError
from mllm_jax.launch.layouts import LAYOUTS, auto, find, machine
from mllm_jax.launch.runtime import pretended_devices


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_name_says_how_many_chips_and_slices_of_a_kind(name):
    chip, chips, slices = machine(name)
    assert math.prod(LAYOUTS[name].mesh.values()) == chips and LAYOUTS[name].slices == slices
    assert name == f"{chip}-{chips}" + (f"x{slices}" if slices > 1 else "") + ("-experts" if name.endswith("-experts") else "")
    if chip in CHIPS and CHIPS[chip].slices:
        assert chips_of(shape_of(chip, chips)) == chips


@pytest.mark.parametrize("name", LAYOUTS)
def test_matmuls_are_bfloat16_on_chips_and_float32_on_a_cpu(name):
    assert LAYOUTS[name].dtype == ("float32" if name.startswith("cpu") else "bfloat16")


def test_fields_after_the_colon_are_changed():
    layout = find("v5e-8:microbatches=4,mesh.tensor=2,mesh.fsdp=4", "tpu")
    assert layout.microbatches == 4 and dict(layout.mesh) == {"data": 1, "fsdp": 4, "tensor": 2}


def test_auto_depends_on_the_devices():
    assert auto("cpu").dtype == "float32" and auto("cpu").mesh["data"] == -1
    assert auto("gpu").dtype == "bfloat16" and auto("tpu").mesh["fsdp"] == -1
    assert math.prod(find("auto", "cpu").make_mesh().shape.values()) > 0


@pytest.mark.parametrize(("name", "says"), [("v5-8", "v5e-8"), ("cpu-8:rematt=full", "remat"), ("cpu-1:remat", "=")])
def test_a_mistake_names_the_nearest(name, says):
    with pytest.raises(ConfigError, match=says):
        find(name, "cpu")


def test_only_cpu_layouts_pretend_devices():
    assert {n: pretended_devices(n) for n in LAYOUTS} == {n: m.chips * m.slices * (m.chip == "cpu") for n in LAYOUTS for m in [machine(n)]}
    assert [pretended_devices(n) for n in ("cpu-8", "cpu-4x2:remat=full", "cpu-8-experts", "v5e-8", "auto")] == [8, 8, 8, 0, 0]
