"""A loss that the model computes of itself: it is the one it names, and it counts by its weight."""

import jax.numpy as jnp
import pytest

from mllm_jax.objectives import Auxiliary
from mllm_jax.train.step import score, total_loss
from mllm_jax.types import Mean, Outputs

OUT = Outputs(aux={"router/balance": Mean(total=jnp.float32(6), count=jnp.float32(4)), "router/z": Mean(total=jnp.float32(8), count=jnp.float32(4))})


def test_each_loss_counts_by_its_weight():
    objectives = {"balance": Auxiliary(name="router/balance", weight=0.5), "z": Auxiliary(name="router/z", weight=0.25)}
    scores = score(objectives, OUT, None)
    assert float(scores["balance/loss"].value) == 1.5 and float(scores["z/loss"].value) == 2.0
    assert float(total_loss(objectives, scores)) == 0.5 * 1.5 + 0.25 * 2.0


def test_a_loss_that_the_model_does_not_have_is_named_with_those_it_has():
    with pytest.raises(KeyError, match="no auxiliary loss 'router/balanced'; it has router/balance, router/z"):
        Auxiliary(name="router/balanced").score(OUT, None)
