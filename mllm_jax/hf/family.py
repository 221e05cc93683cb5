"""Conversion as a table: a row is read from left to right to import, and from right to left to export.

    row("encoder.layers.{i}.self_attn.q_proj.weight", "blocks/0/attn/q/kernel", "(h k) d -> d h k")

`{i}` runs over the layers, which are entries of one stacked array of ours.  Where layers differ in a cycle of c, layer i
is entry i // c of `blocks/{i % c}`; tables write `blocks/0` for all, and `{k}` for i // c where theirs counts so.  The third
column is an einops pattern from their shape to that of one layer of ours.  A row counts only if the model has its parameter,
with as many axes as the pattern gives, so that one table serves models with and without biases, query norms or a tied head; that
every parameter has a row, and every tensor a parameter, is checked, and what is left over on either side is an error that names it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, replace
from typing import Any

import numpy as np
from einops import rearrange

from mllm_jax.config import ConfigError, compare, config
from mllm_jax.connectors.pool import NestedConfig
from mllm_jax.nn.param import abstract, split

LEAVES_OF_LORA = ("lora/a", "lora/b")


class CannotExpress(ConfigError):
    """A model of ours that its family of the Hub has no options for."""


@config
class Row:
    theirs: str
    ours: str
    how: str = ""
    part: tuple[int, int] | None = None  # (n, of): ours is the nth of so many equal parts of theirs, along its first axis


def row(theirs: str, ours: str, how: str = "", part: tuple[int, int] | None = None) -> Row:
    return Row(theirs=theirs, ours=ours, how=how, part=part)


def linear(theirs: str, ours: str, kernel: str, bias: str = "") -> tuple[Row, Row]:
    """The two rows of a linear layer."""
    return row(f"{theirs}.weight", f"{ours}/kernel", kernel), row(f"{theirs}.bias", f"{ours}/bias", bias)


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return row(f"{theirs}.weight", f"{ours}/scale"), row(f"{theirs}.bias", f"{ours}/bias")


@config
class Part:
    """A part of a model that has a table of its own."""

    theirs: str                         # prefix of its tensors
    ours: str                           # prefix of its parameters
    rows: tuple[Row, ...]
    of: Callable[[Any], Any]            # configuration of the model -> that of the part


@config
class Link:
    """One tensor of theirs (or a part of it) and one parameter of ours (or a layer of it)."""

    theirs: str
    ours: str
    layer: int | None
    shape: tuple[int, ...]              # of ours, without the layer axis
    how: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)      # axes that neither shape tells
    part: tuple[int, int] | None = None

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """Theirs, whole -> ours; a view where possible."""
        if self.part:
            n, of = self.part
            x = x[n * len(x) // of : (n + 1) * len(x) // of]
        return _rearrange(x, self.how, {**self.sizes, **_named(self.how, self.shape)})

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Ours -> theirs, or the part of it that ours is; a view where possible."""
        return _rearrange(x, " -> ".join(reversed(self.how.split(" -> "))) if self.how else "", self.sizes)

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        shape = self.to_theirs(np.broadcast_to(np.zeros((), np.int8), self.shape)).shape
        return (shape[0] * self.part[1], *shape[1:]) if self.part else shape


