"""Import: the tensors of a Hugging Face folder, one at a time, into the shards of our parameters.

A host looks only at the layers and pages that its devices hold; what it keeps beside the result is its share
of one parameter.  The target may be a part of the model in the folder (the image tower of CLIP, the language
model of LLaVA), and may have more rows of vocabulary.
"""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.hf.families import describe
from mllm_jax.hf.family import LEAVES_OF_LORA, Family, Link, differences, parameter_shapes
from mllm_jax.hf.hub import folder_of
from mllm_jax.hf.tensors import NATIVE, tensors_of
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.experts import dense
from mllm_jax.nn.lora import LoRA

log = logging.getLogger(__name__)

VOCAB_AXIS = {"embedding/table": 0, "head": 1}
ADDED = {"embedding/added": "embedding/table", "head_added": "head"}    # rows of later tokens, and of the tokens before
# What the user of a checkpoint may choose otherwise than the checkpoint says. The vocabulary may grow, and
# what shapes tell (positions, pooling) is checked there.
FREE = (r"(.*\.)?(layer|keep_class|final_norm|pool|vocab|positions|grid|table)", r"(.*\.)?view(\..*)?", "scale", "bias")


def load(
    source: str | Path,
    cfg: Any = None,
    *,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: Any = jnp.float32,
    part: str | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """(configuration, {path: parameter}) of a folder or of hf://org/name.

    Args:
      cfg: the model to load into, where it is not simply that of the checkpoint.
      shardings: of some or all parameters; the others go to the first device.
      dtype: of the parameters; None keeps what is stored.
      part: a part of the model alone, by its path in ours: `inputs/image/encoder`, `decoder`, `text`, ...

    Raises:
      ConfigError: nothing to load, something that is not supported, or a tensor missing, unknown or of a wrong shape.
    """
    folder = folder_of(source)
    family, theirs = describe(folder)
    if part is not None:
        known = {p.ours.rstrip("/"): p.of(theirs) for p in family.parts if p.ours}
        if part.rstrip("/") not in known:
            raise ConfigError(f"{source} is a {family.model_type} and has no part {part!r}; it has {', '.join(known) or 'none'}")
        theirs = known[part.rstrip("/")]
    cfg = theirs if cfg is None else cfg
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32 if dtype is None else dtype, sharding=(shardings or {}).get(path))
              for path, shape in parameter_shapes(cfg).items()}
    return cfg, _load(folder, str(source), cfg, shapes, keep=dtype is None)


