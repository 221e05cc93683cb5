"""A sparse decoder trains on a mesh of experts as on one device, and says what its router does."""

import jax
import numpy as np
import pytest

from mllm_jax import sharding
from mllm_jax.config import load
from mllm_jax.launch.layouts import find
from mllm_jax.train.feed import to_device
from mllm_jax.train.log import to_numbers
from mllm_jax.train.optimizer import build
from mllm_jax.train.state import Blueprint, make_state, trained_paths
from mllm_jax.train.step import make_step
from tests.synthetic import batch_for

STEPS = 3


def run(name: str) -> tuple[list[dict], dict, Blueprint]:
    """(scores of each step, the trained parameters after them) of the last stage of MoE-LLaVA."""
    recipe, layout = load("experts/moe_llava").tiny(), find(name, "cpu")
    stage = recipe.stages["experts"]
    mesh = layout.make_mesh(jax.devices()[: int(np.prod(list(layout.mesh.values())))])
    with sharding.use(layout, mesh):
        blueprint = Blueprint(recipe.model, layout, mesh)
        trained = trained_paths(blueprint.shapes, stage.train)
        optimizer = build(stage.optimizer, STEPS, sorted(trained))
        params = {k: jax.device_put(v, blueprint.shapes[k].sharding) for k, v in blueprint.init(0).items()}
        state = make_state(params, trained, optimizer, blueprint)
        step = jax.jit(make_step(blueprint.graph, stage.objectives, optimizer), donate_argnums=0)
        batch, scores = to_device(batch_for(recipe.model), mesh), []
        for _ in range(STEPS):
            state, means = step(state, batch, jax.random.key(0))
            scores.append(to_numbers(means))
        return scores, jax.tree.map(np.asarray, state.params), blueprint


@pytest.fixture(scope="module")
def alone() -> tuple:
    return run("cpu-1")


def test_a_mesh_of_experts_trains_as_one_device(alone: tuple):
    want, want_params, _ = alone
    scores, params, blueprint = run("cpu-8-experts")
    for got, one in zip(scores, want):
        # Float32 sums in another order; the shares of choices would show a single token that went elsewhere.
        assert got == pytest.approx(one, rel=1e-5, abs=1e-6)
    for name, w in want_params.items():
        # An update of Adam is about the learning rate, 2e-5, whatever the gradient: rounding moves it by parts of that.
        np.testing.assert_allclose(params[name], w, atol=2e-6, err_msg=name)
    kernel = blueprint.shapes["decoder/blocks/0/mlp/experts/up/kernel"]
    assert kernel.sharding.spec[1] == "expert" and kernel.sharding.shard_shape(kernel.shape)[1] == 1


def test_the_log_says_what_the_router_does(alone: tuple):
    scores, *_ = alone
    first = scores[0]
    assert {k for k in first if k.startswith("router/")} == {f"router/{x}" for x in ("balance", "z", "entropy", "most", "least", "dropped")}
    assert first["balance/loss"] == first["router/balance"] >= 0.9
    assert 0 <= first["router/least"] <= 1 / 4 <= first["router/most"] <= 1 and 0 <= first["router/dropped"] < 0.5
    assert first["loss"] == pytest.approx(first["lm/loss"] + 0.12 * first["balance/loss"], rel=1e-6)
