"""Contrastive losses over the global batch.

The embeds are global arrays, so every other row of the batch is a negative and gradients flow through all of them, on however
many devices the rows lie; ring.py brings them together a block at a time.  Rows without an example (segment 0 throughout) are
neither queries nor negatives.
"""

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from mllm_jax.config import config
from mllm_jax.objectives.base import Uncorrupted
from mllm_jax.objectives.ring import Kind, contrast
from mllm_jax.types import Batch, Mean, Outputs, mean


@config
class InfoNCE(Uncorrupted):
    """Symmetric cross-entropy between two modalities (CLIP, arXiv:2103.00020, figure 3).

    Where a row has several vectors of a modality (the queries of BLIP-2, arXiv:2301.12597), the one most alike counts.
    """

    weight: float = 1.0
    pair: tuple[str, str] = ("image", "text")
    smoothing: float = 0.0              # part of a target that is spread over all rows
    # Whether rows are moved by being candidates of others too.  False is what gathering without gradients computes on many
    # devices: BLIP-2, and OpenCLIP with --local-loss alone.
    candidates_learn: bool = True
    whole: ClassVar[bool] = True

    def score(self, out: Outputs, batch: Batch) -> dict[str, Mean]:
        return _score(Kind(softmax=True, smoothing=self.smoothing, candidates_learn=self.candidates_learn), out, self.pair, batch)


@config
class Sigmoid(Uncorrupted):
    """Every pair is a yes-or-no question of its own (SigLIP, arXiv:2303.15343, eq. 1): summed over texts, mean over images."""

    weight: float = 1.0
    pair: tuple[str, str] = ("image", "text")
    whole: ClassVar[bool] = True

    def score(self, out: Outputs, batch: Batch) -> dict[str, Mean]:
        return _score(Kind(softmax=False), out, self.pair, batch)


@config
class Matching:
    """Whether two belong together, asked of a model that reads both (ALBEF, arXiv:2107.07651, section 3.2).

    The model chooses the false pairs, by the random bits that each row is given here.
    """

    weight: float = 1.0
    whole: ClassVar[bool] = False

    def corrupt(self, batch: Batch, rng: jax.Array) -> Batch:
        return replace(batch, draws=jax.random.bits(rng, batch.tokens.shape[:1]))

    def score(self, out: Outputs, batch: Batch) -> dict[str, Mean]:
        if out.pairs is None:
            raise KeyError("Matching scores pairs, and the model gave none")
        labels, there = out.pairs.labels, (out.pairs.labels >= 0) * _real(batch)[:, None]
        logits = out.pairs.logits.astype(jnp.float32)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
        return {"loss": mean(-log_p, there), "accuracy": mean(right, there)}


def _score(kind: Kind, out: Outputs, pair: tuple[str, str], batch: Batch) -> dict[str, Mean]:
    for modality in pair:
        if modality not in out.embeds:
            raise KeyError(f"a contrastive objective pairs {pair}; the model gave embeds of {sorted(out.embeds)}")
    real = _real(batch)
    bias = jnp.zeros(()) if out.bias is None else out.bias
    loss, hits = contrast(kind, *(out.embeds[m] for m in pair), out.scale, bias, real)
    count = jnp.sum(real)
    return {"loss": Mean(total=loss, count=count), "recall@1": Mean(total=jax.lax.stop_gradient(hits), count=count)}


def _real(batch: Batch) -> jax.Array:
    """f32[b], 1 where a row holds an example."""
    return jnp.any(batch.segments > 0, axis=1).astype(jnp.float32)
