"""The model that a stage trains, and which of its parameters: with adapters, where the stage has them; and these alone, for PEFT."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.hf.peft import save_adapter
from mllm_jax.nn.lora import LEAVES, LoRA
from mllm_jax.nn.param import Params
from mllm_jax.recipe import Recipe, Stage
from mllm_jax.train.state import trained_paths


def model_of(recipe: Recipe, stage: str) -> Any:
    """The configuration of the model that this stage trains."""
    model, lora = recipe.stages[stage].model or recipe.model, recipe.stages[stage].lora
    if not lora.rank:
        return model
    targets = tuple(f"{part}/{layer}" for part in lora.parts for layer in lora.layers)
    return LoRA(model=model, rank=lora.rank, alpha=lora.alpha or 2.0 * lora.rank, targets=targets)


def plain(model: Any) -> Any:
    """The model without its adapters."""
    return model.model if isinstance(model, LoRA) else model


def trained_of(stage: Stage, paths: Iterable[str]) -> set[str]:
    """The parameters that a stage trains; in a part with adapters these alone.

    Raises:
      ConfigError: a glob or a part names no parameter.
    """
    paths = list(paths)
    adapters = {p for p in paths if p.endswith(LEAVES)}
    if not adapters:
        return trained_paths(paths, stage.train)
    if lost := [part for part in stage.lora.parts if not any(p.startswith(f"{part}/") for p in adapters)]:
        raise ConfigError(f"lora.parts names {lost[0]!r}, in which no linear layer matches {', '.join(stage.lora.layers)}")
    inside = tuple(f"{part}/" for part in stage.lora.parts)
    return adapters | {p for p in trained_paths(paths, stage.train) if not p.startswith(inside)}


def save_adapters(recipe: Recipe, stage: str, params: Params, folder: Path, **options: Any) -> str | None:
    """Writes what this stage trained as a folder of PEFT (hf/peft.py has the options); its base, where that has a name.

    A stage that started from one checkpoint belongs to it; another one to the model without its adapters, wherever that is
    written.  Raises ConfigError where there are no adapters, or PEFT has no place for one.
    """
    weights = recipe.stages[stage].weights
    source = next(iter(weights.values())) if set(weights) in ({"*"}, {""}) else "stage://"
    base = None if source.startswith(("stage://", "recipe://", "copy://")) else source.removeprefix("hf://")
    trained = trained_of(recipe.stages[stage], params)
    save_adapter(params, model_of(recipe, stage), folder, trained=trained, base=base, **options)
    return base
