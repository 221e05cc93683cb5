"""Parameters with named axes, the layers that are nothing but parameters, and modules as flat dictionaries.

A module's parameters travel through training, checkpoints and conversion as `{path: array}`, with
paths such as `decoder/blocks/0/attn/q/kernel`.  Globs select parts of it, `|` joins them, and nothing
needs to know the shape of the tree.  `split` and `merge` go between the two.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import config
from mllm_jax.nn.fusion import once_back, project
from mllm_jax.nn.lookup import lookup
from mllm_jax.sharding import compute_dtype

Params = dict[str, jax.Array]

zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
normal = jax.nn.initializers.normal


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: str, init) -> nnx.Param:
    """A float32 parameter whose axes have names, one word for each dimension."""
    names = tuple(axes.split())
    if len(names) != len(shape):
        raise ValueError(f"axes {axes!r} name {len(names)} dimensions; the shape {shape} has {len(shape)}")
    return nnx.Param(init(next_key(rngs), shape, jnp.float32), axes=names)


def next_key(rngs: nnx.Rngs) -> jax.Array:
    """What `rngs.params()` gives.

    That sets its count by an index, for which nnx asks the count for its sharding; a traced one answers with an error whose text
    takes longer to write than all else that a layer's making does, the more so the more was traced before.
    """
    stream = rngs.params
    count = stream.count.get_value()
    stream.count.set_value(count + 1)
    return jax.random.fold_in(stream.key.get_value(), count)


def abstract(cfg: Any) -> nnx.Module:
    """The model of a configuration with shapes in place of arrays.  Do not change it: the last ones made are kept, for those who ask again."""
    for known, module in _ABSTRACT:
        if known == cfg:
            return module
    module = jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    _ABSTRACT.append((cfg, module))
    return module


_ABSTRACT: collections.deque[tuple[Any, nnx.Module]] = collections.deque(maxlen=8)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module as its structure and its parameters; works on abstract modules too."""
    graph, state = nnx.split(module)
    return graph, {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)}


def merge(graph: nnx.GraphDef, params: Mapping[str, jax.Array]) -> nnx.Module:
    """The inverse of `split`."""
    tree: dict = {}
    for path, value in params.items():
        *parents, last = (int(k) if k.isdigit() else k for k in path.split("/"))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return nnx.merge(graph, tree)


def axes_of(module: nnx.Module) -> dict[str, tuple[str, ...]]:
    """The axis names of every parameter.  A stacked layer has one more leading axis than it has names."""
    return {"/".join(map(str, path)): v.get_metadata()["axes"] for path, v in nnx.to_flat_state(nnx.state(module))}


class Linear(nnx.Module):
    """x[..., *d_in] -> [..., *d_out]; `axes` names the dimensions of the kernel, inputs first."""

    def __init__(self, d_in: int | tuple[int, ...], d_out: int | tuple[int, ...], axes: str, *, bias: bool = True, rngs: nnx.Rngs):
        d_in = (d_in,) if isinstance(d_in, int) else d_in
        d_out = (d_out,) if isinstance(d_out, int) else d_out
        self.inputs = len(d_in)
        self.kernel = param(rngs, d_in + d_out, axes, normal(math.prod(d_in) ** -0.5))
        self.bias = param(rngs, d_out, " ".join(axes.split()[self.inputs:]), zeros) if bias else None
        self.lora = nnx.data(None)          # a low-rank change of the kernel, put here by nn/lora.py

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.unfold(self.flat(x))

    def flat(self, x: jax.Array) -> jax.Array:
        """The same with one axis for all that comes out: f[... n]."""
        dtype, lead = compute_dtype(), x.shape[: x.ndim - self.inputs]
        y = self.product(x.astype(dtype)).reshape(*lead, -1)
        if self.lora is not None:
            y = y + self.lora(x.astype(dtype)).reshape(y.shape)
        return y if self.bias is None else y + self.bias[...].astype(dtype).reshape(-1)

    def unfold(self, y: jax.Array) -> jax.Array:
        """f[... n] of `flat` with the axes of the kernel."""
        return y.reshape(*y.shape[:-1], *self.kernel.shape[self.inputs:])

    def product(self, x: jax.Array) -> jax.Array:
        return project(x, self.kernel[...].astype(x.dtype), self.inputs)


class Embedding(nnx.Module):
    """Token ids i32[...] -> f[... d]; ids from `vocab` on are rows of a second table, which may train while the first is frozen."""

    def __init__(self, vocab: int, d: int, *, added: int = 0, std: float = 0.02, rngs: nnx.Rngs):
        self.table = param(rngs, (vocab, d), "vocab embed", normal(std))
        self.added = param(rngs, (added, d), "vocab embed", normal(std)) if added else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        if self.added is None:
            return lookup(self.table[...], tokens, "vocab", compute_dtype())
        n = self.table.shape[0]
        old = lookup(self.table[...], jnp.minimum(tokens, n - 1), "vocab", compute_dtype())
        new = lookup(self.added[...], jnp.maximum(tokens - n, 0), "vocab", compute_dtype())
        return jnp.where(tokens[..., None] < n, old, new)


@config
class LayerNorm:
    """Normalization by mean and variance, with scale and bias, in float32."""

    eps: float = 1e-5

    def build(self, d: int, *, axis: str = "embed", rngs: nnx.Rngs) -> "LayerNormLayer":
        return LayerNormLayer(self, d, axis, rngs=rngs)


@config
class RMSNorm:
    """Normalization by the root mean square (arXiv:1910.07467), in float32; `offset` 1 is Gemma's (1 + scale)."""

    eps: float = 1e-6
    offset: float = 0.0

    def build(self, d: int, *, axis: str = "embed", rngs: nnx.Rngs) -> "RMSNormLayer":
        return RMSNormLayer(self, d, axis, rngs=rngs)


Norm = LayerNorm | RMSNorm


class LayerNormLayer(nnx.Module):
    def __init__(self, cfg: LayerNorm, d: int, axis: str, *, rngs: nnx.Rngs):
        self.eps = cfg.eps
        self.scale = param(rngs, (d,), axis, ones)
        self.bias = param(rngs, (d,), axis, zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return once_back((y * self.scale[...] + self.bias[...]).astype(x.dtype))


class RMSNormLayer(nnx.Module):
    def __init__(self, cfg: RMSNorm, d: int, axis: str, *, rngs: nnx.Rngs):
        self.eps, self.offset = cfg.eps, cfg.offset
        self.scale = param(rngs, (d,), axis, jax.nn.initializers.constant(1.0 - cfg.offset))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return once_back((y * (self.offset + self.scale[...])).astype(x.dtype))
