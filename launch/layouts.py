"""How programs are laid out on machines: a table of names, and what `--layout` may say.

    --layout v5e-8                                  a row of the table
    --layout v5e-8:microbatches=4,remat=dots        with fields of `sharding.Layout` changed
    --layout v5p-64:mesh.fsdp=4,mesh.context=16     each row over 16 chips: docs/performance.md, "Long rows"
    --layout auto                                   what is here: see `auto`
    --layout found.json                             a file of `plan --search` (layout_file.py); changes may follow it too

The number in a name is the number of chips: v5e-256 is one slice, v5e-256x2 two of them, with copies of the parameters in
each and the gradients added up over the network between them.  With `-experts` four chips share the experts of sparse
layers.  What a program computes does not depend on its layout; memory and time do.
"""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from mllm_jax.chips import check_quantized
from mllm_jax.config import ConfigError, nearest, override, to_json
from mllm_jax.launch import layout_file
from mllm_jax.sharding import Layout


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


# Activations of every layer are recomputed: slower by a third at most, and it fits first.
CHIPS = Layout(dtype="bfloat16", remat="full")
# What memory for 8,000 positions of a 7 B decoder can keep, so that little but norms and sums is computed again.
KEPT = "qkv+attention+mlp"

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
    "v5p-8": replace(CHIPS, mesh=mesh(fsdp=8), remat=KEPT),
    "v5p-64": replace(CHIPS, mesh=mesh(fsdp=64), remat=KEPT),
    "v5p-256": replace(CHIPS, mesh=mesh(data=4, fsdp=64), remat=KEPT),
    "v5p-512": replace(CHIPS, mesh=mesh(data=8, fsdp=64), remat=KEPT),
    "v5p-64x2": replace(CHIPS, mesh=mesh(fsdp=64), slices=2, remat=KEPT),
    "v5p-512x2": replace(CHIPS, mesh=mesh(data=8, fsdp=64), slices=2, remat=KEPT),
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
    if path := layout_file.path_of(name):
        return Machine(**{"slices": 1} | layout_file.read(path)["machine"])
    row = name.partition(":")[0]
    if row not in LAYOUTS:
        raise ConfigError(f"no layout is called {row!r}; nearest: {nearest(row, LAYOUTS)}")
    chip, chips, slices = NAME.fullmatch(row).groups()
    return Machine(chip, int(chips), int(slices or 1))


def auto(platform: str) -> Layout:
    """All devices on the first axis that suits them: copies and float32 on a CPU, shards of a slice and bfloat16 on chips."""
    return Layout(mesh=mesh(data=-1), unroll=4) if platform == "cpu" else replace(CHIPS, mesh=mesh(fsdp=-1), slices=-1)


def find(name: str, platform: str) -> Layout:
    """The layout of that name or file on this kind of device, with the changes after the colon.

    Raises:
      ConfigError: no such layout or field, with the nearest ones in the message; or the chip of that name has no such numbers.
    """
    if path := layout_file.path_of(name):
        layout, changes = _of_file(path), name.partition(".json")[2].removeprefix(":")
    else:
        row, _, changes = name.partition(":")
        if row != "auto" and row not in LAYOUTS:
            raise ConfigError(f"no layout is called {row!r}; nearest: {nearest(row, ['auto', *LAYOUTS])}; a file's name ends in .json")
        layout = auto(platform) if row == "auto" else LAYOUTS[row]
    layout = override(layout, *filter(None, re.split(r",(?![^()]*\))", changes)))
    if name.partition(":")[0] in LAYOUTS:
        check_quantized(layout.quantize, machine(name).chip)
    return layout


def overrides(name: str, recipe: str) -> tuple[str, ...]:
    """The changes of a recipe that a file holds beside its layout; none for a name.

    Raises:
      ConfigError: they were found for another recipe.
    """
    if (path := layout_file.path_of(name)) is None or not (found := layout_file.read(path))["overrides"]:
        return ()
    if found["recipe"].partition(":")[0] not in ("", recipe.partition(":")[0]):
        raise ConfigError(f"the layout {path} changes fields of {found['recipe']}, for which it was found, and this is {recipe}; "
                          "search again, or take the overrides out of the file")
    return tuple(found["overrides"])


def words(name: str) -> str:
    """What `--layout` may say instead of a file, where there is none, on a TPU or GPU; a name as it is."""
    if layout_file.path_of(name) is None:
        return name
    layout, base = find(name, "tpu"), auto("tpu")
    changes = [f"{f.name}={getattr(layout, f.name)}" for f in fields(Layout)
               if f.name not in ("mesh", "rules") and getattr(layout, f.name) != getattr(base, f.name)]
    sizes = dict.fromkeys(base.mesh, 1) | dict(layout.mesh)
    rules = {k: layout.rules.get(k) for k in {**base.rules, **layout.rules} if layout.rules.get(k) != base.rules.get(k)}
    changes += [f"mesh.{k}={n}" for k, n in sizes.items()] + [f"rules.{k}={v!r}".replace(" ", "") for k, v in rules.items()]
    return "auto:" + ",".join(changes)


def write(path: Path, layout: Layout, on: Machine, recipe: str = "", overrides: tuple[str, ...] = ()) -> None:
    """A file that `find`, `machine` and `overrides` read."""
    plain = {k: v for k, v in to_json(layout).items() if k != "_"}
    path.write_text(json.dumps({"machine": on._asdict(), "layout": plain, "recipe": recipe, "overrides": list(overrides)}, indent=1) + "\n")


def _of_file(path: Path) -> Layout:
    layout = Layout()
    try:
        for field, value in layout_file.read(path)["layout"].items():
            if field in ("mesh", "rules") and isinstance(value, dict):
                layout = replace(layout, **{field: {}})
                for k, one in value.items():
                    layout = override(layout, f"{field}.{k}={tuple(one) if isinstance(one, list) else one!r}")
            else:
                layout = override(layout, f"{field}={value!r}")
    except ConfigError as error:
        raise ConfigError(f"the layout {path}: {error}" if str(path) not in str(error) else str(error)) from error
    return layout
