"""Pixel shuffle: squares of neighbours become one token, their features side by side, through an MLP.

    ShuffleConfig(grid=26, side=2, mlp=MLPConfig(depth=1, bias=False))     Idefics3 (arXiv:2408.12637, 2.2), SmolVLM
    ShuffleConfig(grid=32, side=2, mlp=MLPConfig(norm=LayerNorm()))        InternVL (arXiv:2404.16821, 3.1), a factor of 0.5 there

What both compute by views and transpositions is one order: the features of the square's first row, from left to right, then those
of the next.  connectors/merge.py does the same where the host has put the patches of a square side by side.
"""

from dataclasses import replace

from einops import rearrange
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.connectors.items import check_square, join_grids, split_grids
from mllm_jax.connectors.mlp import MLPConfig, MLPConnector
from mllm_jax.nn.fusion import once
from mllm_jax.types import Features, Grid


@config
class ShuffleConfig:
    grid: int                           # side of the encoder's grid
    side: int = 2                       # of the square
    mlp: MLPConfig = MLPConfig()        # reads squares; its norm is that of a whole square

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "Shuffle":
        return Shuffle(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        frames = check_square(grid, self.grid, "pixel shuffle")
        if self.grid % self.side:
            raise ConfigError(f"a grid of {self.grid}x{self.grid} tokens does not divide into {self.side}x{self.side} squares")
        return frames, self.grid // self.side, self.grid // self.side

    def tiny(self) -> "ShuffleConfig":
        return replace(self, grid=4, side=2)


class Shuffle(nnx.Module):
    def __init__(self, cfg: ShuffleConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.mlp = MLPConnector(cfg.mlp, d_in * cfg.side**2, d_out, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        """f[b (i r c) d_in] -> f[b (i r' c') d_out], r' = r / side."""
        y = rearrange(split_grids(x, self.cfg.grid), "n (r y) (c x) d -> n r c (y x d)", y=self.cfg.side, x=self.cfg.side)
        # libtpu 0.0.51 dies of the shuffle, fused with a norm that also gives what it had read ("split of a padded window dim").
        return self.mlp(join_grids(once(y), x))
