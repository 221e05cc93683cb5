"""A linear layer, a norm, and a gated feed-forward layer (the adapter of CogVLM, arXiv:2311.03079, section 2.1).

    x = gelu(norm(proj x));  down(silu(gate x) * up x)

No matrix has a bias.  The learned vectors that CogVLM puts around an image are marks of its layout (data/layouts.py).
"""

from dataclasses import replace

import jax
from flax import nnx

from mllm_jax.config import config
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.mlp import ACTIVATIONS, MLP
from mllm_jax.nn.param import LayerNorm, Linear
from mllm_jax.types import Features, Grid


@config
class GLUConfig:
    hidden: int                         # width between `up` and `down`
    norm: LayerNorm = LayerNorm()

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "GLU":
        return GLU(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        return grid

    def tiny(self) -> "GLUConfig":
        return replace(self, hidden=64)


class GLU(nnx.Module):
    def __init__(self, cfg: GLUConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.proj = Linear(d_in, d_out, "embed mlp", bias=False, rngs=rngs)
        self.norm = cfg.norm.build(d_out, rngs=rngs)
        self.mlp = MLP(BlockConfig(width=d_out, heads=1, mlp=cfg.hidden), rngs=rngs)

    def __call__(self, x: Features) -> Features:
        """f[b m d_in] -> f[b m d_out]."""
        y: jax.Array = ACTIVATIONS["gelu"](self.norm(self.proj(x.tokens)))
        return Features(tokens=self.mlp(y), mask=x.mask)
