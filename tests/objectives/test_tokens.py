from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.objectives import NextToken
from mllm_jax.objectives import cross_entropy as module
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


@pytest.mark.parametrize("n", [4, 6])
def test_a_loss_of_the_trained_positions_is_the_loss_of_all(n: int):
    """Where the batch names them: values, and gradients at every position; -1 stands behind the last."""
    hidden, unembed, targets, weights = case(1)
    there = [np.flatnonzero(row) for row in np.asarray(weights)]
    assert max(map(len, there)) <= 4 and min(map(len, there)) < 4
    nothing = jnp.zeros((2, 6, 3), jnp.int32)
    batch = Batch(tokens=targets, targets=targets, weights=weights, segments=targets, positions=nothing, kinds=targets)
    named = replace(batch, trained=jnp.asarray([np.pad(row, (0, n - len(row)), constant_values=-1) for row in there]))

    def run(batch):
        def loss(hidden, unembed):
            scores = NextToken(z_loss=1e-2).score(Outputs(hidden=hidden, unembed=unembed), batch)
            return scores["loss"].value, {k: (v.total, v.count) for k, v in scores.items()}
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembed)

    for got, want in zip(jax.tree.leaves(run(named)), jax.tree.leaves(run(batch)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_on_accelerators_the_loop_is_as_long_as_what_it_is_given(monkeypatch: pytest.MonkeyPatch):
    """A plan counts its turns, so that it must not depend on data; the sums are those of a loop that does."""
    hidden, unembed, targets, weights = case()
    monkeypatch.setattr(module, "CHUNK_FLOATS", 36)             # two columns at a time
    run = jax.jit(jax.value_and_grad(lambda h, u: module.cross_entropy(h, u, targets, weights).loss, (0, 1)))
    want, some = run(hidden, unembed), str(jax.make_jaxpr(run)(hidden, unembed))
    monkeypatch.setattr(module, "platform", lambda: "tpu")
    run = jax.jit(jax.value_and_grad(lambda h, u: module.cross_entropy(h, u, targets, weights).loss, (0, 1)))
    for got, expected in zip(jax.tree.leaves(run(hidden, unembed)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    all_of_them = str(jax.make_jaxpr(run)(hidden, unembed))
    assert "while[" in some and "while[" not in all_of_them and "scan[" in all_of_them
