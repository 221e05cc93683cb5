"""Gated cross-attention: what a decoder layer reads beside the row before it runs (Flamingo, arXiv:2204.14198, section 3.1.2).

    x = x + tanh(a) attend(norm(x), memory)
    x = x + tanh(f) mlp(norm(x))

The gates start at zero, so that a language model which is given such layers begins as it was.  A position that sees
no medium gets exactly nothing from the attention, and still goes through the second line: also in a row of text alone.

One form with the values of its block; two are published:

    OpenFlamingo    8 heads of 64 whatever the width, LayerNorm, 4x GELU            `open_flamingo(width)`
    Idefics         the block of the decoder itself, and its norm on queries and keys
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.nn.attention import Attention, Keys
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.mlp import MLP
from mllm_jax.nn.param import LayerNorm, param, zeros
from mllm_jax.nn.visibility import Visibility


@config
class Gated:
    """A value of `Layer.reads` (decoders/layers.py)."""

    width: int                          # of the memory
    block: BlockConfig                  # heads, feed-forward layer and norms; as wide as the decoder
    each: bool = False                  # a gate for each channel; False: one for all

    def build(self, cfg: BlockConfig, *, rngs: nnx.Rngs) -> "GatedLayer":
        if self.block.width != cfg.width or self.block.norms != "before":
            raise ConfigError(f"a gated layer of width {self.block.width} with norms={self.block.norms!r} stands before decoder layers of "
                              f"width {cfg.width}; give its block their width, and norms='before'")
        return GatedLayer(self, rngs=rngs)

    def tiny(self) -> "Gated":
        head_dim = self.block.head_dim and 4            # where heads are as wide as those of the decoder, they still are
        return replace(self, width=32, block=replace(self.block, width=32, heads=4, kv_heads=None, head_dim=head_dim, mlp=64))


def open_flamingo(width: int) -> BlockConfig:
    """The block of OpenFlamingo beside a language model of this width."""
    return BlockConfig(width=width, heads=8, head_dim=64, mlp=4 * width, gated=False, activation="gelu", norm=LayerNorm())


class GatedLayer(nnx.Module):
    def __init__(self, cfg: Gated, *, rngs: nnx.Rngs):
        block = cfg.block
        self.norm1 = block.norm.build(block.width, rngs=rngs)
        self.attn = Attention(block, d_memory=cfg.width, rngs=rngs)
        self.attn_gate = Gate(block.width if cfg.each else None, rngs=rngs)
        self.norm2 = block.norm.build(block.width, rngs=rngs)
        self.mlp = MLP(block, rngs=rngs)
        self.mlp_gate = Gate(block.width if cfg.each else None, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Keys | None, visibility: Visibility | None) -> jax.Array:
        """f[b s d] -> f[b s d]; `memory` is what `keys` gave of the media tokens, None where there are none."""
        if memory is not None:
            y, _ = self.attn(self.norm1(x), visibility, memory=memory)
            sees = jnp.any(visibility.mask(), axis=-1, keepdims=True)
            # Softmax over keys that are all masked is their mean, and not nothing.
            x = x + self.attn_gate(jnp.where(sees, y, 0))
        return x + self.mlp_gate(self.mlp(self.norm2(x)))

    def keys(self, tokens: jax.Array) -> Keys:
        """Keys and values of media tokens f[b m d]; they are the same for all positions that are still to come."""
        return self.attn.keys(tokens)


class Gate(nnx.Module):
    def __init__(self, width: int | None, *, rngs: nnx.Rngs):
        self.gate = param(rngs, (), "", zeros) if width is None else param(rngs, (width,), "embed", zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.gate[...]).astype(x.dtype) * x
