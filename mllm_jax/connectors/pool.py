"""Fewer tokens by pooling the grid of an item: averages over windows, and bilinear resizing.

Both are one matrix along the rows and the same along the columns, so that windows need not divide the grid and a
pooled token is a weighted mean of patches.  Matryoshka Multimodal Models (M3, arXiv:2405.17430) average the tokens of
LLaVA at several scales at once.
"""

from dataclasses import fields, replace
from math import floor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.connectors.items import check_square, join_grids, split_grids
from mllm_jax.connectors.mlp import MLPConfig, MLPConnector
from mllm_jax.types import Features, Grid

MODES = ("average", "bilinear")


@config
class PoolConfig:
    """Pools each item to to x to tokens, between one connector that reads the patches and one that reads the result.

    At least one of them must be there; the first one changes the width.
    """

    grid: int                           # side of the encoder's grid
    to: int                             # side of the pooled one
    mode: str = "average"               # or "bilinear", torch's interpolate without align_corners
    before: Any = None                  # a connector of the patches
    after: Any = None                   # a connector of the pooled tokens

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "Pool":
        return Pool(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        frames = check_square(self.before.num_tokens(grid) if self.before else grid, self.grid, "pool")
        pooled = (frames, self.to, self.to)
        return self.after.num_tokens(pooled) if self.after else pooled

    def tiny(self) -> "PoolConfig":
        small = lambda part: part and part.tiny()
        return replace(self, grid=4, to=min(self.to, 2), before=small(self.before), after=small(self.after))


class Pool(nnx.Module):
    def __init__(self, cfg: PoolConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        if cfg.mode not in MODES:
            raise ConfigError(f"mode={cfg.mode!r} of a pool is not one of: {', '.join(MODES)}")
        if cfg.before is None and cfg.after is None:
            raise ConfigError("a pool needs a connector before or after it to fit the width; for example after=MLPConfig(depth=2)")
        self.cfg = cfg
        self.before = cfg.before and cfg.before.build(d_in, d_out, rngs=rngs)
        self.after = cfg.after and cfg.after.build(d_out if cfg.before else d_in, d_out, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        """f[b (i r c) d_in] -> f[b (i to to) d_out]."""
        x = x if self.before is None else self.before(x)
        weights = (average_weights if self.cfg.mode == "average" else bilinear_weights)(self.cfg.grid, self.cfg.to)
        x = join_grids(resample(split_grids(x, self.cfg.grid), weights), x)
        return x if self.after is None else self.after(x)


@config
class NestedConfig(MLPConfig):
    """LLaVA's projector, and what it gives averaged over windows of several sizes (M3, section 3).

    In the row stand the tokens of the first window.  Those of the others lie behind them, all items of one window
    before those of the next, for objectives that put them into rows: objectives/nested.py.  The parameters are the
    same for any windows, so that after the training one is chosen: windows=(4,) gives 36 tokens of 576.
    """

    grid: int
    windows: tuple[int, ...]            # their sides; 1 keeps all tokens

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "Nested":
        return Nested(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        frames = check_square(grid, self.grid, "nested pool")
        return (frames, self.sides[0], self.sides[0])

    @property
    def origin(self) -> MLPConfig:
        """The projector that it grew from, whose checkpoints it can start from."""
        return MLPConfig(**{f.name: getattr(self, f.name) for f in fields(MLPConfig)})

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(max(1, self.grid // window) for window in self.windows)

    def tiny(self) -> "NestedConfig":
        return replace(self, grid=4)


class Nested(MLPConnector):
    def __call__(self, x: Features) -> Features:
        """f[b (i r c) d_in] -> f[b m d_out], m the tokens of all windows."""
        x = super().__call__(x)
        grids = split_grids(x, self.cfg.grid)
        sets = [join_grids(resample(grids, average_weights(self.cfg.grid, side)), x) for side in self.cfg.sides]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *sets)


def resample(grids: jax.Array, weights: np.ndarray) -> jax.Array:
    """f[n r c d], f32[out r] -> f[n out out d]: the same weights along rows and columns; sums in float32."""
    if weights.shape[0] == weights.shape[1] and np.array_equal(weights, np.eye(len(weights))):
        return grids
    y = jnp.einsum("or,nrcd->nocd", weights, grids, preferred_element_type=jnp.float32)
    return jnp.einsum("oc,nrcd->nrod", weights, y).astype(grids.dtype)


def average_weights(n: int, out: int) -> np.ndarray:
    """f32[out n]: means over windows from floor(o n / out) to ceil((o + 1) n / out), as torch's adaptive pooling.

    Where `out` divides n these are n / out patches each; otherwise windows overlap.
    """
    weights = np.zeros((out, n), np.float32)
    for o in range(out):
        start, end = o * n // out, -(-(o + 1) * n // out)
        weights[o, start:end] = 1 / (end - start)
    return weights


def bilinear_weights(n: int, out: int) -> np.ndarray:
    """f32[out n]: linear interpolation at the centres of `out` equal parts, borders repeat, no antialiasing."""
    weights = np.zeros((out, n), np.float32)
    for o in range(out):
        at = min(max((o + 0.5) * n / out - 0.5, 0.0), n - 1.0)
        low = min(floor(at), n - 1)
        weights[o, low] += 1 - (at - low)
        weights[o, min(low + 1, n - 1)] += at - low
    return weights
