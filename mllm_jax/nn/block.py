"""The pre-norm transformer layer that encoders and decoders share: x + attn(norm(x)), then x + mlp(norm(x))."""

import jax
from flax import nnx

from mllm_jax.nn.attention import Attention, LayerCache
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.mlp import MLP
from mllm_jax.nn.position import Rotation
from mllm_jax.nn.visibility import Visibility


class Block(nnx.Module):
    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        self.norm1 = cfg.norm.build(cfg.width, rngs=rngs)
        self.attn = Attention(cfg, rngs=rngs)
        self.norm2 = cfg.norm.build(cfg.width, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        visibility: Visibility | None = None,
        *,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """f[b s d] -> f[b s d]."""
        y, cache = self.attn(self.norm1(x), visibility, rotation=rotation, cache=cache)
        x = x + y
        return x + self.mlp(self.norm2(x)), cache
