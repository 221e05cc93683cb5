"""The Q-Former before it meets a language model (BLIP-2, arXiv:2301.12597, section 3.2; code: LAVIS, blip2_qformer.py).

It learns from pairs of an image and a caption, with three losses at once, each of which lets queries and text see one
another in another way:

    contrast    neither sees the other          Outputs.embeds: a vector for each query, and one for the text
    caption     text sees queries and the past  Outputs.hidden
    match       all see all                     Outputs.pairs: the true pair, another image, another text

The first two are one pass: the caption stands twice behind the queries, once by itself and once to be written, which
begins with the last token of the vocabulary, [DEC].  The false pairs of the third are drawn in proportion to how alike
the first finds them (ALBEF, arXiv:2107.07651), among the rows that the model is given: with microbatches, those of one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.connectors.qformer import QFormerConfig, Text, Words
from mllm_jax.models.tower import Tower, TowerConfig
from mllm_jax.nn.mlp import ACTIVATIONS
from mllm_jax.nn.param import Linear, param, zeros
from mllm_jax.types import Batch, Outputs, Pairs


@config
class BridgeConfig:
    inputs: Mapping[str, TowerConfig]   # one tower with route="pool", whose connector is a Q-Former that knows words
    dim: int = 256                      # of the space where queries and texts are compared
    temperature: float | None = 0.07    # learned, similarities are divided by it; None: they are cosines, as in transformers
    captions: bool = True               # False: without the layer that writes captions, of which transformers has none

    def build(self, *, rngs: nnx.Rngs) -> "Bridge":
        return Bridge(self, rngs=rngs)

    def tiny(self) -> "BridgeConfig":
        return replace(self, inputs={m: t.tiny() for m, t in self.inputs.items()}, dim=16)

    @property
    def tower(self) -> TowerConfig:
        towers = list(self.inputs.values())
        former = towers[0].connector if len(towers) == 1 else None
        if not isinstance(former, QFormerConfig) or former.words is None:
            raise ConfigError(f"a Bridge trains one Q-Former that knows words; its inputs are {sorted(self.inputs)}, connected by "
                              f"{', '.join(type(t.connector).__name__ for t in towers) or 'nothing'}; give it one with words=Words()")
        if towers[0].route != "pool":
            raise ConfigError(f"the tower of a Bridge has route='pool', for its rows are captions alone; it is {towers[0].route!r}")
        former.num_tokens(towers[0].encoder.num_tokens(towers[0].nominal.grid))
        return towers[0]

    @property
    def text(self) -> Words:
        return self.tower.connector.words

    @property
    def tokenizer(self) -> str:
        """Of its captions, whatever the later stages of a recipe read."""
        return self.text.tokenizer


class Bridge(nnx.Module):
    def __init__(self, cfg: BridgeConfig, *, rngs: nnx.Rngs):
        former = cfg.tower.connector
        d = former.width
        self.cfg = cfg
        # The connector's last layer leads into the shared space; before a language model it leads into that.
        self.inputs = nnx.Dict({m: Tower(t, cfg.dim, rngs=rngs) for m, t in cfg.inputs.items()})
        self.text = Linear(d, cfg.dim, "embed joint", rngs=rngs)
        self.match = Linear(d, 2, "embed pair", rngs=rngs)
        self.caption = Captioner(former, rngs=rngs) if cfg.captions else None
        self.temperature = param(rngs, (), "", jax.nn.initializers.constant(cfg.temperature)) if cfg.temperature else None

    def __call__(self, batch: Batch) -> Outputs:
        """Of rows of one image and its caption; without `batch.draws` no false pairs are made."""
        [modality] = self.inputs
        return self.read(self.memory(modality, batch), batch)

    def embed_media(self, modality: str, batch: Batch) -> jax.Array:
        """Unit vectors f[b n d] of the queries; a text is as like an image as it is like the nearest of them."""
        connector = self.inputs[modality].connector
        return unit(connector.out(connector.former(self.memory(modality, batch))))

    def embed_text(self, batch: Batch) -> jax.Array:
        """Unit vectors f[b d]."""
        [tower] = self.inputs.values()
        return unit(self.text(tower.connector.former(None, alone(batch))[:, 0]))

    def memory(self, modality: str, batch: Batch) -> jax.Array:
        """f[b m d]: what the queries read, of the first image of each row."""
        return self.inputs[modality].encoder(batch.media[modality]).tokens[:, : self.cfg.tower.connector.tokens]

    def read(self, memory: jax.Array, batch: Batch) -> Outputs:
        """f[b m d] of the images -> what the losses score."""
        [tower] = self.inputs.values()
        former, n, s = tower.connector.former, self.cfg.tower.connector.queries, batch.tokens.shape[1]
        text, place = alone(batch), jnp.broadcast_to(jnp.arange(s), batch.tokens.shape)
        apart = replace(text, segments=2 * text.segments)
        caption = replace(text, tokens=jnp.where(place == 0, self.cfg.text.vocab - 1, text.tokens), order=1 + place)
        y = former(memory, jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), apart, caption))
        image, words = unit(tower.connector.out(y[:, :n])), unit(self.text(y[:, n]))
        scale = jnp.ones(()) if self.temperature is None else 1 / self.temperature[...]
        alike = jax.lax.stop_gradient(scale * jnp.max(jnp.einsum("bnd,cd->bcn", image, words), axis=-1))
        table = former.embedding.table[...]
        hidden, unembed = (None, None) if self.caption is None else (self.caption(y[:, n + s :]), self.caption.unembed(table))
        return Outputs(hidden=hidden, unembed=unembed, embeds={"image": image, "text": words}, scale=scale,
                       pairs=self.pairs(memory, text, alike, batch.draws))

    def pairs(self, memory: jax.Array, text: Text, alike: jax.Array, draws: jax.Array | None) -> Pairs:
        """Whether each image and text belong together; `alike` f[b b] of images (rows) and texts (columns)."""
        [tower] = self.inputs.values()
        real, b = jnp.any(text.segments > 0, axis=1), len(memory)
        labels = jnp.ones((b, 1), jnp.int32)
        images, texts = memory[:, None], jax.tree.map(lambda x: x[:, None], text)
        if draws is not None:
            others = real & ~jnp.eye(b, dtype=bool)
            among = lambda x: jnp.where(others, x, -jnp.inf)
            image, words = draw(among(alike.T), draws, 0), draw(among(alike), draws, 1)
            images = jnp.stack([memory, memory[image], memory], axis=1)
            texts = jax.tree.map(lambda x: jnp.stack([x, x, jnp.take(x, words, axis=0)], axis=1), text)
            labels = jnp.where(jnp.any(others, axis=1)[:, None], jnp.array([1, 0, 0]), jnp.array([1, -1, -1]))
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        y = tower.connector.former(flat(images), jax.tree.map(flat, texts))[:, : self.cfg.tower.connector.queries]
        return Pairs(logits=jnp.mean(self.match(y).astype(jnp.float32), axis=1).reshape(*labels.shape, 2), labels=labels)


class Captioner(nnx.Module):
    """BERT's prediction of words: a layer with a norm, the embedding as the output matrix, and a bias for each word."""

    def __init__(self, cfg: QFormerConfig, *, rngs: nnx.Rngs):
        self.activation = cfg.activation
        self.dense = Linear(cfg.width, cfg.width, "embed mlp", rngs=rngs)
        self.norm = cfg.norm.build(cfg.width, rngs=rngs)
        self.bias = param(rngs, (cfg.words.vocab,), "vocab", zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """f[b s d] -> f[b s d+1]: with a 1 at the end, so that the bias is a row of the output matrix."""
        x = self.norm(ACTIVATIONS[self.activation](self.dense(x)))
        return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)

    def unembed(self, table: jax.Array) -> jax.Array:
        """f[v d] -> f[d+1 v]."""
        return jnp.concatenate([table.T, self.bias[...][None]], axis=0)


def alone(batch: Batch) -> Text:
    """The captions of a batch, whose tokens all see one another."""
    there = (batch.segments > 0).astype(jnp.int32)
    return Text(tokens=batch.tokens, positions=batch.positions[..., 0], segments=there, order=0 * there)


def draw(logits: jax.Array, draws: jax.Array, number: int) -> jax.Array:
    """A column i32[b] of each row of f[b c] in proportion to exp(logits), by the random bits u32[b] of the rows.

    The largest sum of a logit and Gumbel noise (Gumbel-max). Its bits are mixed from those of the row: threefry would take a
    tenth of the time in which the stage of BLIP-2 that asks for this compiles.
    """
    column = jnp.arange(logits.shape[1], dtype=jnp.uint32)
    bits = _mixed(draws[:, None] ^ _mixed(2 * column + number + 1))
    share = ((bits >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
    return jnp.argmax(logits - jnp.log(-jnp.log(share)), axis=-1)


def _mixed(x: jax.Array) -> jax.Array:
    """u32 -> u32, every bit of which depends on every bit: the finalizer of MurmurHash3 (A. Appleby, public domain)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


__all__: list[Any] = ["Bridge", "BridgeConfig"]
