"""Where the parameters of a stage come from: earlier stages, other runs, other parts of the model, Hugging Face."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.config import ConfigError, nearest
from mllm_jax.nn.param import Params
from mllm_jax.train.checkpoint import read_params
from mllm_jax.train.state import Blueprint, under


def initial_params(
    blueprint: Blueprint, sources: Mapping[str, str], *, run_dir: Path, runs: Path, previous: str | None, seed: int,
    from_hf: Any,
) -> Params:
    """The parameters a stage starts from.

    `sources` maps a subtree (`decoder`, `inputs/image/encoder`, `*`) to where it comes from:
      `stage://NAME[/subtree]`   an earlier stage of this run
      `recipe://NAME[/subtree]`  the last stage of another recipe's run, beside this one
      `copy://subtree`           another subtree of this model
      anything else              a Hugging Face folder or `hf://` name, read by `from_hf(source, subtree, wanted)`
    What no source names comes from the `previous` stage, if that has it; otherwise it is fresh.

    Raises:
      ConfigError: a subtree that no parameter is in, or a stage or recipe that has not been run.
    """
    given: Params = {}
    copies: dict[str, str] = {}
    for subtree, source in sources.items():
        inside = under(blueprint.shapes, subtree)
        if not inside:
            raise ConfigError(f"weights names {subtree!r}, which no parameter is in; nearest: {nearest(subtree, parts(blueprint.shapes))}")
        scheme, _, rest = source.partition("://")
        if scheme in ("stage", "recipe"):
            folder, theirs = _stage_folder(scheme, rest, run_dir, runs)
            name_of = {whole: "/".join(filter(None, (theirs, short))) for short, whole in inside.items()}
            found = read_params(folder, {name_of[w]: blueprint.shapes[w] for w in inside.values()})
            given |= {w: found[name_of[w]] for w in inside.values() if name_of[w] in found}
        elif scheme == "copy":
            theirs = {whole: "/".join(filter(None, (rest, short))) for short, whole in inside.items()}
            for whole, other in theirs.items():
                if other not in blueprint.shapes or blueprint.shapes[other].shape != blueprint.shapes[whole].shape:
                    raise ConfigError(f"weights says that {subtree!r} starts from copy://{rest}, but there is no parameter {other!r} "
                                      f"of the shape {blueprint.shapes[whole].shape} of {whole!r}; name a part of the same kind")
            copies |= theirs
        else:
            given |= from_hf(source, subtree, {w: blueprint.shapes[w] for w in inside.values()})
    rest = {k: v for k, v in blueprint.shapes.items() if k not in given and k not in copies}
    if rest and previous is not None:
        given |= read_params(run_dir / "stages" / previous, rest, partial=True)
    params = blueprint.init(seed, given)
    # True copies: the step donates its state, and the same buffer cannot be given away twice.
    return params | {k: jax.device_put(jnp.copy(params[source]), blueprint.shapes[k].sharding) for k, source in copies.items()}


def parts(paths: Mapping[str, Any]) -> list[str]:
    """All subtrees of these paths."""
    return sorted({"/".join(p.split("/")[:n]) for p in paths for n in range(1, p.count("/") + 1)})


def _stage_folder(scheme: str, rest: str, run_dir: Path, runs: Path) -> tuple[Path, str]:
    if scheme == "stage":
        name, _, subtree = rest.partition("/")
        folder = run_dir / "stages" / name
    else:
        match = re.fullmatch(r"([^/]+/[^/]+)(?:/(.*))?", rest)
        if not match:
            raise ConfigError(f"recipe://{rest} does not name a recipe; write recipe://chapter/system[/subtree]")
        name, subtree = match[1], match[2] or ""
        run = runs / re.sub(r"[/:=,]", "-", name)
        stages = json.loads((run / "recipe.json").read_text())["config"]["stages"] if (run / "recipe.json").exists() else {}
        folder = run / "stages" / (list(stages) or ["?"])[-1]
    if not (folder / "checkpoints").exists():
        raise ConfigError(f"{scheme}://{rest} has no checkpoint under {folder}; train it first")
    return folder, subtree
