"""The multimodal LLM: inputs -> decoder.

Features enter the decoder by one of three ways, or by several: in the row (`splice`), at several layers of it (levels of
an encoder, added where the first level stands), and beside it (`memory`, which some layers of the decoder read).
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.decoders.layers import Memory
from mllm_jax.decoders.transformer import Cache, DecoderConfig
from mllm_jax.models.tower import Tower, TowerConfig
from mllm_jax.sharding import constrain, pick
from mllm_jax.types import Batch, Features, Media, Outputs, struct


@config
class MLLMConfig:
    inputs: Mapping[str, TowerConfig]   # modality -> how it enters
    decoder: DecoderConfig

    def build(self, *, rngs: nnx.Rngs) -> "MLLM":
        return MLLM(self, rngs=rngs)

    def tiny(self) -> "MLLMConfig":
        decoder = self.decoder.tiny()
        # Beside the bytes and what every tokenizer has there must be room for the special tokens of layouts.
        named = {token for tower in self.inputs.values() for way in tower.kinds.values() if way.layout for token in way.layout.specials}
        decoder = replace(decoder, vocab=decoder.vocab + -(-len(named) // 8) * 8)
        return replace(self, inputs={m: t.tiny() for m, t in self.inputs.items()}, decoder=decoder)


@struct
class Entering:
    """What enters the decoder."""

    x: jax.Array                        # f[b s d]   embedded tokens, and media tokens where they stand
    deep: jax.Array | None = None       # f[n b s d] added to what the first n layers give
    memory: Memory | None = None


class MLLM(nnx.Module):
    def __init__(self, cfg: MLLMConfig, *, rngs: nnx.Rngs):
        memory = [m for m, t in cfg.inputs.items() if t.route == "memory"]
        if len(memory) > 1 or bool(memory) != (cfg.decoder.memory_width is not None):
            raise ConfigError(f"inputs with route='memory': {', '.join(memory) or 'none'}; layers of the decoder that read a "
                              f"memory: {'some' if cfg.decoder.memory_width else 'none'}; there must be one of each, or none")
        self.cfg = cfg
        width = lambda tower: cfg.decoder.memory_width if tower.route == "memory" else cfg.decoder.width
        self.inputs = nnx.Dict({m: Tower(t, width(t), rngs=rngs) for m, t in cfg.inputs.items()})
        self.decoder = cfg.decoder.build(rngs=rngs)

    def __call__(self, batch: Batch) -> Outputs:
        enter = self.embed(batch)
        hidden, aux, _ = self.decoder(enter.x, batch, memory=enter.memory, deep=enter.deep)
        return Outputs(hidden=hidden, unembed=self.decoder.unembed, aux=aux)

    def embed(self, batch: Batch) -> Entering:
        enter = Entering(x=self.decoder.embed(batch.tokens))
        for modality, media in batch.media.items():
            features = self.inputs[modality](media)
            if self.cfg.inputs[modality].route == "memory":
                enter = replace(enter, memory=beside(features, media))
                continue
            enter = replace(enter, x=splice(enter.x, features, media))
            if features.deep is not None:
                nothing = jnp.zeros_like(enter.x)
                levels = [splice(nothing, replace(features, tokens=level), media) for level in features.deep]
                deep = jnp.stack(levels)
                enter = replace(enter, deep=deep if enter.deep is None else enter.deep + deep)
        return enter

    def extend(self, enter: Entering, batch: Batch, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits f32[b v] after the last of these positions, and the cache with all of them in it."""
        hidden, _, cache = self.decoder(enter.x, batch, memory=enter.memory, deep=enter.deep, cache=cache)
        unembed = constrain(self.decoder.unembed, "embed_act vocab").astype(jnp.float32)
        logits = jnp.einsum("bd,dv->bv", hidden[:, -1].astype(jnp.float32), unembed)
        return logits, cache


def beside(features: Features, media: Media) -> Memory:
    """Media tokens as a memory; item i of a row owns the i-th of equal parts of them."""
    items = media.mask.shape[1]
    owner = jnp.repeat(jnp.arange(items), features.tokens.shape[1] // items)
    return Memory(tokens=features.tokens, owner=jnp.where(features.mask, owner, -1), slot=media.slot)


def splice(x: jax.Array, features: Features, media: Media) -> jax.Array:
    """Puts media token `slot[b, s]`, or the mean of its taps, at position s of row b; text stays where the slot is -1.

    f[b s d], f[b m d] -> f[b s d].
    """
    token = lambda slot: pick(features.tokens, jnp.maximum(slot, 0))
    if media.taps is None:
        here = token(media.slot)
    else:
        here = sum(media.mix[..., k, None] * token(media.taps[..., k]) for k in range(media.taps.shape[-1]))
    return jnp.where(media.slot[..., None] >= 0, constrain(here.astype(x.dtype), "batch seq embed_act"), x)
