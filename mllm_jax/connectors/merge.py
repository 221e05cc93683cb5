"""Patches of a square become one token: their features side by side, through an MLP (Qwen2-VL, arXiv:2409.12191, 2.1).

The patches of a square stand side by side in the row (data/native.py), so that nothing is gathered.
"""

from dataclasses import replace

import jax
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.nn.mlp import ACTIVATIONS
from mllm_jax.nn.param import LayerNorm, Linear, RMSNorm, next_key
from mllm_jax.types import Features, Grid


@config
class MergeConfig:
    side: int = 2                       # of the square
    norm: LayerNorm | RMSNorm = LayerNorm(eps=1e-6)             # of each patch
    activation: str = "gelu"
    deep: int = 0                       # levels of the encoder that have a merger of their own (DeepStack, arXiv:2406.04334)

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "Merge":
        return Merge(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        time, rows, columns = grid
        if rows % self.side or columns % self.side:
            raise ConfigError(f"a grid of {rows}x{columns} patches does not divide into {self.side}x{self.side} squares")
        return time, rows // self.side, columns // self.side

    @property
    def depth(self) -> int:
        """Entries of the stack of mergers."""
        return self.deep

    def tiny(self) -> "MergeConfig":
        return replace(self, deep=min(self.deep, 2))


class Merge(nnx.Module):
    def __init__(self, cfg: MergeConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.merger = Merger(cfg, d_in, d_out, normed=1, rngs=rngs)
        keys = jax.random.split(next_key(rngs), cfg.deep)
        # Earlier levels are normalized as a whole square (Qwen3-VL).
        one = lambda key: Merger(cfg, d_in, d_out, normed=cfg.side**2, rngs=nnx.Rngs(key))
        self.deep = jax.vmap(one)(keys) if cfg.deep else None

    def __call__(self, x: Features) -> Features:
        """f[b n d_in] -> f[b m d_out], m = n / side^2; the same of each level."""
        levels = 0 if x.deep is None else len(x.deep)
        if levels != self.cfg.deep:
            raise ConfigError(f"the encoder gives {levels} earlier levels and the connector merges {self.cfg.deep}; make them the same")
        deep = None if self.deep is None else jax.vmap(lambda merger, level: merger(level))(self.deep, x.deep)
        return Features(tokens=self.merger(x.tokens), mask=x.mask[:, :: self.cfg.side**2], deep=deep)


class Merger(nnx.Module):
    """f[b n d_in] -> f[b m d_out]; `normed` patches are normalized together."""

    def __init__(self, cfg: MergeConfig, d_in: int, d_out: int, *, normed: int, rngs: nnx.Rngs):
        square = cfg.side**2
        self.square, self.normed, self.activation = square, normed, cfg.activation
        self.norm = cfg.norm.build(d_in * normed, rngs=rngs)
        self.up = Linear(d_in * square, d_in * square, "embed mlp", rngs=rngs)
        self.down = Linear(d_in * square, d_out, "mlp embed", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, _ = x.shape
        x = self.norm(x.reshape(b, n // self.normed, -1))
        x = x.reshape(b, n // self.square, -1)
        return self.down(ACTIVATIONS[self.activation](self.up(x)))
