"""A layer with two sets of weights: one for text, one for media (the visual expert of CogVLM, arXiv:2311.03079, section 2.2).

Which one a position goes through is told by its kind, and not by a router; all positions attend to one another, and
share the norms.  Where a row is text alone, the layer is that of the language model.  In training both
sets are applied to every position and one result is kept: exact and of static shape, at twice the matmuls.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.decoders.layers import Layer, Scene
from mllm_jax.nn.attention import Attention, LayerCache
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.mlp import MLP
from mllm_jax.nn.position import Rope, Rotation
from mllm_jax.types import KINDS, Mean


@config
class ExpertLayer:
    """A value of `DecoderConfig.cycle`."""

    window: int | None = None           # as in Layer
    rope: Rope | None = None

    def build(self, cfg: BlockConfig, *, rngs: nnx.Rngs) -> "ExpertBlock":
        return ExpertBlock(self, cfg, rngs=rngs)

    @property
    def origin(self) -> Layer:
        return Layer(window=self.window, rope=self.rope)

    def tiny(self) -> "ExpertLayer":
        return ExpertLayer(window=self.window and 16, rope=self.rope)


class Expert(nnx.Module):
    """All matrices of a layer once more."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)


class ExpertBlock(nnx.Module):
    def __init__(self, layer: ExpertLayer, cfg: BlockConfig, *, rngs: nnx.Rngs):
        if cfg.norms != "before":
            raise ConfigError(f"a layer with a second set of weights has its norms before; the decoder has norms={cfg.norms!r}")
        self.window = layer.window
        self.norm1 = cfg.norm.build(cfg.width, rngs=rngs)
        self.attn = Attention(cfg, rngs=rngs)
        self.norm2 = cfg.norm.build(cfg.width, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.expert = Expert(cfg, rngs=rngs)

    def __call__(
        self, x: jax.Array, scene: Scene, rotation: Rotation | None = None, cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None, dict[str, Mean]]:
        """f[b s d] -> f[b s d]; positions whose kind is not text go through the expert."""
        media = (scene.kinds != KINDS["text"])[..., None]

        def choose(text: jax.Array, other: jax.Array) -> jax.Array:
            return jnp.where(media.reshape(media.shape[:2] + (1,) * (text.ndim - 2)), other, text)

        expert = self.expert
        if cache is not None and x.shape[1] == 1:       # an answer grows by text
            expert = self
        y = self.norm1(x)
        q = choose(self.attn.queries(y), expert.attn.queries(y))
        keys = jax.tree.map(choose, self.attn.keys(y), expert.attn.keys(y))
        y, cache = self.attn.mix(q, keys, scene.sees, window=self.window, rotation=rotation, cache=cache)
        x = x + choose(self.attn.o(y), expert.attn.o(y))
        y = self.norm2(x)
        return x + choose(self.mlp(y), expert.mlp(y)), cache, {}
