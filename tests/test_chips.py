"""The table of chips: shapes multiply to their numbers, and devices are found by the names that jax has for them."""

import dataclasses

import pytest

from mllm_jax.chips import CHIPS, TPUS, chip_of, chips_of, peak_of, shape_of
from mllm_jax.config import ConfigError


@pytest.mark.parametrize("name", CHIPS)
def test_the_shape_of_a_slice_multiplies_to_its_chips_and_has_the_axes_of_the_torus(name):
    for chips, shape in CHIPS[name].slices.items():
        assert chips_of(shape) == chips and len(shape.split("x")) == CHIPS[name].dims


@pytest.mark.parametrize("name", TPUS)
def test_a_plan_has_all_that_it_reckons_with(name):
    assert [f.name for f in dataclasses.fields(CHIPS[name]) if not getattr(CHIPS[name], f.name)] == []


@pytest.mark.parametrize(("kind", "name"), [
    ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
])
def test_a_device_is_known_by_its_kind(kind, name):
    assert chip_of(kind) is CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "TPU v5 something", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA L4"])
def test_a_device_with_other_rates_is_not_guessed(kind):
    assert chip_of(kind) is None


def test_a_mistake_names_what_there_is():
    with pytest.raises(ConfigError, match="nearest: .*v5e"):
        shape_of("v5", 8)
    with pytest.raises(ConfigError, match="no slice of 12 v5e chips; there are those of 1, 4, 8"):
        shape_of("v5e", 12)


def test_a_peak_is_of_all_devices_or_not_known():
    assert peak_of(["TPU v5 lite"] * 4) == 4 * 197e12 and peak_of(["TPU v5 lite", "cpu"]) == 0
