"""Contrastive losses over the global batch.

Under `jax.jit` the embeds are global arrays, so every other row of the batch is a negative and gradients
flow through all of them, on however many devices the rows lie.  Rows without an example (segment 0
throughout) are neither queries nor negatives.
"""

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from mllm_jax.config import config
from mllm_jax.objectives.base import Uncorrupted
from mllm_jax.sharding import constrain
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
        x, y = _pair(out, self.pair)
        real = _real(batch)
        among = lambda x, y: jnp.where((real[:, None] * real) > 0, _logits(out, x, y), -1e30)
        if self.candidates_learn:
            logits = among(x, y)
            back = logits.T
        else:
            logits, back = among(x, jax.lax.stop_gradient(y)), among(y, jax.lax.stop_gradient(x))
        hit = (logits.argmax(axis=1) == jnp.arange(len(logits))).astype(jnp.float32)
        return {"loss": mean((self._nll(logits, real) + self._nll(back, real)) / 2, real), "recall@1": mean(hit, real)}

    def _nll(self, logits: jax.Array, real: jax.Array) -> jax.Array:
        """f32[b] of finding the partner of each row among the columns f32[b b]."""
        log_p = jax.nn.log_softmax(logits, axis=1)
        nll = -jnp.diag(log_p)
        if not self.smoothing:
            return nll
        spread = -jnp.sum(jnp.where(real > 0, log_p, 0), axis=1) / jnp.maximum(jnp.sum(real), 1)
        return (1 - self.smoothing) * nll + self.smoothing * spread


@config
class Sigmoid(Uncorrupted):
    """Every pair is a yes-or-no question of its own (SigLIP, arXiv:2303.15343, eq. 1): summed over texts, mean over images."""

    weight: float = 1.0
    pair: tuple[str, str] = ("image", "text")
    whole: ClassVar[bool] = True

    def score(self, out: Outputs, batch: Batch) -> dict[str, Mean]:
        logits, real = _logits(out, *_pair(out, self.pair)), _real(batch)
        sign = 2 * jnp.eye(logits.shape[0]) - 1
        nll = jnp.sum(-jax.nn.log_sigmoid(sign * logits) * real, axis=1)
        hit = (jnp.where(real > 0, logits, -1e30).argmax(axis=1) == jnp.arange(logits.shape[0])).astype(jnp.float32)
        return {"loss": mean(nll, real), "recall@1": mean(hit, real)}


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


def _pair(out: Outputs, pair: tuple[str, str]) -> tuple[jax.Array, jax.Array]:
    for modality in pair:
        if modality not in out.embeds:
            raise KeyError(f"a contrastive objective pairs {pair}; the model gave embeds of {sorted(out.embeds)}")
    return tuple(out.embeds[m] for m in pair)


def _logits(out: Outputs, x: jax.Array, y: jax.Array) -> jax.Array:
    """f32[b c], similarities of all rows of f[b d] or f[b n d] with all rows of f[c d] or f[c m d]."""
    left, right = {2: "bd", 3: "bnd"}[x.ndim], {2: "cd", 3: "cmd"}[y.ndim]
    several = left[1:-1] + right[1:-1]
    # Every device compares its own rows with all rows of the other modality.
    y = constrain(y, "everyone query joint_act" if y.ndim == 3 else "everyone joint_act")
    logits = jnp.einsum(f"{left},{right}->bc{several}", x, y)
    logits = out.scale * (jnp.max(logits, axis=tuple(range(2, logits.ndim))) if several else logits)
    return logits if out.bias is None else logits + out.bias


def _real(batch: Batch) -> jax.Array:
    """f32[b], 1 where a row holds an example."""
    return jnp.any(batch.segments > 0, axis=1).astype(jnp.float32)
