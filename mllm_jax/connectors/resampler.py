"""Learned queries that read the patches of an item by cross-attention.

Perceiver   several layers, whose keys are the patches and then the queries themselves, without biases: Flamingo
            (arXiv:2204.14198, section 3.1), OpenFlamingo, Idefics, Otter
Sincos      one layer of attention and no feed-forward layer; queries and keys know where they stand, values do not:
            Qwen-VL (arXiv:2308.12966, section 2.1), Monkey
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.connectors.items import check_square, join_items, split_items
from mllm_jax.nn import stack
from mllm_jax.nn.attention import attend
from mllm_jax.nn.mlp import ACTIVATIONS
from mllm_jax.nn.param import LayerNorm, Linear, normal, param
from mllm_jax.nn.position import interpolate
from mllm_jax.types import Features, Grid


@config
class PerceiverConfig:
    """The queries have the width of the encoder; a last linear layer stands where the decoder's differs."""

    grid: int                           # side of the encoder's grid
    class_token: bool = False           # the encoder gives its class token too
    frames: int | None = None           # a video: so many grids are one item, each with a learned vector added
    queries: int = 64
    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    expand: int = 4                     # hidden width of the feed-forward layers, in widths
    activation: str = "gelu"
    qk_norm: bool = False
    norm: LayerNorm = LayerNorm()

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "Perceiver":
        return Perceiver(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        if self.class_token and grid == (1, 1, self.grid**2 + 1):
            return 1, 1, self.queries
        frames = check_square(grid, self.grid, "perceiver")
        if self.frames is not None and frames != self.frames:
            raise ConfigError(f"the perceiver reads items of {self.frames} frames; the view gives {frames}: set its frames to {frames}")
        return 1 if self.frames else frames, 1, self.queries

    def tiny(self) -> "PerceiverConfig":
        return replace(self, grid=4, queries=4, depth=2, heads=2, head_dim=8)


class Perceiver(nnx.Module):
    def __init__(self, cfg: PerceiverConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.queries = param(rngs, (cfg.queries, d_in), "query embed", normal(1.0))
        self.frames = param(rngs, (cfg.frames, d_in), "frame embed", normal(1.0)) if cfg.frames else None
        self.blocks = stack.make([lambda r: PerceiverLayer(cfg, d_in, rngs=r)], cfg.depth, rngs=rngs)
        self.norm = cfg.norm.build(d_in, rngs=rngs)
        self.out = Linear(d_in, d_out, "embed mlp", rngs=rngs) if d_out != d_in else None

    def __call__(self, x: Features) -> Features:
        """f[b (i n) d_in] -> f[b (i queries) d_out]."""
        cfg = self.cfg
        patches = cfg.grid**2 + cfg.class_token
        media = split_items(x, patches * (cfg.frames or 1))
        if self.frames is not None:
            media = media + jnp.repeat(self.frames[...], patches, axis=0).astype(media.dtype)
        y = jnp.broadcast_to(self.queries[...].astype(media.dtype), (media.shape[0], *self.queries[...].shape))
        y, _ = stack.run(self.blocks, lambda y, layer, *_: (layer(y, media), None), y, depth=cfg.depth)
        y = self.norm(y)
        return join_items(y if self.out is None else self.out(y), x)


class PerceiverLayer(nnx.Module):
    def __init__(self, cfg: PerceiverConfig, d: int, *, rngs: nnx.Rngs):
        norm = lambda: cfg.norm.build(d, rngs=rngs)
        self.activation = cfg.activation
        self.norm_media, self.norm_queries, self.norm_mlp = norm(), norm(), norm()
        self.attn = Reader(d, cfg.heads, cfg.head_dim, bias=False, qk_norm=cfg.norm if cfg.qk_norm else None, rngs=rngs)
        self.up = Linear(d, cfg.expand * d, "embed mlp", bias=False, rngs=rngs)
        self.down = Linear(cfg.expand * d, d, "mlp embed", bias=False, rngs=rngs)

    def __call__(self, y: jax.Array, media: jax.Array) -> jax.Array:
        """Queries f[n q d] that have read f[n p d], and one another."""
        query = self.norm_queries(y)
        seen = jnp.concatenate([self.norm_media(media), query], axis=1)
        y = y + self.attn(query, seen, seen)
        return y + self.down(ACTIVATIONS[self.activation](self.up(self.norm_mlp(y))))


@config
class SincosResamplerConfig:
    """to x to queries, and the normalized, projected result of one reading."""

    grid: int                           # side of the encoder's grid
    to: int                             # side of the grid of queries
    width: int                          # of queries, keys and values
    heads: int
    norm: LayerNorm = LayerNorm(eps=1e-6)

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "SincosResampler":
        return SincosResampler(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        return check_square(grid, self.grid, "resampler"), self.to, self.to

    def tiny(self) -> "SincosResamplerConfig":
        return replace(self, grid=4, to=2, width=32, heads=2)


class SincosResampler(nnx.Module):
    def __init__(self, cfg: SincosResamplerConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        w = cfg.width
        self.cfg = cfg
        self.queries = param(rngs, (cfg.to**2, w), "query embed", normal(0.02))
        self.fit = Linear(d_in, w, "embed mlp", bias=False, rngs=rngs) if d_in != w else None
        self.norm_queries, self.norm_media, self.norm = (cfg.norm.build(w, rngs=rngs) for _ in range(3))
        self.attn = Reader(w, cfg.heads, w // cfg.heads, bias=True, rngs=rngs)
        self.out = Linear(w, d_out, "embed mlp", bias=False, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        """f[b (i r c) d_in] -> f[b (i to to) d_out]."""
        cfg = self.cfg
        media = split_items(x, cfg.grid**2)
        media = self.norm_media(media if self.fit is None else self.fit(media))
        # The table of the queries, stretched over the patches: a query and the patches of its part have like vectors.
        places = sincos_2d(cfg.to, cfg.width)
        keys = media + interpolate(jnp.asarray(places), cfg.grid).astype(media.dtype)
        query = (self.norm_queries(self.queries[...]) + places).astype(media.dtype)
        y = self.attn(jnp.broadcast_to(query, (media.shape[0], *query.shape)), keys, media)
        return join_items(self.out(self.norm(y)), x)


class Reader(nnx.Module):
    """Multi-head attention whose queries, keys and values come from different places; all see all."""

    def __init__(self, d: int, heads: int, head_dim: int, *, bias: bool, qk_norm: LayerNorm | None = None, rngs: nnx.Rngs):
        into = lambda: Linear(d, (heads, head_dim), "embed heads head_dim", bias=bias, rngs=rngs)
        self.q, self.k, self.v = into(), into(), into()
        self.o = Linear((heads, head_dim), d, "heads head_dim embed", bias=bias, rngs=rngs)
        self.q_norm = qk_norm and qk_norm.build(head_dim, axis="head_dim", rngs=rngs)
        self.k_norm = qk_norm and qk_norm.build(head_dim, axis="head_dim", rngs=rngs)

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """f[n q d], f[n p d], f[n p d] -> f[n q d]."""
        q, k, v = self.q(queries), self.k(keys), self.v(values)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o(attend(q, k, v, None))


def sincos_2d(side: int, d: int) -> np.ndarray:
    """f32[side*side d]: sines and cosines of the column in the first half, of the row in the second."""
    freqs = 10_000.0 ** (-np.arange(d // 4) / (d // 4))
    angle = np.arange(side)[:, None] * freqs
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)            # side, d/2
    return np.concatenate([np.tile(line, (side, 1)), np.repeat(line, side, axis=0)], axis=1)
