"""How programs are laid out on machines: a table of names, and what `--layout` may say.

    --layout v5e-8                                  a row of the table
    --layout v5e-8:microbatches=4,remat=dots        with fields of `sharding.Layout` changed
    --layout auto                                   what is here: see `auto`

The number in a name is the number of chips: v5e-256 is one slice, v5e-256x2 two of them, with copies of the parameters in
each and the gradients added up over the network between them.  With `-experts` four chips share the experts of sparse
layers.  What a program computes does not depend on its layout; memory and time do.
"""

import re
from dataclasses import replace
from typing import NamedTuple

from mllm_jax.config import ConfigError, nearest, override
from mllm_jax.sharding import Layout


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


# Activations of every layer are recomputed: slower by a third at most, and it fits first.
CHIPS = Layout(dtype="bfloat16", remat="full")

LAYOUTS: dict[str, Layout] = {
    "cpu-1": Layout(mesh=mesh()),
    "cpu-8": Layout(mesh=mesh(data=2, fsdp=2, tensor=2)),           # eight pretended devices: every kind of sharding
    "cpu-8-experts": Layout(mesh=mesh(data=2) | {"expert": 4}),
    "cpu-4x2": Layout(mesh=mesh(fsdp=2, tensor=2), slices=2),       # two pretended slices of four
    "gpu-1": replace(CHIPS, mesh=mesh()),
    "h100-1": replace(CHIPS, mesh=mesh(), remat="dots"),
    "h100-8": replace(CHIPS, mesh=mesh(fsdp=8), remat="dots"),
    "h100-8-experts": replace(CHIPS, mesh=mesh(fsdp=2) | {"expert": 4}, remat="dots"),
    "h100-8x4": replace(CHIPS, mesh=mesh(fsdp=8), slices=4, remat="dots"),
    "h100-8x8": replace(CHIPS, mesh=mesh(fsdp=8), slices=8, remat="dots"),      # eight machines; parameters stay inside one
    "h200-1": replace(CHIPS, mesh=mesh(), remat="dots"),
    "h200-8": replace(CHIPS, mesh=mesh(fsdp=8), remat="dots"),
    "v4-8": replace(CHIPS, mesh=mesh(fsdp=8)),
    "v4-32": replace(CHIPS, mesh=mesh(fsdp=32)),
    "v4-64": replace(CHIPS, mesh=mesh(fsdp=64)),
    "v5e-1": replace(CHIPS, mesh=mesh()),
    "v5e-8": replace(CHIPS, mesh=mesh(fsdp=8)),
    "v5e-16": replace(CHIPS, mesh=mesh(fsdp=16)),
    "v5e-64": replace(CHIPS, mesh=mesh(fsdp=64)),
    "v5e-64-experts": replace(CHIPS, mesh=mesh(fsdp=16) | {"expert": 4}),
    "v5e-256": replace(CHIPS, mesh=mesh(fsdp=256)),
    "v5e-16x2": replace(CHIPS, mesh=mesh(fsdp=16), slices=2),
    "v5e-256x2": replace(CHIPS, mesh=mesh(fsdp=256), slices=2),
    "v5e-256x4": replace(CHIPS, mesh=mesh(fsdp=256), slices=4),
    "v5p-8": replace(CHIPS, mesh=mesh(fsdp=8), remat="dots"),
    "v5p-64": replace(CHIPS, mesh=mesh(fsdp=64), remat="dots"),
    "v5p-256": replace(CHIPS, mesh=mesh(data=4, fsdp=64), remat="dots"),
    "v5p-512": replace(CHIPS, mesh=mesh(data=8, fsdp=64), remat="dots"),
    "v5p-64x2": replace(CHIPS, mesh=mesh(fsdp=64), slices=2, remat="dots"),
    "v5p-512x2": replace(CHIPS, mesh=mesh(data=8, fsdp=64), slices=2, remat="dots"),
    "v6e-1": replace(CHIPS, mesh=mesh()),
    "v6e-8": replace(CHIPS, mesh=mesh(fsdp=8)),
    "v6e-64": replace(CHIPS, mesh=mesh(fsdp=64)),
    "v6e-256": replace(CHIPS, mesh=mesh(fsdp=256)),
    "v6e-256x2": replace(CHIPS, mesh=mesh(fsdp=256), slices=2),
    "v6e-256x4": replace(CHIPS, mesh=mesh(fsdp=256), slices=4),
}
NAME = re.compile(r"([a-z]\w*)-(\d+)(?:x(\d+))?(?:-\w+)?")


class Machine(NamedTuple):
    """What a name of the table says: chips of a kind, in one slice or several."""

    chip: str
    chips: int                          # of one slice
    slices: int


def machine(name: str) -> Machine:
    """"v5e-256x2" -> two slices of 256 chips; changes after a colon are no matter.

    Raises:
      ConfigError: no layout is called so.
    """
    row = name.partition(":")[0]
    if row not in LAYOUTS:
        raise ConfigError(f"no layout is called {row!r}; nearest: {nearest(row, LAYOUTS)}")
    chip, chips, slices = NAME.fullmatch(row).groups()
    return Machine(chip, int(chips), int(slices or 1))


def auto(platform: str) -> Layout:
    """All devices on the first axis that suits them: copies and float32 on a CPU, shards of a slice and bfloat16 on chips."""
    return Layout(mesh=mesh(data=-1), unroll=4) if platform == "cpu" else replace(CHIPS, mesh=mesh(fsdp=-1), slices=-1)


def find(name: str, platform: str) -> Layout:
    """The layout of that name on this kind of device, with the changes after the colon.

    Raises:
      ConfigError: no such layout or field; the message names the nearest ones.
    """
    row, _, changes = name.partition(":")
    if row != "auto" and row not in LAYOUTS:
        raise ConfigError(f"no layout is called {row!r}; nearest: {nearest(row, ['auto', *LAYOUTS])}")
    layout = auto(platform) if row == "auto" else LAYOUTS[row]
    for change in filter(None, changes.split(",")):
        layout = override(layout, change)
    return layout
