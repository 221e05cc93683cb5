"""Contrastive losses over the global batch.

Under `jax.jit` the embeds are global arrays, so every other row of the batch is a negative and gradients
flow through all of them, on however many devices the rows lie.  Rows without an example (segment 0
throughout) are neither queries nor negatives.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from mllm_jax.config import config
from mllm_jax.objectives.base import Uncorrupted
from mllm_jax.sharding import constrain
from mllm_jax.types import Batch, Mean, Outputs, mean


@config
class InfoNCE(Uncorrupted):
    """Symmetric cross-entropy between two modalities (CLIP, arXiv:2103.00020, figure 3)."""

    weight: float = 1.0
    pair: tuple[str, str] = ("image", "text")
    whole: ClassVar[bool] = True

    def score(self, out: Outputs, batch: Batch) -> dict[str, Mean]:
        logits, real = _logits(out, batch, self.pair)
        right = jnp.arange(logits.shape[0])
        logits = jnp.where((real[:, None] * real) > 0, logits, -1e30)
        log_p = lambda axis: jnp.diag(jax.nn.log_softmax(logits, axis))
        hit = (logits.argmax(axis=1) == right).astype(jnp.float32)
        return {"loss": mean(-(log_p(0) + log_p(1)) / 2, real), "recall@1": mean(hit, real)}


@config
class Sigmoid(Uncorrupted):
    """Every pair is a yes-or-no question of its own (SigLIP, arXiv:2303.15343, eq. 1): summed over texts, mean over images."""

    weight: float = 1.0
    pair: tuple[str, str] = ("image", "text")
    whole: ClassVar[bool] = True

    def score(self, out: Outputs, batch: Batch) -> dict[str, Mean]:
        logits, real = _logits(out, batch, self.pair)
        sign = 2 * jnp.eye(logits.shape[0]) - 1
        nll = jnp.sum(-jax.nn.log_sigmoid(sign * logits) * real, axis=1)
        hit = (jnp.where(real > 0, logits, -1e30).argmax(axis=1) == jnp.arange(logits.shape[0])).astype(jnp.float32)
        return {"loss": mean(nll, real), "recall@1": mean(hit, real)}


def _logits(out: Outputs, batch: Batch, pair: tuple[str, str]) -> tuple[jax.Array, jax.Array]:
    """f32[b b] similarities of the two modalities and f32[b], 1 where a row holds an example."""
    for modality in pair:
        if modality not in out.embeds:
            raise KeyError(f"a contrastive objective pairs {pair}; the model gave embeds of {sorted(out.embeds)}")
    x, y = (out.embeds[m] for m in pair)
    # Every device compares its own rows with all rows of the other modality.
    logits = out.scale * jnp.einsum("bd,cd->bc", x, constrain(y, "everyone joint_act"))
    logits = logits if out.bias is None else logits + out.bias
    return logits, jnp.any(batch.segments > 0, axis=1).astype(jnp.float32)
