"""What accelerators are called, what they can do at best, and how they stand in hosts and slices.  A table; no device is asked.

Sources: the pages of Cloud TPU on each version ("System architecture"), and NVIDIA's data sheets (dense, without sparsity).
Rates are the maker's, so utilisation against them is what papers call MFU, and of one device as jax counts them, which is a
whole chip on all of these; v4 in the form that has its two cores as one.  What surprises: in the names of Google's accelerator
types v4 and v5p count cores (v5p-128 has 64 chips), v5e and v6e count chips.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field

from mllm_jax.config import ConfigError, config, nearest

MIB, GIB = 1 << 20, 1 << 30


@config
class Chip:
    kinds: tuple[str, ...]              # how jax calls it: `device_kind`
    peak: float                         # FLOP/s of bfloat16 matmuls
    quantized: Mapping[str, float] = field(default_factory=dict)    # the same of those in eight bits that it has
    per_host: int = 8                   # chips of a machine in a slice of several machines
    # The rest is of TPUs: slices that are let, and what plans reckon with.
    slices: Mapping[int, str] = field(default_factory=dict)     # chips -> shape of the slices that are let
    clock: float = 0                    # cycles/s
    cores: int = 1                      # of one chip
    vmem: float = 0                     # bytes of a core's fast memory
    hbm: float = 0                      # bytes
    hbm_rate: float = 0                 # bytes/s
    link: float = 0                     # bytes/s of one ICI link, one way
    dims: int = 0                       # of the torus
    wraps_at: int = 0                   # a side is a ring when it is a multiple of this
    dcn: float = 0                      # bytes/s to other slices: a chip's share of its host's network card
    host_rate: float = 0                # bytes/s between the chip and the memory of its host
    host_cores: int = 0                 # processors of such a host (half its virtual ones)
    # Part of the peak that products reach by the cycles which the compiler expects of them, for plans without those.  Of
    # LLaVA-1.5-7B (v5p, v6e: 2,048 rows a chip) and MobileVLM V2 (v5e), by `plan`; v4 is taken to be as v5p.
    products: float = 0.85
    # Cycles of a splash attention kernel, from its bundle schedule: forward per block of 512 x 512 and head, overhead of a
    # grid step, of a row of blocks; backward per block, overhead of a step.
    splash: tuple[float, ...] = ()
    # The same of nn/flash.py for a causal row of 4096, all in all, with rotations: forward and backward (benchmarks/flash_cycles.py).
    flash: tuple[float, ...] = ()


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"}

CHIPS: dict[str, Chip] = {
    "v4": Chip(kinds=("TPU v4",), peak=275e12, quantized={"int8": 275e12}, per_host=4, slices=CUBES | {4096: "16x16x16"}, clock=1.05e9, cores=2,
               vmem=16 * MIB, hbm=32 * GIB, hbm_rate=1.23e12, link=4.5e10, dims=3, wraps_at=4, dcn=6.25e9, host_rate=1.5e10, host_cores=120,
               products=0.9, splash=(1181, 420, 345, 2344, 330), flash=(2073, 2906)),
    "v5e": Chip(kinds=("TPU v5 lite", "TPU v5e"), peak=197e12, quantized={"int8": 394e12}, per_host=4, slices=FLAT, clock=1.5e9,
                vmem=128 * MIB, hbm=16 * GIB, hbm_rate=8.19e11, link=4.5e10, dims=2, wraps_at=16, dcn=3.125e9, host_rate=1.5e10, host_cores=56,
                products=0.95, splash=(1192, 165, 363, 2428, 300), flash=(1452, 2855)),
    "v5p": Chip(kinds=("TPU v5", "TPU v5p"), peak=459e12, quantized={"int8": 918e12}, per_host=4, slices=CUBES | {4096: "16x16x16", 6144: "16x16x24"},
               clock=1.75e9, cores=2, vmem=64 * MIB, hbm=95 * GIB, hbm_rate=2.765e12, link=9e10, dims=3, wraps_at=4, dcn=6.25e9, host_rate=1.5e10,
                host_cores=104, products=0.9, splash=(1181, 420, 345, 2344, 330), flash=(1518, 2896)),
    "v6e": Chip(kinds=("TPU v6 lite", "TPU v6e"), peak=918e12, quantized={"int8": 1836e12}, per_host=4, slices=FLAT, clock=1.75e9,
                vmem=128 * MIB, hbm=32 * GIB, hbm_rate=1.64e12, link=9e10, dims=2, wraps_at=16, dcn=1.25e10, host_rate=3.2e10, host_cores=90,
                products=0.7, splash=(945, 220, 184, 1591, 250), flash=(1191, 1802)),
    "a100": Chip(kinds=("NVIDIA A100",), peak=312e12, quantized={"int8": 624e12}),
    "h100": Chip(kinds=("NVIDIA H100",), peak=989.4e12, quantized={"int8": 1979e12, "fp8": 1979e12}),
    "h200": Chip(kinds=("NVIDIA H200",), peak=989.4e12, quantized={"int8": 1979e12, "fp8": 1979e12}),
}
TPUS = {name: chip for name, chip in CHIPS.items() if chip.slices}
GPUS = {name: chip for name, chip in CHIPS.items() if not chip.slices}


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


def check_quantized(kind: str, name: str) -> None:
    """Raises ConfigError if the chip of that name (or of the kind that jax calls so) has no products in such numbers; of others nothing is known."""
    chip = CHIPS.get(name) or chip_of(name)
    if kind != "none" and chip is not None and kind not in chip.quantized:
        having = [n for n, c in CHIPS.items() if kind in c.quantized]
        raise ConfigError(f"{name} has no units for quantize={kind}; it has them for {', '.join(chip.quantized) or 'none'}, and {kind} is of "
                          f"{', '.join(having) or 'no chip'}")


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
