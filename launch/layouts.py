"""How programs are laid out on machines: a table of names, and what `--layout` may say.

    --layout v5e-8                                  a row of the table
    --layout v5e-8:microbatches=4,remat=dots        with fields of `sharding.Layout` changed
    --layout auto                                   what is here: see `auto`

The number in a name is the number of chips; with `-experts` four of them share the experts of sparse layers.  What a
program computes does not depend on its layout; memory and time do.
"""

from dataclasses import replace

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
    "gpu-1": replace(CHIPS, mesh=mesh()),
    "h100-8": replace(CHIPS, mesh=mesh(fsdp=8), remat="dots"),
    "h100-8-experts": replace(CHIPS, mesh=mesh(fsdp=2) | {"expert": 4}, remat="dots"),
    "h100-64": replace(CHIPS, mesh=mesh(data=8, fsdp=8), remat="dots"),      # parameters stay inside a machine
    "v4-32": replace(CHIPS, mesh=mesh(fsdp=32)),
    "v5e-1": replace(CHIPS, mesh=mesh()),
    "v5e-8": replace(CHIPS, mesh=mesh(fsdp=8)),
    "v5e-16": replace(CHIPS, mesh=mesh(fsdp=16)),
    "v5e-64": replace(CHIPS, mesh=mesh(fsdp=64)),
    "v5e-256": replace(CHIPS, mesh=mesh(fsdp=256)),
    "v5e-64-experts": replace(CHIPS, mesh=mesh(fsdp=16) | {"expert": 4}),
    "v5p-8": replace(CHIPS, mesh=mesh(fsdp=8), remat="dots"),
    "v5p-64": replace(CHIPS, mesh=mesh(fsdp=64), remat="dots"),
    "v5p-256": replace(CHIPS, mesh=mesh(data=4, fsdp=64), remat="dots"),
    "v6e-8": replace(CHIPS, mesh=mesh(fsdp=8)),
    "v6e-64": replace(CHIPS, mesh=mesh(fsdp=64)),
    "v6e-256": replace(CHIPS, mesh=mesh(fsdp=256)),
}


def auto(platform: str) -> Layout:
    """All devices on the first axis that suits them: copies and float32 on a CPU, shards and bfloat16 on chips."""
    return Layout(mesh=mesh(data=-1), unroll=4) if platform == "cpu" else replace(CHIPS, mesh=mesh(fsdp=-1))


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


def pretended_devices(name: str) -> int:
    """How many CPU devices a layout of this name asks for; 1 unless it is "cpu-8" or its like."""
    row = name.partition(":")[0]
    return int(row.split("-")[1]) if row in LAYOUTS and row.startswith("cpu-") else 1
