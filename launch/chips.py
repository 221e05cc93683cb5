"""What accelerators are called, what they can do at best, and how they stand in hosts and slices.  A table; no device is asked.

Sources: the pages of Cloud TPU on each version, and NVIDIA's data sheets (dense, without sparsity).  Rates are the maker's, so
utilisation against them is what papers call MFU.  What surprises: in the names of Google's accelerator types v4 and v5p
count cores (v5p-128 has 64 chips), v5e and v6e count chips.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field

from mllm_jax.config import ConfigError, config, nearest


@config
class Chip:
    kinds: tuple[str, ...]              # how jax calls it: `device_kind`
    peak: float                         # FLOP/s of bfloat16 matmuls
    host: int = 8                       # chips of a machine in a slice of several machines
    slices: Mapping[int, str] = field(default_factory=dict)     # chips -> shape of the slices that are let


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"}

CHIPS: dict[str, Chip] = {
    "v4": Chip(kinds=("TPU v4",), peak=275e12, host=4, slices=CUBES | {4096: "16x16x16"}),
    "v5e": Chip(kinds=("TPU v5 lite", "TPU v5e"), peak=197e12, host=4, slices=FLAT),
    "v5p": Chip(kinds=("TPU v5", "TPU v5p"), peak=459e12, host=4, slices=CUBES | {4096: "16x16x16", 6144: "16x16x24"}),
    "v6e": Chip(kinds=("TPU v6 lite", "TPU v6e"), peak=918e12, host=4, slices=FLAT),
    "a100": Chip(kinds=("NVIDIA A100",), peak=312e12),
    "h100": Chip(kinds=("NVIDIA H100",), peak=989.4e12),
    "h200": Chip(kinds=("NVIDIA H200",), peak=989.4e12),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so; None if it is not in the table (a CPU, or one with other rates, as the PCIe card of an H100)."""
    if "PCIe" in device_kind or "NVL" in device_kind:
        return None
    of = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    # NVIDIA's names go on: "NVIDIA H100 80GB HBM3".
    return of.get(device_kind) or next((chip for kind, chip in of.items() if kind.startswith("NVIDIA") and device_kind.startswith(kind)), None)


def peak_of(device_kinds: Sequence[str]) -> float:
    """FLOP/s of these devices together; 0 if one of them is not in the table."""
    chips = [chip_of(kind) for kind in device_kinds]
    return sum(chip.peak for chip in chips) if None not in chips else 0.0


def shape_of(name: str, chips: int) -> str:
    """The shape of the slice of so many chips, such as "4x4x8".

    Raises:
      ConfigError: there is no such chip, or no such slice of it.
    """
    if name not in CHIPS:
        raise ConfigError(f"no chip is called {name!r}; nearest: {nearest(name, CHIPS)}")
    slices = CHIPS[name].slices
    if chips not in slices:
        raise ConfigError(f"there is no slice of {chips} {name} chips; there are those of {', '.join(map(str, slices)) or 'none'}")
    return slices[chips]


def chips_of(shape: str) -> int:
    """"4x4x8" -> 128."""
    return math.prod(map(int, shape.split("x")))
