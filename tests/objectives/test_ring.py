"""Losses over rows that go round the devices are those of the matrix of all pairs, on every mesh and in blocks of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax import sharding
from mllm_jax.objectives import ring
from mllm_jax.objectives.ring import Kind, contrast
from mllm_jax.sharding import BATCH_AXES, Layout

B, D = 16, 6
KINDS = {
    "sigmoid": Kind(softmax=False),
    "infonce": Kind(softmax=True),
    "smoothed": Kind(softmax=True, smoothing=0.1),
    "candidates do not learn": Kind(softmax=True, smoothing=0.1, candidates_learn=False),
}
MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8, "fsdp": 1}, {"data": 1, "fsdp": 8, "tensor": 1}, {"fsdp": 2, "expert": 4}, None)


def whole(kind: Kind, x, y, scale, bias, real):
    """Written out with the matrix of all pairs: (sum of losses, rows that find their partner)."""
    def logits(x, y):
        products = jnp.einsum("bnd,cmd->bcnm", x.reshape(len(x), -1, D), y.reshape(len(y), -1, D))
        return scale * jnp.max(products, axis=(2, 3)) + bias

    among, eye = (real[:, None] * real) > 0, jnp.eye(len(x))
    stop = (lambda a: a) if kind.candidates_learn else jax.lax.stop_gradient
    hits = jnp.sum(real * (jnp.argmax(jnp.where(real > 0, logits(x, y), -1e30), axis=1) == jnp.arange(len(x))))
    if not kind.softmax:
        return jnp.sum(jnp.where(among, -jax.nn.log_sigmoid((2 * eye - 1) * logits(x, y)), 0)), hits
    total = 0.0
    for forth in (logits(x, stop(y)), logits(stop(x), y).T):
        log_p = jax.nn.log_softmax(jnp.where(among, forth, -1e30), axis=1)
        target = (1 - kind.smoothing) * eye + kind.smoothing * real / jnp.sum(real)
        total -= jnp.sum(real * jnp.sum(jnp.where(among, target * log_p, 0), axis=1)) / 2
    return total, hits


def case(several: bool) -> tuple:
    """Rows 3 and 9 hold no example; the texts of rows 4 and 5 are one, so that their images are as like to both.

    Numbers are multiples of 1/8, whose products are exact: in blocks of another shape other products would not tie.
    """
    rng = np.random.default_rng(0)
    unit = lambda *shape: (lambda a: np.round(8 * a / np.linalg.norm(a, axis=-1, keepdims=True)) / 8)(rng.normal(size=shape))
    y = unit(B, D)
    x = unit(B, 3, D) if several else np.round(4 * y + 4 * unit(B, D)) / 8
    y[5], real = y[4], np.ones(B)
    real[[3, 9]] = 0
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, y, 5.0, -2.0, real))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_losses_gradients_and_hits_are_those_of_all_pairs(mesh: dict | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ring, "BLOCK_FLOATS", 2 * B if mesh is None else 6)         # several blocks a visit
    layout = Layout(mesh=mesh or {"data": 1})
    with sharding.use(layout, mesh := layout.make_mesh(None if mesh else jax.devices()[:1])):
        rows = NamedSharding(mesh, P(tuple(a for a in BATCH_AXES if a in mesh.shape)))
        for name, kind in KINDS.items():
            given = case(several="candidates" in name)
            loss = lambda f, *given, kind=kind: (lambda total, hits: (3 * total, hits))(*f(kind, *given))
            grad = lambda f, loss=loss: jax.value_and_grad(lambda *given: loss(f, *given), (0, 1, 2, 3), has_aux=True)
            placed = [jax.device_put(a, rows) if a.ndim else a for a in given]
            (got, hits), gradients = jax.jit(grad(contrast))(*placed)
            (want, found), expected = grad(whole)(*given)
            # float32 sums of 256 numbers in another order
            assert float(got) == pytest.approx(float(want), rel=1e-6) and float(hits) == float(found) > 0, name
            for mine, theirs in zip(gradients, expected):
                # Those of scale and bias are sums of positive and negative terms that are 3 for each row; that of a softmax's bias is 0.
                size = np.abs(theirs).max() if theirs.ndim else 3 * B
                assert np.abs(mine - theirs).max() <= 1e-6 * max(1, size), name


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_no_row_is_beaten_by_itself_where_logits_are_not_exact(mesh: dict | None, monkeypatch: pytest.MonkeyPatch):
    """XLA may round a logit in two ways in one program, where it is kept and where it is compared."""
    monkeypatch.setattr(ring, "BLOCK_FLOATS", 2 * B if mesh is None else 6)
    layout = Layout(mesh=mesh or {"data": 1})
    x, y, *_, real = case(several=False)
    given = x, y, jnp.float32(4.7), jnp.float32(-2.3), real
    with sharding.use(layout, layout.make_mesh(None if mesh else jax.devices()[:1])):
        for name in ("sigmoid", "infonce"):
            _, hits = jax.jit(lambda *given, kind=KINDS[name]: contrast(kind, *given))(*given)
            assert float(hits) == float(whole(KINDS[name], *given)[1]) > 0, name


def test_rows_that_do_not_divide_over_the_devices_are_compared_all_the_same():
    """A batch of evaluation, or a model of a few rows."""
    layout, given = Layout(mesh={"data": 8}), [a[:6] if a.ndim else a for a in case(several=False)]
    with sharding.use(layout, layout.make_mesh()):
        got = jax.jit(lambda *given: contrast(KINDS["infonce"], *given)[0])(*given)
    assert float(got) == pytest.approx(float(whole(KINDS["infonce"], *given)[0]), rel=1e-6)


@pytest.mark.parametrize("learn", [True, False])
def test_a_frozen_side_has_no_gradient_and_costs_none(learn: bool):
    """The others are what they are when all learn; matmuls: of the loss, again for gradients, and one for each side that learns."""
    given, kind = case(several=False), Kind(softmax=True, candidates_learn=learn)
    loss = lambda *given: contrast(kind, *given)[0]
    everything = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*given)
    for wanted, matmuls in (((0,), 3), ((1,), 3), ((2, 3), 2)):
        for got, want in zip(jax.jit(jax.grad(loss, wanted))(*given), (everything[i] for i in wanted), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        traced = str(jax.make_jaxpr(jax.grad(loss, wanted))(*given)).count("dot_general[")
        assert traced == matmuls + (not learn and wanted != (2, 3)), wanted      # of two directions one is left for the compiler to drop
