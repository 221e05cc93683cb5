"""Losses on discrete tokens."""

from typing import ClassVar

import jax.numpy as jnp

from mllm_jax.config import config
from mllm_jax.objectives.base import Uncorrupted
from mllm_jax.objectives.cross_entropy import cross_entropy
from mllm_jax.sharding import constrain, pick
from mllm_jax.types import Batch, Mean, Outputs


@config
class NextToken(Uncorrupted):
    """Cross-entropy of `batch.targets`, averaged over `batch.weights` in the whole batch.

    `z_loss` times the square of the log-partition is added, which keeps logits from drifting
    (PaLM, arXiv:2204.02311, section 5).  `smoothing` is the part of a target that is spread over all tokens; the logged
    nll is then without it.
    """

    weight: float = 1.0
    kind: int | None = None             # only positions of this kind
    z_loss: float = 0.0
    smoothing: float = 0.0
    whole: ClassVar[bool] = False

    def score(self, out: Outputs, batch: Batch) -> dict[str, Mean]:
        weights = batch.weights if self.kind is None else batch.weights * (batch.kinds == self.kind)
        hidden, targets = out.hidden, batch.targets
        if batch.trained is not None:
            here = jnp.maximum(batch.trained, 0)
            at = lambda x: jnp.take_along_axis(x, here, axis=1)
            hidden = constrain(pick(hidden, here), "batch seq embed_act")
            targets, weights = at(targets), jnp.where(batch.trained < 0, 0.0, at(weights))
        sums = cross_entropy(hidden, out.unembed, targets, weights, self.z_loss, self.smoothing)
        count = jnp.sum(weights)
        scores = {"loss": Mean(total=sums.loss, count=count), "accuracy": Mean(total=sums.correct, count=count)}
        if self.z_loss or self.smoothing:
            scores["nll"] = Mean(total=sums.nll, count=count)
        return scores
