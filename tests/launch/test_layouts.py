import math

import pytest

from mllm_jax.config import ConfigError
from mllm_jax.launch.layouts import LAYOUTS, auto, find, pretended_devices


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_number_in_a_name_is_the_number_of_devices(name):
    assert math.prod(LAYOUTS[name].mesh.values()) == int(name.split("-")[1])


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
    assert [pretended_devices(n) for n in ("cpu-8", "cpu-8:remat=full", "cpu-8-experts", "v5e-8", "auto")] == [8, 8, 8, 1, 1]
