"""`mllm-jax compare`: a system as its difference from another."""

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any

from mllm_jax.config import compare, load

HELP = """Print what one recipe changes in another.

examples:
  mllm-jax compare projector/llava projector/llava_15
  mllm-jax compare projector/llava_15 projector/llava_15:size=13b
"""
WIDTH = 140                             # a stage or a model that only one has is not printed to its end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a recipe")
    parser.add_argument("b", metavar="B", help="another, or the same with knobs")
    parser.add_argument("--tiny", action="store_true", help="of the small versions")


def run(args: argparse.Namespace) -> int:
    a, b = (load(name, tiny=args.tiny) for name in (args.a, args.b))
    found = compare(_spelled(a, b), _spelled(b, a))
    for path, (left, right) in found.items():
        # What the model of a stage has in common with that of the recipe is said once.
        stage, _, rest = path.partition(".model.")
        if stage.startswith("stages.") and found.get(f"model.{rest}") == (left, right):
            continue
        print(f"{path}\n  - {line(left)}\n  + {line(right)}")
    if a == b:
        print("no difference")
    return 0


def _spelled(a: Any, b: Any) -> Any:
    """`a` with the model of a stage spelled out where b has one: None stands for that of the recipe."""
    own = {name for name, stage in b.stages.items() if stage.model is not None}
    return replace(a, stages={k: replace(s, model=s.model or (a.model if k in own else None)) for k, s in a.stages.items()})


def line(value: Any) -> str:
    text = value if isinstance(value, str) and value and value.isprintable() else written(value)
    return text if len(text) <= WIDTH else text[: WIDTH - 4] + " ..."


def written(value: Any) -> str:
    """A value as one would write it: fields that are at their defaults are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        given = (f"{f.name}={written(x)}" for f in fields(value) if (x := getattr(value, f.name)) != _default(f))
        return f"{type(value).__name__}({', '.join(given)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(k)}: {written(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
