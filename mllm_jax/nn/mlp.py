"""Feed-forward layers, with and without a gate."""

import functools

import jax
from flax import nnx

from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.fusion import as_written, once
from mllm_jax.nn.quantized import LayerLinear
from mllm_jax.nn.remat import keep

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """f[... d] -> f[... d]."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        d, f, bias = cfg.width, cfg.mlp, cfg.mlp_bias
        self.activation = cfg.activation
        self.gate = LayerLinear(d, f, "embed mlp", bias=bias, rngs=rngs) if cfg.gated else None
        self.up = LayerLinear(d, f, "embed mlp", bias=bias, rngs=rngs)
        self.down = LayerLinear(f, d, "mlp embed", bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        y = as_written(keep(self.up(x), "mlp"))
        return self.down(once(act(y) if self.gate is None else act(as_written(keep(self.gate(x), "mlp"))) * y))
