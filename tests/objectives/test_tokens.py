import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.objectives import NextToken
from mllm_jax.objectives.cross_entropy import cross_entropy
from mllm_jax.types import Batch, Outputs


def case(seed=0):
    rng = np.random.default_rng(seed)
    hidden, unembed = rng.normal(size=(2, 6, 5)), rng.normal(size=(5, 9))
    targets, weights = rng.integers(0, 9, (2, 6)), (rng.random((2, 6)) < 0.6) * 1.0
    return tuple(jnp.asarray(x, jnp.float32) for x in (hidden, unembed)) + (jnp.asarray(targets), jnp.asarray(weights, jnp.float32))


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothed_targets_are_those_of_torch(torch, smoothing):
    """Loss and gradients; both sums are of float32 numbers of order 1."""
    hidden, unembed, targets, weights = case()
    value, gradients = jax.value_and_grad(
        lambda h, u: cross_entropy(h, u, targets, weights, smoothing=smoothing).loss / weights.sum(), (0, 1))(hidden, unembed)
    h, u = (torch.tensor(np.asarray(x), requires_grad=True) for x in (hidden, unembed))
    labels = torch.tensor(np.where(weights > 0, targets, -100)).flatten().long()
    theirs = torch.nn.functional.cross_entropy((h @ u).flatten(0, 1), labels, label_smoothing=smoothing)
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-6)
    for mine, x in zip(gradients, (h, u)):
        np.testing.assert_allclose(mine, x.grad, atol=1e-6)


def test_what_is_logged_is_not_smoothed():
    hidden, unembed, targets, weights = case()
    nothing = jnp.zeros((2, 6, 3), jnp.int32)
    batch = Batch(tokens=targets, targets=targets, weights=weights, segments=targets, positions=nothing, kinds=targets)
    score = lambda smoothing: NextToken(smoothing=smoothing).score(Outputs(hidden=hidden, unembed=unembed), batch)
    plain, smooth = score(0.0), score(0.1)
    np.testing.assert_allclose(smooth["nll"].value, plain["loss"].value, rtol=1e-6)
    assert abs(float(smooth["loss"].value - plain["loss"].value)) > 1e-3
