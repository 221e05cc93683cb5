"""The layers of a decoder as values: what one layer has that the next may not.

`DecoderConfig.cycle` holds them; they take turns. A layer of another kind (two sets of weights, a recurrence) is a
value of its own with the same members: `window`, `rope`, `origin`, `tiny`, and `build(cfg, rngs=)`, which gives a module
(x, scene, rotation, cache) -> (x, cache, auxiliary losses).
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import config
from mllm_jax.nn.attention import LayerCache
from mllm_jax.nn.block import Block
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.position import Rope, Rotation
from mllm_jax.nn.visibility import Visibility
from mllm_jax.types import Mean, struct


@struct
class Memory:
    """Media tokens beside the rows, which some layers read; a position sees those of one item."""

    tokens: jax.Array | None            # f[b m d]; None: layers kept the keys and values of them
    owner: jax.Array                    # i32[b m]   the item of a token; -1 where there is none
    slot: jax.Array                     # i32[b s]   the item that a position sees; -1 for none

    def visibility(self) -> Visibility:
        own = lambda x: {"segments": x + 1, "order": jnp.zeros_like(x)}
        keys = own(self.owner)
        return Visibility(**own(self.slot), key_segments=keys["segments"], key_order=keys["order"])


@struct
class Scene:
    """What the layers of a decoder have in common about their rows."""

    sees: Visibility
    kinds: jax.Array                    # i32[b s]   see types.KINDS
    mask: jax.Array                     # bool[b s]  False at padding
    draws: jax.Array | None = None      # u32[b]     random bits of this layer, in training
    memory: Memory | None = None

    def of_layer(self, i: jax.Array) -> "Scene":
        """With random bits that no other layer has: seeds only, so that any step that is odd will do."""
        return self if self.draws is None else replace(self, draws=self.draws + i.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))


@config
class Layer:
    """Attention and a feed-forward layer."""

    window: int | None = None           # a position sees so many of the last ones; None: all
    rope: Rope | None = None            # instead of that of the decoder
    mlp: Any = None                     # what stands in the place of the feed-forward layer: nn/moe.py
    reads: Any = None                   # what reads the memory before this layer: nn/gated.py

    def build(self, cfg: BlockConfig, *, rngs: nnx.Rngs) -> "DecoderLayer":
        return DecoderLayer(self, cfg, rngs=rngs)

    @property
    def origin(self) -> "Layer":
        """The layer of the language model that it grew from."""
        return replace(self, mlp=None, reads=None)

    def tiny(self) -> "Layer":
        small = lambda part: part and part.tiny()
        return replace(self, window=self.window and 16, mlp=small(self.mlp), reads=small(self.reads))


class DecoderLayer(Block):
    def __init__(self, layer: Layer, cfg: BlockConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, mlp=layer.mlp, rngs=rngs)
        self.window = layer.window
        self.reads = None if layer.reads is None else layer.reads.build(cfg, rngs=rngs)

    def __call__(
        self, x: jax.Array, scene: Scene, rotation: Rotation | None = None, cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None, dict[str, Mean]]:
        """f[b s d] -> f[b s d]; the cache keeps the keys and values of what the layer reads."""
        if self.reads is not None:
            memory, keys = scene.memory, cache and cache.memory
            if memory is not None and memory.tokens is not None:
                keys = self.reads.keys(memory.tokens)
                cache = cache and replace(cache, memory=keys)
            x = self.reads(x, keys, memory and memory.visibility())
        return super().__call__(x, scene.sees, window=self.window, rotation=rotation, cache=cache, mask=scene.mask, draws=scene.draws)
