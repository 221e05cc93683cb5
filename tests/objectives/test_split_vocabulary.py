"""The loss under a matrix split over the chips is that of the whole matrix, on every mesh and with every cut of the work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax import sharding
from mllm_jax.objectives import NextToken, split_vocabulary
from mllm_jax.objectives import cross_entropy as ce
from mllm_jax.sharding import BATCH_AXES, Layout
from mllm_jax.types import Batch, Outputs

B, S, D, V = 8, 6, 16, 50
# (mesh, bytes of a group's tokens, logits at a time) -> chips that share tokens, columns of a block, turns
WAYS = {
    "two groups, the last block begins in the one before": ({"data": 1, "fsdp": 8, "tensor": 1}, 1 << 28, 100, (4, 4, 4)),
    "all axes": ({"data": 2, "fsdp": 2, "tensor": 2}, 1 << 28, 100, (2, 4, 4)),
    "no room for other tokens": ({"data": 2, "fsdp": 4}, 1, 100, (1, 16, 4)),
    "experts are rows too": ({"fsdp": 2, "expert": 4}, 1 << 28, 100, (4, 4, 4)),
}


def case() -> tuple:
    rng = np.random.default_rng(0)
    hidden, unembed = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, S, D), (D, V)))
    weights = (rng.random((B, S)) < 0.5) * rng.random((B, S))
    return hidden, unembed, jnp.asarray(rng.integers(0, V, (B, S))), jnp.asarray(weights, jnp.float32)


def whole(hidden, unembed, targets, weights, z_loss, smoothing):
    """Written out with all logits at once: loss, nll, right guesses."""
    logits = jnp.einsum("bsd,dv->bsv", hidden, unembed)
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = (1 - smoothing) * nll + smoothing * (lse - jnp.mean(logits, axis=-1)) + z_loss * lse**2
    return jnp.sum(weights * loss), jnp.sum(weights * nll), jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets))


@pytest.mark.parametrize("way", WAYS)
def test_sums_and_gradients_are_those_of_the_whole_matrix(way: str, monkeypatch: pytest.MonkeyPatch):
    mesh, room, floats, cut = WAYS[way]
    monkeypatch.setattr(split_vocabulary, "TOKEN_BYTES", room)
    monkeypatch.setattr(split_vocabulary, "LANES", 4)
    monkeypatch.setattr(ce, "CHUNK_FLOATS", floats)
    layout, (hidden, unembed, targets, weights) = Layout(mesh=mesh), case()
    with sharding.use(layout, mesh := layout.make_mesh()):
        split = split_vocabulary.plan(hidden, unembed, floats)
        assert (split.g, split.block, split.turns) == cut
        where = NamedSharding(mesh, P(tuple(a for a in BATCH_AXES if a in mesh.shape)))
        given = (jax.device_put(hidden, where),
                 jax.device_put(unembed, sharding.sharding_of(("embed", "vocab"), unembed.shape, layout, mesh)))

        def loss(hidden, unembed):
            sums = ce.cross_entropy(hidden, unembed, targets, weights, 1e-2, 0.1)
            return 3 * sums.loss, sums          # a factor that the backward pass must not forget

        (got, sums), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*given)
    want, expected = jax.value_and_grad(lambda *a: whole(*a, targets, weights, 1e-2, 0.1)[0], (0, 1))(hidden, unembed)
    _, nll, right = whole(hidden, unembed, targets, weights, 1e-2, 0.1)
    # float32 sums of 50 numbers in another order
    np.testing.assert_allclose([got / 3, sums.nll, sums.correct], [want, nll, right], rtol=1e-6)
    for mine, theirs in zip(gradients, expected):
        assert np.abs(mine / 3 - theirs).max() <= 1e-6 * np.abs(theirs).max()


def test_a_frozen_matrix_has_no_gradient_and_costs_none():
    """Seen in the traced program: two matmuls for the gradient of one operand, and one more for the other."""
    layout, (hidden, unembed, targets, weights) = Layout(mesh={"fsdp": 8}), case()
    with sharding.use(layout, layout.make_mesh()):
        loss = lambda hidden, unembed: ce.cross_entropy(hidden, unembed, targets, weights).loss
        matmuls = lambda *wanted: str(jax.make_jaxpr(jax.grad(loss, wanted))(hidden, unembed)).count("dot_general[")
        assert matmuls(0) == matmuls(1) == 3 and matmuls(0, 1) == 4


def test_a_matrix_that_no_axis_of_rows_splits_stays_whole():
    hidden, unembed, _, _ = case()
    for mesh in ({"data": 8}, {"data": 4, "tensor": 2}):
        layout = Layout(mesh=mesh)
        with sharding.use(layout, layout.make_mesh()):
            assert split_vocabulary.plan(hidden, unembed, 100) is None
            assert split_vocabulary.plan(hidden, unembed[:-1], 100) is None


def test_trained_positions_are_gathered_on_a_mesh_as_well(capfd: pytest.CaptureFixture):
    """Where the batch names them: the loss and gradients of all positions, and no array copied to every device on the way."""
    hidden, unembed, targets, weights = case()
    there = [np.flatnonzero(row) for row in np.asarray(weights)]
    trained = jnp.asarray([np.pad(row, (0, 5 - len(row)), constant_values=-1) for row in there])
    layout = Layout(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use(layout, mesh := layout.make_mesh()):
        put = lambda x: jax.device_put(x, sharding.rows(mesh))
        matrix = jax.device_put(unembed, sharding.sharding_of(("embed", "vocab"), unembed.shape, layout, mesh))
        batch = Batch(tokens=put(targets), targets=put(targets), weights=put(weights), segments=put(targets), kinds=put(targets),
                      positions=put(jnp.zeros((B, S, 3), jnp.int32)), trained=put(trained))
        score = lambda hidden, unembed, batch: NextToken().score(Outputs(hidden=hidden, unembed=unembed), batch)["loss"].total
        got, gradients = jax.jit(jax.value_and_grad(score, (0, 1)))(put(hidden), matrix, batch)
    want, expected = jax.value_and_grad(lambda *a: whole(*a, targets, weights, 0.0, 0.0)[0], (0, 1))(hidden, unembed)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    for mine, theirs in zip(gradients, expected):
        assert np.abs(mine - theirs).max() <= 1e-6 * np.abs(theirs).max()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
