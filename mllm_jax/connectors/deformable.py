"""D-Abstractor: queries on a grid look at a few points near their place, by deformable attention (Honeybee,
arXiv:2312.06742, section 3.2; Deformable DETR, arXiv:2010.04159, eq. 2).

A query stands for a part of the image: the average over its window is its position, its place on the image (a point
that is learned) is where it looks, and from there it learns offsets and weights.  Interpolating at a point is a product
with two hat functions, one along the rows and one along the columns, which are zero outside of the image; so looking is
a matrix over the patches and nothing is gathered.  Norms stand after the sums.  The official code trains with the
dropout of DETR, 0.1; there is none here.
"""

from dataclasses import replace
from math import pi

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from mllm_jax.config import config
from mllm_jax.connectors.items import check_square, join_items, split_items
from mllm_jax.connectors.pool import average_weights, resample
from mllm_jax.connectors.resampler import Reader
from mllm_jax.nn import stack
from mllm_jax.nn.param import LayerNorm, Linear, normal, param
from mllm_jax.types import Features, Grid


@config
class DAbstractorConfig:
    grid: int                           # side of the encoder's grid
    to: int                             # side of the grid of queries
    width: int = 1024
    depth: int = 6
    heads: int = 8
    points: int = 4                     # that a head of a query looks at
    mlp: int = 1024                     # hidden width of the feed-forward layers
    norm: LayerNorm = LayerNorm()

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "DAbstractor":
        return DAbstractor(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        return check_square(grid, self.grid, "D-Abstractor"), self.to, self.to

    def tiny(self) -> "DAbstractorConfig":
        return replace(self, grid=4, to=2, width=32, depth=2, heads=2, mlp=32)


class DAbstractor(nnx.Module):
    def __init__(self, cfg: DAbstractorConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        w = cfg.width
        self.cfg = cfg
        self.fit = Linear(d_in, w, "embed mlp", rngs=rngs) if d_in != w else None
        self.position = param(rngs, (cfg.grid**2, w), "position embed", normal(0.02))
        self.queries = param(rngs, (cfg.to**2, w), "query embed", normal(1.0))
        self.points = param(rngs, (cfg.to**2, 2), "query xy", lambda *_: jnp.asarray(middles(cfg.grid, cfg.to)))
        self.blocks = stack.make([lambda r: DeformableLayer(cfg, rngs=r)], cfg.depth, rngs=rngs)
        self.out = Linear(w, d_out, "embed mlp", rngs=rngs) if d_out != w else None

    def __call__(self, x: Features) -> Features:
        """f[b (i r c) d_in] -> f[b (i to to) d_out]."""
        cfg = self.cfg
        media = split_items(x, cfg.grid**2)
        media = (media if self.fit is None else self.fit(media)) + self.position[...].astype(media.dtype)
        grids = rearrange(media, "n (r c) d -> n r c d", r=cfg.grid)
        place = rearrange(resample(grids, average_weights(cfg.grid, cfg.to)), "n r c d -> n (r c) d")
        y, points = jnp.broadcast_to(self.queries[...].astype(media.dtype), place.shape), self.points[...]
        y, _ = stack.run(self.blocks, lambda y, layer, *_: (layer(y, place, points, grids), None), y, depth=cfg.depth)
        return join_items(y if self.out is None else self.out(y), x)


class DeformableLayer(nnx.Module):
    def __init__(self, cfg: DAbstractorConfig, *, rngs: nnx.Rngs):
        w = cfg.width
        self.attn, self.look = Reader(w, cfg.heads, w // cfg.heads, bias=True, rngs=rngs), Look(cfg, rngs=rngs)
        self.up, self.down = Linear(w, cfg.mlp, "embed mlp", rngs=rngs), Linear(cfg.mlp, w, "mlp embed", rngs=rngs)
        self.norm1, self.norm2, self.norm3 = (cfg.norm.build(w, rngs=rngs) for _ in range(3))

    def __call__(self, y: jax.Array, place: jax.Array, points: jax.Array, grids: jax.Array) -> jax.Array:
        """Queries f[n q d] with their positions f[n q d] and points f32[q 2], after they have looked at f[n r c d]."""
        at = y + place
        y = self.norm1(y + self.attn(at, at, y))
        y = self.norm2(y + self.look(y + place, points, grids))
        return self.norm3(y + self.down(jax.nn.relu(self.up(y))))


class Look(nnx.Module):
    """Deformable attention over one grid."""

    def __init__(self, cfg: DAbstractorConfig, *, rngs: nnx.Rngs):
        w, h, k, p = cfg.width, cfg.heads, cfg.width // cfg.heads, cfg.points
        self.offsets = Linear(w, (h, p, 2), "embed heads point xy", rngs=rngs)
        self.weights = Linear(w, (h, p), "embed heads point", rngs=rngs)
        self.v = Linear(w, (h, k), "embed heads head_dim", rngs=rngs)
        self.o = Linear((h, k), w, "heads head_dim embed", rngs=rngs)
        # At first all queries look alike: each head in a direction of its own, its points one patch further each.
        self.offsets.kernel.set_value(jnp.zeros((w, h, p, 2)))
        self.weights.kernel.set_value(jnp.zeros((w, h, p)))
        self.offsets.bias.set_value(jnp.asarray(directions(h, p)))

    def __call__(self, y: jax.Array, points: jax.Array, grids: jax.Array) -> jax.Array:
        """f[n q d], f32[q 2] in [0, 1], f[n r c d] -> f[n q d]; places are float32."""
        side, v = grids.shape[1], self.v(grids)
        # A patch at index j covers [j, j + 1], so its middle is j + 0.5.
        at = points[None, :, None, None] * side + self.offsets(y).astype(jnp.float32) - 0.5       # n q h p xy
        hat = jnp.maximum(0.0, 1.0 - jnp.abs(at[..., None] - jnp.arange(side)))                    # n q h p xy side
        weights = jax.nn.softmax(self.weights(y).astype(jnp.float32), axis=-1)                     # n q h p
        looks = jnp.einsum("nqhpr,nqhpc->nqhrc", hat[..., 1, :] * weights[..., None], hat[..., 0, :])
        return self.o(jnp.einsum("nqhrc,nrchk->nqhk", looks.astype(v.dtype), v))


def middles(side: int, to: int) -> np.ndarray:
    """f32[to*to 2]: (x, y) of evenly spaced points, from the middle of the first of `side` patches to that of the last."""
    line = np.linspace(0.5, side - 0.5, to, dtype=np.float32) / side
    return np.stack([np.tile(line, to), np.repeat(line, to)], axis=-1)


def directions(heads: int, points: int) -> np.ndarray:
    """f32[h p 2]: the corners and sides of a square around the middle, farther for later points."""
    angle = 2 * pi * np.arange(heads) / heads
    around = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    around /= np.abs(around).max(axis=-1, keepdims=True)
    return (around[:, None] * np.arange(1, points + 1)[:, None]).astype(np.float32)
