"""TrainState: trained, frozen and optimizer parts, and where each lies on the mesh.

Parameters are created sharded: the program that makes them has their shardings as those of its output,
so that no device and no host ever holds a whole model.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.config import ConfigError, nearest
from mllm_jax.nn.param import Params, abstract, axes_of, split
from mllm_jax.sharding import Layout, sharding_of_parameter
from mllm_jax.types import struct


@struct
class TrainState:
    step: jax.Array                     # i32[]
    params: Params                      # trained
    frozen: Params                      # not trained: no gradient, no optimizer state, no decay, no bit changed
    opt_state: optax.OptState
    ema: Params | None                  # moving average of `params`

    def all_params(self, *, ema: bool = False) -> Params:
        """The whole model; with the moving average in place of the trained part where there is one."""
        return {**self.frozen, **(self.ema if ema and self.ema is not None else self.params)}


class Blueprint:
    """A model that is not built: its structure, and shape, axis names and sharding of every parameter."""

    def __init__(self, model_cfg: Any, layout: Layout, mesh: Mesh):
        self.cfg, self.layout, self.mesh = model_cfg, layout, mesh
        module = abstract(model_cfg)
        self.graph, shapes = split(module)
        self.axes = axes_of(module)
        self.shapes = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding_of_parameter(self.axes[k], v.shape, layout, mesh))
            for k, v in shapes.items()
        }

    def init(self, seed: int, given: Params | None = None) -> Params:
        """Fresh parameters, except those that are given."""
        given = given or {}
        missing = {k: v.sharding for k, v in self.shapes.items() if k not in given}

        def make(key: jax.Array) -> Params:
            params = split(self.cfg.build(rngs=nnx.Rngs(key)))[1]
            return {k: params[k] for k in missing}

        fresh = jax.jit(make, out_shardings=missing)(jax.random.key(seed)) if missing else {}
        return {k: fresh[k] if k in fresh else given[k] for k in self.shapes}


def trained_paths(paths: Iterable[str], globs: tuple[str, ...]) -> set[str]:
    """The parameters that some glob names.

    Raises:
      ConfigError: a glob names none.
    """
    paths = list(paths)
    chosen: set[str] = set()
    for glob in globs:
        matched = {p for p in paths if fnmatch(p, glob)}
        if not matched:
            folders = {p.rsplit("/", 1)[0] + "/*" for p in paths}
            raise ConfigError(f"train names {glob!r}, which matches no parameter; nearest: {nearest(glob, sorted(folders))}")
        chosen |= matched
    return chosen


def make_state(params: Params, trained: set[str], optimizer: optax.GradientTransformation, blueprint: Blueprint,
               *, ema: bool = False) -> TrainState:
    """The state before the first step."""
    ours = {k: v for k, v in params.items() if k in trained}
    rest = {k: v for k, v in params.items() if k not in trained}
    abstract = jax.eval_shape(optimizer.init, ours)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings(abstract, blueprint))(ours)
    copies = jax.tree.map(jnp.copy, ours) if ema else None
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(blueprint.mesh, PartitionSpec()))
    return TrainState(step=step, params=ours, frozen=rest, opt_state=opt_state, ema=copies)


def abstract_state(blueprint: Blueprint, trained: set[str], optimizer: optax.GradientTransformation,
                   *, ema: bool = False) -> TrainState:
    """Shapes and shardings of `make_state`'s result, without making anything."""
    ours = {k: v for k, v in blueprint.shapes.items() if k in trained}
    rest = {k: v for k, v in blueprint.shapes.items() if k not in trained}
    state = TrainState(step=jax.ShapeDtypeStruct((), jnp.int32), params=ours, frozen=rest,
                       opt_state=jax.eval_shape(optimizer.init, ours), ema=ours if ema else None)
    where = shardings(state, blueprint)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)


def shardings(tree: Any, blueprint: Blueprint) -> Any:
    """The sharding of every leaf: that of the parameter it belongs to and has the shape of, or replicated.

    A leaf that has a dimension less, as factored moments do, is split as the others of the parameter are.
    """
    everywhere = NamedSharding(blueprint.mesh, PartitionSpec())

    def one(path: tuple, leaf: jax.Array) -> NamedSharding:
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in blueprint.shapes]
        known = blueprint.shapes[names[-1]] if names else None
        if known is None or known.shape == leaf.shape:
            return everywhere if known is None else known.sharding
        for k in reversed(range(len(known.shape))):
            if (*known.shape[:k], *known.shape[k + 1:]) == leaf.shape:
                rest = [part for j, part in enumerate(known.sharding.spec) if j != k]
                return NamedSharding(blueprint.mesh, PartitionSpec(*rest))
        return everywhere

    return jax.tree_util.tree_map_with_path(one, tree)


def under(params: Mapping[str, Any], subtree: str) -> dict[str, str]:
    """{path inside the subtree: whole path}; `*` or an empty subtree is the whole model."""
    if subtree in ("", "*"):
        return {k: k for k in params}
    subtree = subtree.rstrip("/*")
    inside = {k[len(subtree) + 1:]: k for k in params if k.startswith(subtree + "/")}
    return inside | ({"": subtree} if subtree in params else {})


