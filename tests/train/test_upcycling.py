"""A sparse model that begins as a dense one is that dense model, until it trains (arXiv:2212.05055)."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import sharding
from mllm_jax.decoders.layers import Layer
from mllm_jax.nn.moe import MoEConfig
from mllm_jax.nn.param import merge
from mllm_jax.recipe import Adam
from mllm_jax.sharding import Layout
from mllm_jax.train.checkpoint import CheckpointError, Checkpoints
from mllm_jax.train.initial import initial_params
from mllm_jax.train.optimizer import build
from mllm_jax.train.state import Blueprint, make_state, trained_paths
from tests.synthetic import batch_for, llava, randomized

LAYOUT = Layout(mesh={"data": 2, "fsdp": 2, "expert": 2})
# Room for all: ceil(2 * 48 * 2 / 4) = 48 positions, a whole row.
MOE = MoEConfig(experts=4, capacity=2.0, explore=True)


def model(*cycle: Layer):
    dense = llava()
    return replace(dense, decoder=replace(dense.decoder, depth=3, mlp_bias=True, cycle=cycle))


DENSE, SPARSE = model(Layer()), model(Layer(mlp=MOE), Layer())


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> tuple[Path, dict]:
    """A run whose stage `dense` trained a part of the dense model; all parameters."""
    run = tmp_path_factory.mktemp("run")
    blueprint = Blueprint(DENSE, LAYOUT, LAYOUT.make_mesh())
    optimizer = build(Adam(lr=1e-3), 1, sorted(trained := trained_paths(blueprint.shapes, ("decoder/blocks/0/mlp/*",))))
    params = {k: jax.device_put(v, blueprint.shapes[k].sharding) for k, v in randomized(blueprint.init(0)).items()}
    state = make_state(params, trained, optimizer, blueprint)
    checkpoints = Checkpoints(run / "stages" / "dense")
    checkpoints.save_frozen(state.frozen)
    checkpoints.save(1, state, {}, {})
    checkpoints.close()
    return run, params


def begin(blueprint: Blueprint, run: Path, sources: dict) -> dict:
    return initial_params(blueprint, sources, run_dir=run, runs=run.parent, previous=None, seed=1, from_hf=None)


def test_the_sparse_model_begins_as_the_dense_one(dense: tuple):
    run, params = dense
    with sharding.use(LAYOUT, mesh := LAYOUT.make_mesh()):
        sparse = Blueprint(SPARSE, LAYOUT, mesh)
        begun = begin(sparse, run, {"*": "stage://dense"})
        assert begun.keys() == sparse.shapes.keys() and all(begun[k].sharding == sparse.shapes[k].sharding for k in begun)
        batch = batch_for(SPARSE)
        seeds = np.arange(len(batch.tokens), dtype=np.uint32)
        outputs = lambda blueprint, params: jax.jit(lambda p, b: merge(blueprint.graph, p)(b))(params, replace(batch, draws=seeds))
        want, got = outputs(Blueprint(DENSE, LAYOUT, mesh), params), outputs(sparse, begun)
    # Sums of 32 and 64 products of order 1, in another order.
    real = batch.segments > 0
    np.testing.assert_allclose(np.asarray(got.hidden)[real], np.asarray(want.hidden)[real], atol=1e-5)
    assert got.aux["router/dropped"].value == 0 and got.aux["router/entropy"].value > 0.5 and not want.aux
    experts = np.asarray(begun["decoder/blocks/0/mlp/experts/up/kernel"])
    assert experts.shape == (2, 4, 32, 64)
    assert all(np.array_equal(experts[:, e], params["decoder/blocks/0/mlp/up/kernel"][::2]) for e in range(4))
    assert jnp.any(begun["decoder/blocks/0/mlp/router"] != 0)


def test_a_dense_model_grows_into_other_turns_too(dense: tuple):
    """Layers 0 and 2 of three in one stack, layer 1 in another; and all of them sparse, in one."""
    run, params = dense
    for cycle in ((Layer(), Layer(window=9)), (Layer(mlp=MOE),)):
        begun = begin(Blueprint(model(*cycle), LAYOUT, LAYOUT.make_mesh()), run, {"*": "stage://dense"})
        for j in range(len(cycle)):
            name = "attn/q/kernel"
            assert np.array_equal(begun[f"decoder/blocks/{j}/{name}"], params[f"decoder/blocks/0/{name}"][j :: len(cycle)])
    assert np.array_equal(begun["decoder/blocks/0/mlp/experts/down/bias"][:, 3], params["decoder/blocks/0/mlp/down/bias"])


def test_what_the_stage_should_have_had_is_still_missed(dense: tuple):
    other = replace(SPARSE, decoder=replace(SPARSE.decoder, out_bias=True))
    with pytest.raises(CheckpointError, match="no parameter 'decoder/blocks/0/attn/o/bias'"):
        begin(Blueprint(other, LAYOUT, LAYOUT.make_mesh()), dense[0], {"*": "stage://dense"})
    deeper = replace(SPARSE, decoder=replace(SPARSE.decoder, depth=5))
    with pytest.raises(CheckpointError, match=r"no parameter 'decoder/blocks/0/mlp/experts/|has shape \(3, .*; the model wants \(3, "):
        begin(Blueprint(deeper, LAYOUT, LAYOUT.make_mesh()), dense[0], {"*": "stage://dense"})
