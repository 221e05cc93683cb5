"""Configurations are frozen dataclasses; this file loads, overrides and compares them.

A configuration is a value: it can be printed, changed with `override`, and subtracted from another
one with `compare`.  There is no registry and no YAML: a recipe is a Python file under `configs/`
with a function `recipe(**knobs)`.
"""

import ast
import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Marks a class as a configuration: a frozen, keyword-only dataclass."""
    return dataclass(frozen=True, kw_only=True)(cls)


class ConfigError(ValueError):
    """What the user wrote cannot be a configuration; the message is one line that says what to do."""


RESTART = 75                            # exit code (EX_TEMPFAIL of sysexits.h): nothing is wrong with the run, start it again


class Restart(RuntimeError):
    """The run was ended by its machines, not by a fault of its own: the same command goes on."""


def recipe_names() -> list[str]:
    """The names of all recipes of the cookbook, `chapter/system`, sorted."""
    from mllm_jax import configs

    chapters = (m.name for m in pkgutil.iter_modules(configs.__path__) if m.ispkg)
    return sorted(
        f"{chapter}/{m.name}"
        for chapter in chapters
        for m in pkgutil.iter_modules(importlib.import_module(f"mllm_jax.configs.{chapter}").__path__)
    )


def load(name: str, *overrides: str, tiny: bool = False) -> Any:
    """The recipe of that name, for example `projector/llava_15` or `projector/llava_15:size=13b`.

    What follows the colon are knobs: arguments of the recipe function, which move several fields together.  It is made small if
    `tiny`, and then changed: an override is the last word.

    Raises:
      ConfigError: no such recipe, knob, value of a knob or field; the message names the nearest ones.
    """
    path, _, knobs = name.partition(":")
    path = path.removeprefix("configs/").removesuffix(".py")
    if path not in (known := recipe_names()):
        raise ConfigError(f"no recipe is called {path!r}; nearest: {nearest(path, known)}")
    function = importlib.import_module("mllm_jax.configs." + path.replace("/", ".")).recipe
    accepted = list(inspect.signature(function).parameters)
    arguments = {}
    for knob in filter(None, knobs.split(",")):
        key, equals, text = knob.partition("=")
        if not equals or key not in accepted:
            raise ConfigError(f"{path} has no knob {knob!r}; it has: {', '.join(accepted) or 'none'}")
        arguments[key] = parse(text)
    try:
        recipe = function(**arguments)
    except KeyError as error:           # a size that its table does not have
        raise ConfigError(f"{name}: no knob of {path} can be {error.args[0]!r}; configs/{path}.py has the values") from error
    return override(recipe.tiny() if tiny else recipe, *overrides)


def override(cfg: T, *assignments: str) -> T:
    """`cfg` with fields changed, one after another, for example by `stages.instruct.optimizer.lr=1e-5`.

    Raises:
      ConfigError: the path names a field that does not exist (the message lists the nearest ones), or
        the new value does not fit the type of the field.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r} is not an override; write path.to.field=value")
        cfg = _set(cfg, path.split("."), parse(text), path, type(cfg))
    return cfg


def compare(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two configurations differ, as `{path: (in a, in b)}`.

    Parts that only one of them has, or that are of different types, are not looked into.
    """
    left, right = items(a), items(b)
    if left is None or right is None or type(a) is not type(b):
        return {} if a == b else {path: (a, b)}
    out = {}
    for key in [*left, *(k for k in right if k not in left)]:
        out |= compare(left.get(key), right.get(key), f"{path}.{key}" if path else key)
    return out


def items(node: Any) -> Mapping[str, Any] | None:
    """The named parts of a configuration, or None if it is a plain value."""
    if is_dataclass(node) and not isinstance(node, type):
        return {f.name: getattr(node, f.name) for f in fields(node)}
    if isinstance(node, Mapping):
        return dict(node)
    if isinstance(node, tuple) and any(items(x) is not None for x in node):
        return {str(i): x for i, x in enumerate(node)}
    return None


def to_json(node: Any) -> Any:
    """A configuration as nested plain values, each dataclass with its class name under `"_"`."""
    if is_dataclass(node) and not isinstance(node, type):
        return {"_": type(node).__name__} | {k: to_json(v) for k, v in items(node).items()}
    if isinstance(node, Mapping):
        return {str(k): to_json(v) for k, v in node.items()}
    if isinstance(node, (tuple, list)):
        return [to_json(x) for x in node]
    return node if isinstance(node, (str, int, float, bool, type(None))) else repr(node)


def parse(text: str) -> Any:
    """A Python literal if it is one, otherwise the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def nearest(word: str, words: typing.Iterable[str]) -> str:
    """The words most like `word`, joined by commas; all of them if none is alike."""
    words = list(words)
    return ", ".join(difflib.get_close_matches(word, words, n=3, cutoff=0.5) or words) or "none"


def _set(node: Any, path: list[str], value: Any, whole: str, hint: Any) -> Any:
    if not path:
        return _fit(value, node, hint, whole)
    head, *rest = path
    parts = items(node) or {}
    # A mapping of plain values, such as the weights of sources, takes new names; a record does not.
    open_ended = isinstance(node, Mapping) and not rest and not any(is_dataclass(v) for v in node.values())
    if head not in parts and not open_ended:
        raise ConfigError(f"{whole}: {type(node).__name__} has no field {head!r}; nearest: {nearest(head, parts)}")
    if is_dataclass(node):
        return replace(node, **{head: _set(parts[head], rest, value, whole, get_type_hints(type(node))[head])})
    element = get_args(hint)[-1] if get_args(hint) else Any
    new = _set(parts.get(head), rest, value, whole, element)
    if isinstance(node, tuple):
        return tuple(new if str(i) == head else x for i, x in enumerate(node))
    return {**node, head: new}


def _fit(value: Any, old: Any, hint: Any, whole: str) -> Any:
    """`value` as the type that the field declares; an integer may stand for a float, a list for a tuple."""
    for kind in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        origin = get_origin(kind) or kind
        if origin in (Any, typing.Any) or isinstance(origin, TypeVar):
            return value
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(value)
        if origin is tuple and isinstance(value, str) and get_args(kind)[:1] == (str,):
            return (value,)
        if origin is type(None) and value is None:
            return None
        if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    if hint is str and (value is None or isinstance(value, bool)):          # `remat=none` is a word where only words fit
        return str(value).lower()
    name = getattr(hint, "__name__", None) or str(hint)
    name = str(hint) if get_args(hint) else name
    raise ConfigError(f"{whole} is {name} (now {old!r}); got {value!r}")
