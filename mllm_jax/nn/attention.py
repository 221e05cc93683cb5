"""Multi-head attention with grouped queries and a cache; the dot product behind one function.

`attend` is where a platform's kernel is chosen.  It is given the two integer arrays of a `Visibility`
and not a mask, so that a kernel that knows segments never sees one: nn/flash.py on TPU.  cuDNN's, on GPU, takes a mask of
each row, the same for all heads; the call was lowered for CUDA, with what it is given checked on a CPU, and has not run on a
GPU yet.  Elsewhere long rows are read block by block.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.nn import context
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.blockwise import LONG, attend_blockwise
from mllm_jax.nn.flash import attend_flash
from mllm_jax.nn.position import Rotation
from mllm_jax.nn.quantized import LayerLinear
from mllm_jax.nn.remat import keep
from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import constrain, current, platform
from mllm_jax.types import struct

KERNELS = {"tpu": "flash", "gpu": "cudnn"}      # platform -> the kernel it has beside those of XLA
SHORT = 128                             # fewer queries or keys than that make scores that XLA can keep
Keys = tuple[jax.Array, jax.Array]      # keys and values, each f[b t g k]


@struct
class LayerCache:
    """Keys and values of all layers, and where one layer writes the next ones."""

    k: jax.Array                        # f[l b t g k]
    v: jax.Array                        # f[l b t g k]
    layer: jax.Array                    # i32[]
    index: jax.Array                    # i32[]: position of the first new token
    memory: Keys | None = None          # of what this layer reads beside the row, once it has seen it

    def write(self, k: jax.Array, v: jax.Array) -> "LayerCache":
        at = (self.layer, 0, self.index, 0, 0)
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
        return replace(self, k=put(self.k, k), v=put(self.v, v))

    def read(self) -> Keys:
        """f[b t g k], f[b t g k] of this layer."""
        return tuple(jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in (self.k, self.v))


class Attention(nnx.Module):
    """Attention of `x` over itself, or over `memory`."""

    def __init__(self, cfg: BlockConfig, *, d_memory: int | None = None, rngs: nnx.Rngs):
        d, h, g, k = cfg.width, cfg.heads, cfg.kv_heads or cfg.heads, cfg.head_dim or cfg.width // cfg.heads
        self.q = LayerLinear(d, (h, k), "embed heads head_dim", bias=cfg.qkv_bias, rngs=rngs)
        self.k = LayerLinear(d_memory or d, (g, k), "embed kv_heads head_dim", bias=cfg.qkv_bias and cfg.key_bias, rngs=rngs)
        self.v = LayerLinear(d_memory or d, (g, k), "embed kv_heads head_dim", bias=cfg.qkv_bias, rngs=rngs)
        self.o = LayerLinear((h, k), d, "heads head_dim embed", bias=cfg.out_bias, rngs=rngs)
        self.query_scale = k**-0.5 if cfg.query_scale is None else cfg.query_scale
        self.whole = cfg.qk_norm == "width"
        norm = lambda n: cfg.norm.build(n * k if self.whole else k, axis="embed" if self.whole else "head_dim", rngs=rngs)
        self.q_norm = norm(h) if cfg.qk_norm else None
        self.k_norm = norm(g) if cfg.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        visibility: Visibility | None = None,
        *,
        memory: jax.Array | Keys | None = None,
        window: int | None = None,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """f[b s d] -> f[b s d] and the cache with the new keys and values; no visibility: all see all.

        `memory` f[b t d] is attended to instead of x; it may be given as its `keys`, kept from before.
        With a `window` a position sees only so many of the last ones, itself among them.
        """
        memory = x if memory is None else memory
        keys = memory if isinstance(memory, tuple) else self.keys(memory)
        y, cache = self.mix(self.queries(x), keys, visibility, window=window, rotation=rotation, cache=cache)
        return keep(self.o(y), "out"), cache

    def mix(
        self, q: jax.Array, keys: Keys, visibility: Visibility | None = None, *, window: int | None = None,
        rotation: Rotation | None = None, cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Queries f[b s h k] and keys -> f[b s h k], before the output matrix, and the cache."""
        k, v = keys
        if cache is not None:
            if rotation is not None:
                q, k, rotation = rotation(q), rotation(k), None
            cache = cache.write(k, v)
            k, v = cache.read()
        return attend(q, k, v, visibility, scale=self.query_scale, window=window, rotation=rotation), cache

    def queries(self, x: jax.Array) -> jax.Array:
        """f[b s d] -> f[b s h k], not rotated yet."""
        return self._normed(self.q_norm, _kept(self.q, x))

    def keys(self, x: jax.Array) -> Keys:
        """f[b t d] -> keys, not rotated yet, and values."""
        return self._normed(self.k_norm, _kept(self.k, x)), _kept(self.v, x)

    def _normed(self, norm: nnx.Module | None, x: jax.Array) -> jax.Array:
        """f[b s h k], as the norm of queries or keys makes it."""
        if norm is None:
            return x
        return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape) if self.whole else norm(x)


