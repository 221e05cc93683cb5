"""Q-Former (BLIP-2, arXiv:2301.12597, section 3.1): BERT whose first positions are learned queries that read an image.

Layers are BERT's, with a norm after each sum. Queries and text see one another in self-attention as far as they may;
in every second layer the queries then read the image, which text never does; and queries and text have feed-forward
layers of their own.  Queries have no position; text counts from 0 behind them.
"""

from dataclasses import replace
from math import isqrt, prod

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.connectors.items import join_items, split_items
from mllm_jax.nn import stack
from mllm_jax.nn.attention import Attention
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.lookup import lookup
from mllm_jax.nn.mlp import MLP
from mllm_jax.nn.param import Embedding, LayerNorm, Linear, normal, param
from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import compute_dtype, constrain
from mllm_jax.types import Features, Grid, struct


@config
class Words:
    """Text that the layers read beside the queries: BERT's vocabulary, and [DEC] after it."""

    tokenizer: str = "hf://google-bert/bert-base-uncased"
    vocab: int = 30_523
    positions: int = 512
    length: int = 128                   # most tokens of the text of an item; a longer one loses its beginning

    def tiny(self) -> "Words":
        return replace(self, tokenizer="bytes", vocab=264, positions=320, length=24)


@config
class QFormerConfig:
    tokens: int                         # of an item, that the queries read
    queries: int = 32                   # with none it is BERT
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    every: int = 2                      # queries read in layers 0, every, 2 every, ...; 0: in none
    activation: str = "gelu"
    norm: LayerNorm = LayerNorm(eps=1e-12)
    words: Words | None = None          # None: no text, and no layers for it

    def build(self, d_in: int | None = None, d_out: int | None = None, *, rngs: nnx.Rngs) -> "QFormerConnector | QFormer":
        """The connector; of one that reads nothing, which needs no widths, the layers alone."""
        return QFormerConnector(self, d_in, d_out, rngs=rngs) if d_out else QFormer(self, d_in, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        if prod(grid) != self.tokens:
            raise ConfigError(f"the Q-Former reads items of {self.tokens} tokens; the encoder gives {prod(grid)}: set tokens to that")
        return (1, 1, self.queries)

    def tiny(self) -> "QFormerConfig":
        more = self.tokens - isqrt(self.tokens) ** 2            # than the patches of a square: the class token, if it is read
        return replace(self, tokens=16 + more, queries=4, width=32, depth=self.every, heads=2, mlp=64, words=self.words and self.words.tiny())

    @property
    def former(self) -> "QFormerConfig":
        """All but the last layer, which is the part that checkpoints have in common, whatever it leads into."""
        return self

    @property
    def origin(self) -> "QFormerConfig":
        """BERT, from whose checkpoints it can start; its queries, and what they alone go through, start fresh."""
        return replace(self, tokens=0, queries=0, every=0)

    @property
    def cycle(self) -> tuple[bool, ...]:
        """Whether the queries read in layers that take turns."""
        return (True,) + (False,) * (self.every - 1) if self.every else (False,)

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(width=self.width, heads=self.heads, mlp=self.mlp, gated=False, activation=self.activation, norm=self.norm,
                           qkv_bias=True, out_bias=True, mlp_bias=True, norms="outside")


@struct
class Text:
    """Text beside the queries; all queries are of segment 1 and order 0, see nn/visibility.py."""

    tokens: jax.Array                   # i32[b t]
    positions: jax.Array                # i32[b t]
    segments: jax.Array                 # i32[b t]  0 is padding
    order: jax.Array                    # i32[b t]


class QFormer(nnx.Module):
    def __init__(self, cfg: QFormerConfig, d_memory: int | None, *, rngs: nnx.Rngs):
        self.cfg = cfg
        words, d = cfg.words, cfg.width
        if words and words.length > words.positions:
            raise ConfigError(f"the Q-Former reads texts of up to {words.length} tokens and has {words.positions} positions; "
                              "make words.length at most that")
        self.queries = param(rngs, (cfg.queries, d), "query embed", normal(0.02)) if cfg.queries else None
        self.embedding = Embedding(words.vocab, d, rngs=rngs) if words else None
        self.position = param(rngs, (words.positions, d), "position embed", normal(0.02)) if words else None
        self.norm = cfg.norm.build(d, rngs=rngs)
        layers = [lambda r, reads=reads: QFormerLayer(cfg, d_memory if reads else None, rngs=r) for reads in cfg.cycle]
        self.blocks = stack.make(layers, cfg.depth, rngs=rngs)

    def __call__(self, memory: jax.Array | None, text: Text | None = None) -> jax.Array:
        """What the queries read of f[b m d_memory], and text beside them: f[b q+t d]; without a memory, f[b t d] of text alone."""
        parts, n = [], 0
        if memory is not None:
            n = self.cfg.queries
            parts.append(jnp.broadcast_to(self.queries[...].astype(compute_dtype()), (memory.shape[0], n, self.cfg.width)))
        if text is not None:
            words = self.embedding(text.tokens)
            parts.append(words + lookup(self.position[...], text.positions, "position").astype(words.dtype))
        x, sees = self.norm(jnp.concatenate(parts, axis=1)), None if text is None else visibility(n, text)

        def step(x: jax.Array, layer: QFormerLayer, *_) -> tuple[jax.Array, None]:
            return layer(constrain(x, "item query embed_act"), n, sees, memory), None

        return stack.run(self.blocks, step, x, depth=self.cfg.depth)[0]


def visibility(n: int, text: Text) -> Visibility:
    """Who sees whom among n queries and the text behind them."""
    first = lambda x, value: jnp.pad(x, ((0, 0), (n, 0)), constant_values=value)
    segments, order = first(text.segments, 1), first(text.order, 0)
    return Visibility(segments=segments, order=order, key_segments=segments, key_order=order)


class QFormerLayer(nnx.Module):
    """f[b n+t d] -> f[b n+t d], queries first; `d_memory` None for a layer whose queries do not read."""

    def __init__(self, cfg: QFormerConfig, d_memory: int | None, *, rngs: nnx.Rngs):
        block, norm = cfg.block, lambda: cfg.norm.build(cfg.width, rngs=rngs)
        self.attn, self.norm1 = Attention(block, rngs=rngs), norm()
        self.cross = Attention(block, d_memory=d_memory, rngs=rngs) if d_memory else None
        self.cross_norm = norm() if d_memory else None
        self.mlp = MLP(block, rngs=rngs) if cfg.queries else None
        self.norm2 = norm() if cfg.queries else None
        self.text_mlp = MLP(block, rngs=rngs) if cfg.words else None
        self.text_norm = norm() if cfg.words else None

    def __call__(self, x: jax.Array, n: int, sees: Visibility | None, memory: jax.Array | None) -> jax.Array:
        x = self.norm1(x + self.attn(x, sees)[0])
        queries, text = x[:, :n], x[:, n:]
        if n and self.cross is not None:
            queries = self.cross_norm(queries + self.cross(queries, memory=memory)[0])
        queries = self.norm2(queries + self.mlp(queries)) if n else queries
        text = self.text_norm(text + self.text_mlp(text)) if text.shape[1] else text
        return jnp.concatenate([queries, text], axis=1)


class QFormerConnector(nnx.Module):
    """The queries of each item, in the width of the decoder; the text of an item (InstructBLIP) is read and left behind."""

    def __init__(self, cfg: QFormerConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.former = QFormer(cfg, d_in, rngs=rngs)
        self.out = Linear(cfg.width, d_out, "embed mlp", rngs=rngs)

    def __call__(self, x: Features) -> Features:
        """f[b (i tokens) d_in] -> f[b (i queries) d_out]."""
        text = None
        if self.cfg.words is not None:
            if x.text is None:
                raise ConfigError("the Q-Former reads the text of each item, and the batch has none in Media.text; "
                                  "make batches for this model, or set its words to None")
            tokens = x.text.reshape(-1, x.text.shape[-1])
            there = (tokens >= 0).astype(jnp.int32)
            places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            text = Text(tokens=jnp.maximum(tokens, 0), positions=places, segments=there, order=jnp.zeros_like(tokens))
        y = self.former(split_items(x, self.cfg.tokens), text)
        return join_items(self.out(y[:, : self.cfg.queries]), x)
