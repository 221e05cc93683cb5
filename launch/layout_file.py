"""Layouts in files: what `plan --search` writes, and what `--layout FILE.json` reads.

A file says for which machine it is, how programs are laid out there, and which changes of a recipe belong to the choice:

    {"machine": {"chip": "v5e", "chips": 16, "slices": 1},
     "layout": {"mesh": {"data": 1, "fsdp": 16, "tensor": 1}, "dtype": "bfloat16", "remat": "qkv+attention"},
     "recipe": "projector/gemma3",
     "overrides": ["stages.instruct.data.seq_len=4096"]}

`recipe` and `overrides` may be missing; fields of the layout that are not there have their defaults.  jax is not imported
here, for how many devices a CPU pretends to have is asked before it may be.
"""

import json
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError, nearest

MACHINE = {"chip": str, "chips": int, "slices": int}
PARTS = {"machine": dict, "layout": dict, "recipe": str, "overrides": list}


def path_of(name: str) -> Path | None:
    """The file that `--layout` names, or None if it is the name of a row; changes may follow after a colon."""
    file, dot, rest = name.partition(".json")
    return Path(file + dot) if dot and rest[:1] in ("", ":") else None


def read(path: Path) -> dict[str, Any]:
    """What is in the file, its parts of the types above.

    Raises:
      ConfigError: there is no such file, or it is not a layout.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        why = "cannot be read" if isinstance(error, OSError) else "is not JSON"
        raise ConfigError(f"the layout {path} {why}: {error}") from error
    if not isinstance(found, dict) or not {"machine", "layout"} <= found.keys():
        raise ConfigError(f"{path} is no layout: it needs machine and layout, as mllm-jax plan --search writes them")
    _check(path, found, PARTS)
    _check(f"{path}: machine", found["machine"], MACHINE)
    if missing := MACHINE.keys() - found["machine"].keys() - {"slices"}:
        raise ConfigError(f"{path}: machine needs {' and '.join(sorted(missing))}")
    found = {"recipe": "", "overrides": []} | found
    if odd := [o for o in found["overrides"] if not isinstance(o, str) or "=" not in o]:
        raise ConfigError(f"{path}: {odd[0]!r} is not an override; write path.to.field=value")
    return found


def _check(where: object, found: dict, kinds: dict[str, type]) -> None:
    for key, value in found.items():
        if key not in kinds:
            raise ConfigError(f"{where} has no field {key!r}; nearest: {nearest(key, kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool) or kinds[key] is int and value < 1:
            raise ConfigError(f"{where}: {key} is {value!r}, which is no {kinds[key].__name__}" + (" above 0" if kinds[key] is int else ""))