def load_subtree(source: str | Path, cfg: Any, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Parameters for a model or a part of one (an encoder, a decoder, a connector), from a folder or hf://org/name.

    Args:
      cfg: configuration of the part; its kind says which part of the checkpoint is meant.
      shapes: path below the part -> shape, dtype and sharding of what is wanted.  What is no part of a checkpoint is left
        out of what is returned: adapters (`.../lora/a`, `.../lora/b`), and what a model has beyond its `origin`.  Experts
        of a model that grew from a dense one are copies of its feed-forward layers.

    Raises:
      ConfigError: as `load`; and where an option of `cfg` is not that of the checkpoint.
    """
    return _load(folder_of(source), str(source), cfg, shapes, origin=getattr(cfg, "origin", None))


def _load(
    folder: Path, where: str, cfg: Any, shapes: Mapping[str, jax.ShapeDtypeStruct], *, keep: bool = False, origin: Any = None,
) -> dict[str, jax.Array]:
    family, theirs = describe(folder)
    cfg = cfg.model if isinstance(cfg, LoRA) else cfg
    if isinstance(cfg, TowerConfig) and cfg.route == "pool":    # of a dual encoder: such a tower is its encoder
        cfg = cfg.encoder
    shapes = {path: s for path, s in shapes.items() if not path.endswith(LEAVES_OF_LORA)}
    prefix, part = _alike(family, theirs, (type(cfg), type(origin)), where)
    wrong = _unlike(part, cfg)
    grown = bool(wrong) and origin is not None      # the checkpoint may be of the model that this one grew from
    if grown:
        wrong = _unlike(part, origin)
    if wrong:
        what = "; ".join(f"{path} is {a!r} in the checkpoint and {b!r} in the model" for path, (a, b) in wrong.items())
        raise ConfigError(f"{where}: {what}; change the configuration of the model to that of the checkpoint")
    read, links = reader(folder, where, family, theirs)
    turns = [len(getattr(x, "cycle", "1")) for x in (part, cfg)]
    there: dict[str, list[tuple[int | None, Link]]] = {}
    for link in links:
        path, layer = _place(link, *turns)
        if path.startswith(prefix):
            there.setdefault(path.removeprefix(prefix), []).append((layer, link))
    # Experts that the checkpoint does not have begin as copies of its dense layer.
    copies = {path for path in shapes.keys() - there.keys() if dense(path) in there}
    mine = {path: there[dense(path) if path in copies else path] for path in shapes if path in there or path in copies}
    # A head of its own begins as the embedding that it was tied to.
    tables = {path: path.removesuffix("head") + "embedding/table" for path in shapes.keys() - mine.keys() if path.split("/")[-1] == "head"}
    untied = {path: there[table] for path, table in tables.items() if table in there}
    added = {path: path.removesuffix(new) + old for path in shapes.keys() - mine.keys() for new, old in ADDED.items() if path.endswith(new)}
    if grown:
        shapes = {path: s for path, s in shapes.items() if path in mine or path in added or path in untied}
    elif missing := sorted(shapes.keys() - mine.keys() - added.keys() - untied.keys()):
        raise ConfigError(f"{where} ({family.model_type}) has nothing for {len(missing)} parameters: {', '.join(missing[:5])}")
    out = {}
    for path, want in shapes.items():
        if path in added:
            [(_, link)] = there[added[path]]
            log.info("%s: the tokens of %s are new, and the mean of those of %s", where, path, link.theirs)
            out[path] = _fill(_of_type(want, read(link).dtype) if keep else want, there[added[path]], _mean(read, want.shape))
            continue
        if path in untied:
            [(_, link)] = untied[path]
            log.info("%s: %s is its own here, and begins as %s", where, path, link.theirs)
            _growth(path, link.shape[::-1], want.shape, where, link.theirs)
            out[path] = _fill(_of_type(want, read(link).dtype) if keep else want, untied[path], lambda link: read(link).T)
            continue
        stack = mine[path]
        layer, link = stack[0]
        have = link.shape if layer is None else (min(len(stack), want.shape[0]), *link.shape)
        if path in copies:
            log.info("%s: the %d experts of %s are copies of %s", where, want.shape[1], path, link.theirs)
            have = (have[0], want.shape[1], *have[1:])
        if grown := _growth(path, have, want.shape, where, link.theirs):
            log.info("%s: %s grows from %d to %d tokens; the new ones are the mean of the old", where, path, *grown)
        out[path] = _fill(_of_type(want, read(link).dtype) if keep else want, stack, read, inner=2 if path in copies else 1)
    return out


def _unlike(part: Any, cfg: Any) -> dict[str, tuple[Any, Any]]:
    """Where the part of a checkpoint is not what the model wants.

    Tokens that are new there are no difference, nor are last layers of an encoder that nobody would run, nor a head of its own.
    """
    encoder, depth = (cfg.encoder, "encoder.depth") if isinstance(cfg, TowerConfig) else (cfg, "depth")
    unread = isinstance(encoder, ViTConfig) and encoder.pool == "none"
    untied = lambda k, pair: k.split(".")[-1] == "head" and pair == ("tied", "own")
    fine = lambda k, pair: k.endswith("added") and pair[0] == 0 or unread and k == depth and pair[0] > pair[1] or untied(k, pair)
    return {k: pair for k, pair in differences(part, cfg, FREE).items() if not fine(k, pair)}


def _place(link: Link, theirs: int, ours: int) -> tuple[str, int | None]:
    """(path, entry of the stack) of a link where layers take turns in a cycle of `ours` and not of `theirs`."""
    if link.layer is None or theirs == ours:
        return link.ours, link.layer
    head, j, tail = re.fullmatch(r"(.*\bblocks/)(\d+)(/.*)", link.ours).groups()
    i = link.layer * theirs + int(j)
    return f"{head}{i % ours}{tail}", i // ours


def reader(folder: Path, where: str, family: Family, cfg: Any) -> tuple[Callable[[Link], np.ndarray], list[Link]]:
    """A function from a link to its array in our layout, a view of the disk; and all links of the folder."""
    stored, links = tensors_of(folder), family.links(cfg)
    if (folder / NATIVE).exists():
        if odd := sorted(stored.keys() ^ {x.ours for x in links}):
            raise ConfigError(f"{where}: {NATIVE} and config.json differ in {len(odd)} parameters: {', '.join(odd[:5])}")
        read = lambda link: stored[link.ours].view() if link.layer is None else stored[link.ours].view()[link.layer, ...]
        shape_of = lambda link: stored[link.ours].shape[link.layer is not None :]
        wanted = lambda link: link.shape
    else:
        names = family.find(stored, links, where)
        read = lambda link: link.to_ours(stored[names[link.theirs]].view())
        shape_of = lambda link: stored[names[link.theirs]].shape
        wanted = lambda link: link.their_shape
    for link in links:
        if shape_of(link) != wanted(link):
            raise ConfigError(f"{where}: {link.theirs} is {_x(shape_of(link))}; config.json promises {_x(wanted(link))}")
    return read, links


def _of_type(want: jax.ShapeDtypeStruct, dtype: np.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(want.shape, dtype, sharding=want.sharding)


def _alike(family: Family, theirs: Any, kinds: tuple[type, ...], where: str) -> tuple[str, Any]:
    """The part of the checkpoint that is of one of these kinds: prefix of its parameters, and its configuration."""
    if type(theirs) in kinds:
        return "", theirs
    if isinstance(theirs, MLLMConfig) and TowerConfig in kinds:
        return "inputs/image/", theirs.inputs["image"]
    for part in family.parts:
        if type(part.of(theirs)) in kinds:
            return part.ours, part.of(theirs)
    known = ", ".join(sorted({type(p.of(theirs)).__name__ for p in family.parts}))
    raise ConfigError(f"{where} is a {family.model_type} and holds no {kinds[0].__name__}; it holds {known}")


def _growth(path: str, have: tuple, want: tuple, where: str, theirs: str) -> tuple[int, int] | None:
    """(old, new) size of a vocabulary that grows, None where nothing does; any other difference is an error."""
    if have == want:
        return None
    axis = next((a for name, a in VOCAB_AXIS.items() if path == name or path.endswith("/" + name)), None)
    if axis is not None and len(have) == len(want) == 2 and have[1 - axis] == want[1 - axis]:
        if have[axis] < want[axis]:
            return have[axis], want[axis]
        raise ConfigError(f"{where}: {theirs} has {have[axis]} tokens and the model {want[axis]}; set the vocabulary of "
                          f"the model to at least {have[axis]}")
    raise ConfigError(f"{where}: {theirs} becomes {path} of {_x(have)}; the model has {_x(want)}")


def _fill(
    want: jax.ShapeDtypeStruct, stack: list[tuple[int | None, Link]], read: Callable[[Link], np.ndarray], inner: int = 1,
) -> jax.Array:
    """One parameter on its devices; each tensor is looked at once, for all the shards of this host.

    A tensor of a layer is what follows the first `inner` axes of a stacked parameter; along the others of them it is repeated.
    """
    sharding = want.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    key = lambda index: tuple(s.indices(n)[:2] for s, n in zip(index, want.shape))
    places = {key(i) for i in sharding.addressable_devices_indices_map(want.shape).values()}
    shards = {k: np.empty([b - a for a, b in k], want.dtype) for k in places}
    for layer, link in stack:
        if layer is None:
            piece = _grown(read(link), want.shape)
            for k, shard in shards.items():
                shard[...] = piece(k)
        elif inside := [k for k in shards if k[0][0] <= layer < k[0][1]]:
            x = read(link)
            for k in inside:
                shards[k][layer - k[0][0]] = x[tuple(slice(a, b) for a, b in k[inner:])]
    return jax.make_array_from_callback(want.shape, sharding, lambda index: shards[key(index)], dtype=want.dtype)


def _grown(x: np.ndarray, shape: tuple[int, ...]) -> Callable[[tuple], np.ndarray]:
    """A function from [(begin, end), ...] to that piece of x, whose one shorter axis is continued by its mean."""
    cut = lambda k: x[tuple(slice(a, b) for a, b in k)]
    if x.shape == shape:
        return cut
    axis = next(a for a in range(x.ndim) if x.shape[a] != shape[a])
    mean = x.mean(axis, dtype=np.float32, keepdims=True)

    def piece(k: tuple) -> np.ndarray:
        new = k[axis][1] - max(k[axis][0], x.shape[axis])
        tail = mean[tuple(slice(None) if a == axis else slice(*r) for a, r in enumerate(k))]
        return np.concatenate([cut(k), np.repeat(tail, max(new, 0), axis)], axis)

    return piece


def _mean(read: Callable[[Link], np.ndarray], shape: tuple[int, ...]) -> Callable[[Link], np.ndarray]:
    """A function to an array of this shape whose tokens are all the mean of those that `read` gives."""
    def one(link: Link) -> np.ndarray:
        x, axis = read(link), next(a for name, a in VOCAB_AXIS.items() if link.ours.endswith(name))
        return np.broadcast_to(x.mean(axis, dtype=np.float32, keepdims=True), shape)

    return one


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
