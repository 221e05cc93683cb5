"""The multimodal LLM: inputs -> decoder."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import config
from mllm_jax.decoders.transformer import Cache, DecoderConfig
from mllm_jax.models.tower import Tower, TowerConfig
from mllm_jax.types import Batch, Features, Outputs


@config
class MLLMConfig:
    inputs: Mapping[str, TowerConfig]   # modality -> how it enters
    decoder: DecoderConfig

    def build(self, *, rngs: nnx.Rngs) -> "MLLM":
        return MLLM(self, rngs=rngs)

    def tiny(self) -> "MLLMConfig":
        return replace(self, inputs={m: t.tiny() for m, t in self.inputs.items()}, decoder=self.decoder.tiny())


class MLLM(nnx.Module):
    def __init__(self, cfg: MLLMConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.inputs = nnx.Dict({m: Tower(t, cfg.decoder.width, rngs=rngs) for m, t in cfg.inputs.items()})
        self.decoder = cfg.decoder.build(rngs=rngs)

    def __call__(self, batch: Batch) -> Outputs:
        hidden, aux, _ = self.decoder(self.embed(batch), batch)
        return Outputs(hidden=hidden, unembed=self.decoder.unembed, aux=aux)

    def embed(self, batch: Batch) -> jax.Array:
        """What enters the decoder, f[b s d]: embedded tokens, and media tokens where they stand."""
        x = self.decoder.embed(batch.tokens)
        for modality, media in batch.media.items():
            x = splice(x, self.inputs[modality](media), media.slot)
        return x

    def extend(self, x: jax.Array, batch: Batch, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits f32[b v] after the last of these positions, and the cache with all of them in it."""
        hidden, _, cache = self.decoder(x, batch, cache)
        logits = jnp.einsum("bd,dv->bv", hidden[:, -1].astype(jnp.float32), self.decoder.unembed.astype(jnp.float32))
        return logits, cache


def splice(x: jax.Array, features: Features, slot: jax.Array) -> jax.Array:
    """Puts media token `slot[b, s]` at position s of row b; text stays where the slot is -1.

    f[b s d], f[b m d], i32[b s] -> f[b s d].
    """
    here = jnp.take_along_axis(features.tokens, jnp.maximum(slot, 0)[..., None], axis=1)
    return jnp.where(slot[..., None] >= 0, here.astype(x.dtype), x)
