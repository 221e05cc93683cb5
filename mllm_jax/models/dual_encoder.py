"""Two towers and a shared space (CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343)."""

import math
from collections.abc import Mapping
from dataclasses import field, replace

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.models.tower import TowerConfig, one_item
from mllm_jax.nn.param import Linear, param
from mllm_jax.types import Batch, Outputs


@config
class Projection:
    """A linear map into the shared space."""

    bias: bool = False


@config
class DualEncoderConfig:
    inputs: Mapping[str, TowerConfig]   # modality -> tower, with route="pool"
    text: DecoderConfig                 # with head="none"; the vector of a text is that of its last position
    dim: int                            # width of the shared space
    project: Mapping[str, Projection] = field(default_factory=lambda: {"image": Projection(), "text": Projection()})
    scale: float = 1 / 0.07             # logit scale at the start
    bias: float | None = None           # logit bias at the start (SigLIP)

    def build(self, *, rngs: nnx.Rngs) -> "DualEncoder":
        return DualEncoder(self, rngs=rngs)

    def tiny(self) -> "DualEncoderConfig":
        text = self.text.tiny()
        return replace(self, inputs={m: t.tiny() for m, t in self.inputs.items()}, text=text, dim=text.width)


class DualEncoder(nnx.Module):
    def __init__(self, cfg: DualEncoderConfig, *, rngs: nnx.Rngs):
        if connected := [m for m, t in cfg.inputs.items() if t.connector is not None]:
            raise ConfigError(f"a dual encoder pools its towers, and takes no connector; {', '.join(connected)} has one")
        self.cfg = cfg
        widths = {m: t.check().encoder.width for m, t in cfg.inputs.items()} | {"text": cfg.text.width}
        self.inputs = nnx.Dict({m: t.encoder.build(rngs=rngs) for m, t in cfg.inputs.items()})
        self.text = cfg.text.build(rngs=rngs)
        self.project = nnx.Dict({
            m: Linear(widths[m], cfg.dim, "embed joint", bias=p.bias, rngs=rngs) for m, p in cfg.project.items()})
        self.log_scale = param(rngs, (), "", jax.nn.initializers.constant(math.log(cfg.scale)))
        self.bias = None if cfg.bias is None else param(rngs, (), "", jax.nn.initializers.constant(cfg.bias))

    def __call__(self, batch: Batch) -> Outputs:
        """Unit vectors f[b d] of every modality of the batch."""
        embeds = {m: self.embed_media(m, batch) for m in batch.media} | {"text": self.embed_text(batch)}
        bias = None if self.bias is None else self.bias[...]
        return Outputs(embeds=embeds, scale=jnp.exp(self.log_scale[...]), bias=bias)

    def embed_text(self, batch: Batch) -> jax.Array:
        hidden, _, _ = self.text(self.text.embed(batch.tokens), batch)
        last = jnp.maximum(jnp.sum(batch.segments > 0, axis=1) - 1, 0)              # rows of pairs are padded at the end
        return self._unit("text", jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def embed_media(self, modality: str, batch: Batch) -> jax.Array:
        return self._unit(modality, one_item(self.inputs[modality].embed(batch.media[modality])))

    def _unit(self, modality: str, x: jax.Array) -> jax.Array:
        x = self.project[modality](x) if modality in self.project else x
        x = x.astype(jnp.float32)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
