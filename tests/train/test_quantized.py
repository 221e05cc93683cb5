"""A model that trains in int8 learns what it learns in float32, on parameters and checkpoints that are the same."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mllm_jax import sharding
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam
from mllm_jax.sharding import Layout
from mllm_jax.train.optimizer import build
from mllm_jax.train.state import Blueprint, TrainState, make_state, trained_paths
from mllm_jax.train.step import make_step
from tests.synthetic import batch_for, llava

STEPS = 60


def wide():
    """Wide enough for the noise of a sum to be that of a real layer."""
    model = llava()
    return replace(model, decoder=replace(model.decoder, width=128, mlp=256))


def trained(quantize: str) -> tuple[TrainState, list[float]]:
    """The state after some passes over four batches, with the tower frozen, and the losses."""
    layout = Layout(mesh={"data": 1}, quantize=quantize)
    with sharding.use(layout, mesh := layout.make_mesh(jax.devices()[:1])):
        blueprint = Blueprint(wide(), layout, mesh)
        paths = trained_paths(blueprint.shapes, ("inputs/image/connector/*", "decoder/*"))
        optimizer = build(Adam(lr=3e-3), STEPS, sorted(paths))
        state = make_state(blueprint.init(0), paths, optimizer, blueprint)
        step = jax.jit(make_step(blueprint.graph, {"lm": NextToken()}, optimizer))
        losses = []
        for t in range(STEPS):
            state, scores = step(state, batch_for(blueprint.cfg, 4, seed=t % 4), jax.random.key(0))
            losses.append(float(scores["loss"].value))
    return state, losses


@pytest.fixture(scope="module")
def both():
    return trained("none"), trained("int8")


def test_the_loss_falls_as_it_does_in_float32(both):
    (_, want), (_, losses) = both
    assert losses[0] != want[0] and losses[0] == pytest.approx(want[0], rel=0.01)
    last = lambda x: np.mean(x[-4:])
    assert last(want) < 0.5 * want[0]
    # Rows of eight tokens are learned by heart, which is where noise tells; five in a hundred of what was learned.
    assert last(losses) - last(want) <= 0.05 * (want[0] - last(want))


def test_the_state_is_the_same_but_for_its_values(both):
    (whole, _), (state, _) = both
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kind(state) == kind(whole)
    assert all(np.array_equal(state.frozen[k], whole.frozen[k]) for k in whole.frozen) and whole.frozen
