"""The transformer layer that encoders and decoders share, with its norms where a model has them.

    "before"    x + f(norm(x))              ViT, Llama (arXiv:2002.04745)
    "after"     x + norm(f(x))              EVA-02-CLIP-E, Swin v2
    "both"      x + norm(f(norm(x)))        Gemma 2 and 3
    "outside"   norm(x + f(x))              BERT, the first transformer (arXiv:1706.03762)
    "parallel"  x + f(norm(x)) + g(norm(x)) Phi, GPT-J: one norm, and both halves read it

f is attention, and then the feed-forward layer, which another module may take the place of (experts).
"""

from typing import Any

import jax
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.nn.attention import Attention, LayerCache
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.mlp import MLP
from mllm_jax.nn.param import param
from mllm_jax.nn.position import Rotation
from mllm_jax.nn.visibility import Visibility
from mllm_jax.types import Mean

NORMS = ("before", "after", "both", "outside", "parallel")


class Block(nnx.Module):
    def __init__(self, cfg: BlockConfig, *, mlp: Any = None, rngs: nnx.Rngs):
        """`mlp` is a value whose `build(cfg, rngs=)` gives a layer f[b s d], mask, draws -> f[b s d], auxiliary losses."""
        if cfg.norms not in NORMS:
            raise ConfigError(f"norms={cfg.norms!r}; a layer has its norms {', '.join(NORMS)}")
        self.norms, self.sparse = cfg.norms, mlp is not None
        norm = lambda: cfg.norm.build(cfg.width, rngs=rngs)
        self.norm1 = norm()
        self.attn = Attention(cfg, rngs=rngs)
        self.norm1_after = norm() if cfg.norms == "both" else None
        scale = lambda: None if cfg.layer_scale is None else LayerScale(cfg.width, cfg.layer_scale, rngs=rngs)
        self.scale1 = scale()
        self.norm2 = norm() if cfg.norms != "parallel" else None
        self.mlp = MLP(cfg, rngs=rngs) if mlp is None else mlp.build(cfg, rngs=rngs)
        self.norm2_after = norm() if cfg.norms == "both" else None
        self.scale2 = scale()

    def __call__(
        self,
        x: jax.Array,
        visibility: Visibility | None = None,
        *,
        window: int | None = None,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        mask: jax.Array | None = None,
        draws: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None, dict[str, Mean]]:
        """f[b s d] -> (f[b s d], the cache with new keys and values, auxiliary losses).

        `mask` bool[b s] says which positions are real, and `draws` u32[b] are random bits for training; only layers
        that route tokens read them.
        """
        z = self._before(self.norm1, x)
        y, cache = self.attn(z, visibility, window=window, rotation=rotation, cache=cache)
        x = self._join(x, y if self.scale1 is None else self.scale1(y), self.norm1, self.norm1_after)
        z = z if self.norms == "parallel" else self._before(self.norm2, x)
        y, aux = self.mlp(z, mask, draws) if self.sparse else (self.mlp(z), {})
        return self._join(x, y if self.scale2 is None else self.scale2(y), self.norm2, self.norm2_after), cache, aux

    def _before(self, norm: nnx.Module, x: jax.Array) -> jax.Array:
        return norm(x) if self.norms in ("before", "both", "parallel") else x

    def _join(self, x: jax.Array, y: jax.Array, norm: nnx.Module, after: nnx.Module | None) -> jax.Array:
        if self.norms == "outside":
            return norm(x + y)
        return x + (norm(y) if self.norms == "after" else y if after is None else after(y))


class LayerScale(nnx.Module):
    """f[... d] -> f[... d], each value times a number of its own."""

    def __init__(self, d: int, begin: float, *, rngs: nnx.Rngs):
        self.scale = param(rngs, (d,), "embed", jax.nn.initializers.constant(begin))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale[...].astype(x.dtype)
