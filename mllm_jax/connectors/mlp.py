"""Linear and MLP projectors (LLaVA, arXiv:2304.08485, section 4.1; LLaVA-1.5, arXiv:2310.03744, section 3.3).

With a norm of what enters they are the last step of other connectors (Gemma 3 after pooling).
"""

from flax import nnx

from mllm_jax.config import config
from mllm_jax.nn.mlp import ACTIVATIONS
from mllm_jax.nn.param import LayerNorm, Linear, RMSNorm
from mllm_jax.types import Features, Grid


@config
class MLPConfig:
    depth: int = 2                      # number of linear layers; 1 is LLaVA's projection
    activation: str = "gelu"            # between them
    bias: bool = True
    norm: LayerNorm | RMSNorm | None = None     # of what enters

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "MLPConnector":
        return MLPConnector(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        return grid

    def tiny(self) -> "MLPConfig":
        return self


class MLPConnector(nnx.Module):
    def __init__(self, cfg: MLPConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.norm = None if cfg.norm is None else cfg.norm.build(d_in, rngs=rngs)
        widths = [d_in] + [d_out] * cfg.depth
        self.layers = nnx.List([Linear(i, o, "embed mlp", bias=cfg.bias, rngs=rngs) for i, o in zip(widths, widths[1:])])

    def __call__(self, x: Features) -> Features:
        """f[b m d_in] -> f[b m d_out]."""
        y = x.tokens if self.norm is None else self.norm(x.tokens)
        for i, layer in enumerate(self.layers):
            y = layer(y if i == 0 else ACTIVATIONS[self.cfg.activation](y))
        return Features(tokens=y, mask=x.mask)