@config
class Family:
    """A `model_type` of the Hub: how its configuration and its tensors become ours, and back."""

    model_type: str
    architecture: str                   # the class of transformers that opens it
    config: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]       # (config.json, preprocessor config) -> ours
    hf_config: Callable[[Any, Any], tuple[dict, dict]]                  # (ours, export.Ids) -> the same two
    parts: tuple[Part, ...]
    like: Callable[[Any], bool] = lambda cfg: False                     # whether a model of ours is written as this family
    processor: Callable[[Any], dict] | None = None                      # ours -> processor_config.json
    processor_class: str = ""                                           # of transformers; "" for text alone
    layouts: tuple[tuple[str, str], ...] = ()   # regular expressions that bring other key layouts into that of the table
    memory: tuple[tuple[str, str], ...] = ()    # and that bring the names of the table into those of the class of transformers
    ignore: tuple[str, ...] = ()                # buffers that old files hold: regular expressions
    tokenizers: Mapping[str, str] = field(default_factory=dict)     # folder beside the weights -> where our configuration names it
    variant: str = ""                           # where several architectures have one model_type
    free: tuple[str, ...] = ()                  # fields of our configuration that a checkpoint need not say, globs as in compare

    @property
    def key(self) -> str:
        """Its name here: the `model_type`, and the variant."""
        return "-".join(filter(None, (self.model_type, self.variant)))

    def canonical(self, name: str) -> str:
        """The name in the table of a tensor that a checkpoint or a model in memory calls so."""
        return _renamed(name, self.layouts)

    def in_memory(self, name: str) -> str:
        """What the class of transformers calls a tensor of the table."""
        return _renamed(name, self.memory)

    def links(self, cfg: Any) -> list[Link]:
        """Every pair of a tensor and a parameter, in the order of the table."""
        shapes = parameter_shapes(cfg)
        out: list[Link] = []
        for part in self.parts:
            of = part.of(cfg)
            sizes = {axis: getattr(of, name) for axis, name in (("p", "patch"), ("q", "patch"), ("t", "steps")) if hasattr(of, name)}
            cycle = len(getattr(of, "cycle", "1"))
            for r in part.rows:
                stacked = "{i}" in r.theirs or "{k}" in r.theirs
                for i in range(of.depth) if stacked else [None]:
                    ours = part.ours + (r.ours.replace("blocks/0/", f"blocks/{i % cycle}/") if stacked else r.ours)
                    if ours not in shapes:
                        continue
                    k, shape = (i // cycle, shapes[ours][1:]) if stacked else (None, shapes[ours])
                    if r.how and len(_axes(r.how)) != len(shape):
                        continue
                    out.append(Link(
                        theirs=part.theirs + r.theirs.format(i=i, k=k), ours=ours, layer=k, part=r.part, how=r.how, shape=shape,
                        sizes=sizes if "p q" in r.how else {}))
        if homeless := sorted(shapes.keys() - {x.ours for x in out}):
            raise ConfigError(f"{self.model_type} has no place for {len(homeless)} parameters: {', '.join(homeless[:5])}")
        return out

    def find(self, names: Iterable[str], links: Iterable[Link], where: str) -> dict[str, str]:
        """Name in the table -> name in the checkpoint, for all tensors of it.

        Raises:
          ConfigError: a tensor is missing, or one is not in the table; the message names them.
        """
        found = {self.canonical(n): n for n in names}
        wanted = {x.theirs for x in links}
        if missing := sorted(wanted - found.keys()):
            raise ConfigError(f"{where}: {len(missing)} tensors of {self.model_type} are missing: {', '.join(missing[:5])}")
        extra = [n for n in sorted(found.keys() - wanted) if not any(re.search(p, n) for p in self.ignore)]
        if extra:
            raise ConfigError(f"{where}: {len(extra)} tensors are not in the table of {self.model_type}: {', '.join(extra[:5])}")
        return {n: found[n] for n in wanted}

    def express(self, cfg: Any, ids: Any) -> tuple[dict, dict]:
        """config.json and the preprocessor's configuration of this value of ours.

        Raises:
          CannotExpress: reading them back would give something else, because the family has no such option.
        """
        try:
            theirs = self.hf_config(cfg, ids)
            lost = differences(self.config(*theirs), cfg, self.free)
        except ConfigError as error:
            raise CannotExpress(str(error)) from error
        if lost:
            what = "; ".join(f"{path}={want!r} (it would be {got!r})" for path, (got, want) in lost.items())
            raise CannotExpress(f"the family {self.model_type!r} cannot express {what}")
        return theirs


def differences(a: Any, b: Any, free: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """`compare` of what two configurations mean: (heads keep their default width, ...) and without the free fields."""
    out = compare(_plain(a), _plain(b))
    return {path: pair for path, pair in out.items() if not any(re.fullmatch(p, path) for p in free)}


def parameter_shapes(cfg: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the model; nothing is allocated."""
    return {path: tuple(p.shape) for path, p in split(abstract(cfg))[1].items()}


def _plain(node: Any) -> Any:
    """A configuration with defaults written the same way: None for as many key heads as heads, layers from the end."""
    if isinstance(node, Mapping):
        return {k: _plain(v) for k, v in node.items()}
    if isinstance(node, NestedConfig) and node.windows[0] == 1:
        node = node.origin              # all tokens stand in the row, and the sets behind them are for training
    fields = getattr(node, "__dataclass_fields__", None)
    if fields is None:
        return node
    new = {name: _plain(getattr(node, name)) for name in fields}
    if {"heads", "kv_heads", "head_dim", "width"} <= new.keys():
        new["kv_heads"] = None if new["kv_heads"] == new["heads"] else new["kv_heads"]
        new["head_dim"] = None if new["head_dim"] == new["width"] // new["heads"] else new["head_dim"]
    if "cycle" in new:                  # the shortest that repeats
        turns = new["cycle"]
        n = next(n for n in range(1, len(turns) + 1) if turns == turns[:n] * (len(turns) // n))
        new["cycle"] = turns[:n]
    if "table" in new:
        new["table"] = None if new["table"] == new["grid"] else new["table"]
        new["layer"] = node.run_depth - new["depth"] - 1
    return replace(node, **new)


def _renamed(name: str, layouts: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in layouts:
        name = re.sub(pattern, new, name)
    return name


def _rearrange(x: np.ndarray, how: str, sizes: Mapping[str, int]) -> np.ndarray:
    names = set(re.findall(r"[a-z]+", how.partition("->")[0]))
    return rearrange(x, how, **{k: v for k, v in sizes.items() if k in names}) if how else x


def _axes(how: str) -> list[str]:
    """The axes of ours in a pattern; axes in brackets are one."""
    return re.findall(r"\([^)]*\)|\S+", how.partition("->")[2])


def _named(how: str, shape: tuple[int, ...]) -> dict[str, int]:
    """The sizes of the axes of ours, where each has a name."""
    ours = how.partition("->")[2]
    return {} if "(" in ours else {k: n for k, n in zip(ours.split(), shape) if k != "1"}