def _kept(projection: LayerLinear, x: jax.Array) -> jax.Array:
    """f[b s d] -> f[b s h k], kept as the product leaves it: arrays with heads for an axis lie in other tiles."""
    return projection.unfold(keep(projection.flat(x), "qkv"))


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility | None, *, scale: float | None = None, window: int | None = None,
    rotation: Rotation | None = None,
) -> jax.Array:
    """f[b s h k], f[b t g k], f[b t g k] -> f[b s h k]; scores and softmax in float32.  A `rotation` is that of queries and keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    own = kernel() if min(q.shape[1], k.shape[1]) >= SHORT else "xla"
    way = context.way(q, k, visibility)
    flash = own == "flash" and (visibility is None or isinstance(visibility.start, int))
    if flash and way != "heads":
        return attend_flash(q, k, v, visibility, scale=scale, window=window, rotation=rotation)
    if rotation is not None:
        q, k = rotation(q), rotation(k)
    if flash:
        return context.by_heads(partial(attend_flash, scale=scale, window=window, heads="row_heads"), q, k, v, visibility)
    core = lambda q, k, v, sees: _attend(own, q, k, v, sees, scale, window)
    core = core if way is None else partial(context.by_heads if way == "heads" else context.by_keys, core)
    return keep(core(q, k, v, visibility), "attention")


def _attend(own: str, q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility | None, scale: float, window: int | None) -> jax.Array:
    """`attend` by cuDNN, or by what XLA has."""
    if own == "cudnn" and fits_cudnn(q, k, masked=visibility is not None):
        mask = None if visibility is None else constrain(visibility.mask(window)[:, None], "batch - - -")
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    if visibility is not None and q.shape[1] * k.shape[1] > LONG * LONG:
        return attend_blockwise(q, k, v, visibility, scale=scale, window=window)
    q = rearrange(q * scale, "b s (g r) k -> b g r s k", g=k.shape[2])
    scores = jnp.einsum("bgrsk,btgk->bgrst", q, k, preferred_element_type=jnp.float32)
    if visibility is not None:
        # Finite, so that a padding row, which sees nobody, gives a mean and not NaN.
        scores = jnp.where(visibility.mask(window)[:, None, None], scores, -1e30)
    out = jnp.einsum("bgrst,btgk->bsgrk", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return rearrange(out, "b s g r k -> b s (g r) k")


def kernel() -> str:
    """What computes attention where the program will run: "xla", or the kernel of that platform.

    Raises:
      ConfigError: the layout asks for a kernel that the platform lacks.
    """
    chosen, own = current().attention, KERNELS.get(platform(), "xla")
    if chosen not in ("auto", "xla", own):
        raise ConfigError(f"the layout asks for attention by {chosen!r}, which {platform()} lacks; choose 'auto' or one of {sorted({'xla', own})}")
    return own if chosen == "auto" else chosen


def fits_cudnn(q: jax.Array, k: jax.Array, *, masked: bool) -> bool:
    """Whether cuDNN takes such queries and keys: what it says itself, and no masks above 128 MiB a row."""
    (s, t), width = (q.shape[1], k.shape[1]), q.shape[-1]
    sizes = width % 8 == 0 and width <= 128 and q.dtype in (jnp.bfloat16, jnp.float16)
    return sizes and not (masked and (s % 2 or t % 2 or s * t > 8192 * 8192))
