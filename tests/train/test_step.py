"""The step is one program: microbatches, devices and packing do not change what it computes."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import sharding
from mllm_jax.config import load
from mllm_jax.nn.param import merge
from mllm_jax.objectives import InfoNCE, NextToken, Sigmoid
from mllm_jax.recipe import Adam
from mllm_jax.sharding import Layout
from mllm_jax.train.feed import to_device
from mllm_jax.train.optimizer import build
from mllm_jax.train.state import Blueprint, make_state, trained_paths
from mllm_jax.train.step import make_step
from tests.synthetic import batch_for, clip, llava, randomized, siglip

CASES = {
    "mllm": (llava, {"lm": NextToken(z_loss=1e-4)}),
    "infonce": (clip, {"itc": InfoNCE()}),
    "sigmoid": (siglip, {"pairs": Sigmoid(), "itc": InfoNCE(weight=0.5)}),
}
LAYOUTS = {
    "data": Layout(mesh={"data": 8}),
    "fsdp": Layout(mesh={"fsdp": 8}),
    "tensor": Layout(mesh={"tensor": 2}),
    "two slices of fsdp-tensor": Layout(mesh={"data": 1, "fsdp": 2, "tensor": 2}, slices=2),
    "fsdp-tensor, 2 microbatches": Layout(mesh={"fsdp": 4, "tensor": 2}, microbatches=2),
    "4 microbatches": Layout(mesh={"data": 1}, microbatches=4),
    "rematerialized": Layout(mesh={"data": 1}, remat="full"),
    "kept by name": Layout(mesh={"data": 2, "fsdp": 2}, remat="qkv+attention"),
    "dots saved, unrolled": Layout(mesh={"data": 1}, remat="dots", unroll=2),
}
# Of recipes with parts that these cases do not have; each is another program, so that all axes at once must do.
RECIPES = ("resolution/llava_onevision",        # tiles, marks, means of tokens
           "projector/internvl",                # squares of patches, layers that are scaled
           "resampler/flamingo",                # tokens beside the row, rows of added tokens
           "experts/mm1")                       # convolutions over the patches of tiles
CASES |= {name: (lambda name=name: load(name).tiny().model, {"lm": NextToken()}) for name in RECIPES}
PAIRS = [(case, layout) for case in CASES for layout in (("two slices of fsdp-tensor",) if case in RECIPES else LAYOUTS)]
ONE = Layout(mesh={"data": 1})


def gradients(case: str, layout: Layout, rows: int = 8) -> tuple[dict, dict]:
    """(gradients, scores) of one step, as numpy, under this layout."""
    make, objectives = CASES[case]
    mesh = layout.make_mesh(jax.devices()[: layout.slices * int(np.prod(list(layout.mesh.values())))])
    with sharding.use(layout, mesh):
        blueprint = Blueprint(make(), layout, mesh)
        params = blueprint.init(0)
        params = {k: jax.device_put(v, blueprint.shapes[k].sharding) for k, v in randomized(params).items()}
        from mllm_jax.train import step as module

        gradient = module._gradient if layout.microbatches == 1 else module._accumulated(layout.microbatches)
        model = lambda p: merge(blueprint.graph, p)
        run = jax.jit(lambda p, b: gradient(model, objectives, p, b))
        grads, scores = run(params, to_device(batch_for(blueprint.cfg, rows), mesh))
        return jax.tree.map(np.asarray, grads), {k: float(v.value) for k, v in scores.items()}


@pytest.fixture(scope="module")
def alone() -> Callable:
    return cache(lambda case: gradients(case, ONE))


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_a_layout_changes_neither_loss_nor_gradient(case: str, layout: str, alone: Callable, capfd: pytest.CaptureFixture):
    grads, scores = gradients(case, LAYOUTS[layout])
    want, want_scores = alone(case)
    assert scores == pytest.approx(want_scores, rel=1e-5)
    # Noise where a gradient is 0 but for rounding, as that of a key's bias.
    noise = 1e-7 * max(1.0, *(np.abs(g).max() for g in want.values()))
    for name, g in want.items():
        # Relative to the largest entry of the tensor: float32 sums in another order.
        assert np.abs(grads[name] - g).max() <= 1e-5 * np.abs(g).max() + noise, name
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_so_does_splitting_parameters_where_their_names_do_not(alone: Callable, monkeypatch: pytest.MonkeyPatch):
    """Which only large ones are; here all of them, and a norm's scale lies on four devices."""
    monkeypatch.setattr(sharding, "LARGE", 1)
    layout = LAYOUTS["two slices of fsdp-tensor"]
    assert sharding.parameter_spec(("embed",), (64,), layout.rules, layout.make_mesh()) == jax.P(("fsdp", "tensor"))
    grads, scores = gradients("mllm", layout)
    want, want_scores = alone("mllm")
    assert scores == pytest.approx(want_scores, rel=1e-5)
    assert all(np.abs(grads[k] - g).max() <= 1e-5 * np.abs(g).max() + 1e-7 for k, g in want.items())


def test_frozen_parameters_keep_every_bit_and_cost_no_gradient():
    with sharding.use(ONE, mesh := ONE.make_mesh(jax.devices()[:1])):
        blueprint = Blueprint(llava(), ONE, mesh)
        trained = trained_paths(blueprint.shapes, ("inputs/image/connector/*", "decoder/blocks/*/attn/*"))
        optimizer = build(Adam(lr=1e-2, weight_decay=0.1), 50, sorted(trained))
        state = make_state(blueprint.init(0), trained, optimizer, blueprint)
        before = jax.tree.map(np.asarray, state)
        step = jax.jit(make_step(blueprint.graph, {"lm": NextToken()}, optimizer))
        batch = batch_for(blueprint.cfg)
        for _ in range(50):
            state, scores = step(state, batch, jax.random.key(0))
    for name, value in before.frozen.items():
        assert value.tobytes() == np.asarray(state.frozen[name]).tobytes(), name
    for name, value in before.params.items():
        assert np.any(value != np.asarray(state.params[name])), name
    moments = [k.key for k, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0] for k in k if hasattr(k, "key")]
    assert set(moments) == trained


def test_no_gradient_is_computed_for_frozen_parameters():
    """Seen in the compiled program: with the tower frozen, its operations are those of a forward pass."""
    with sharding.use(ONE, mesh := ONE.make_mesh(jax.devices()[:1])):
        blueprint = Blueprint(llava(), ONE, mesh)
        batch = batch_for(blueprint.cfg)

        def flops(globs: tuple[str, ...]) -> float:
            trained = trained_paths(blueprint.shapes, globs)
            params = {k: v for k, v in blueprint.shapes.items() if k in trained}
            frozen = {k: v for k, v in blueprint.shapes.items() if k not in trained}
            loss = lambda p, f: NextToken().score(merge(blueprint.graph, {**f, **p})(batch), batch)["loss"].value
            return jax.jit(jax.grad(loss)).lower(params, frozen).compile().cost_analysis()["flops"]

        everything, connector, head = flops(("*",)), flops(("inputs/image/connector/*",)), flops(("decoder/norm/*",))
        encode = lambda f: merge(blueprint.graph, f).inputs["image"].encoder(batch.media["image"]).tokens
        encoder = jax.jit(encode).lower(dict(blueprint.shapes)).compile().cost_analysis()["flops"]
    # Training all does the tower's forward pass and twice as much again; frozen, it is done once.
    assert everything - connector > 1.8 * encoder
    # Only the last norm trains: nothing is sent back through the decoder either, which costs as much as going forward.
    assert head < 0.8 * connector


def test_padding_rows_change_nothing():
    model = llava()
    with sharding.use(ONE, mesh := ONE.make_mesh(jax.devices()[:1])):
        blueprint = Blueprint(model, ONE, mesh)
        params = randomized(blueprint.init(0))
        batch = batch_for(model, rows=4)
        none = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
        score = jax.jit(lambda b: NextToken().score(merge(blueprint.graph, params)(b), b))
        one, two = score(batch), score(none)
    for name in one:
        assert float(one[name].value) == pytest.approx(float(two[name].value), rel=1e-6)


def test_lr_scale_and_no_decay_by_hand():
    params = {"a/kernel": jnp.ones(2), "a/bias": jnp.ones(2), "b/kernel": jnp.ones(2)}
    cfg = Adam(lr=0.1, warmup=0, schedule="constant", weight_decay=0.5, clip=None, lr_scale={"b/*": 0.1})
    optimizer = build(cfg, 10, params)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 3.0), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # Adam's first update is the sign of the gradient; decay adds weight_decay * parameter.
    assert updates["a/kernel"] == pytest.approx(-0.1 * (1 + 0.5), rel=1e-5)
    assert updates["a/bias"] == pytest.approx(-0.1, rel=1e-5)
    assert updates["b/kernel"] == pytest.approx(-0.01 * (1 + 0.5), rel=1e-5)
    optimizer = build(replace(cfg, decays=("a/*",)), 10, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert updates["a/kernel"] == pytest.approx(-0.1 * (1 + 0.5), rel=1e-5)
    assert updates["b/kernel"] == pytest.approx(-0.01, rel=1e-5)


def test_globs_that_match_nothing_are_errors():
    from mllm_jax.config import ConfigError

    with pytest.raises(ConfigError, match=r"'inputs/image/conector/\*', which matches no parameter; nearest: .*connector"):
        trained_paths(["inputs/image/connector/layers/0/kernel", "decoder/head"], ("inputs/image/conector/*",))
    with pytest.raises(ConfigError, match="lr_scale names 'x/\\*', which matches none of the 1"):
        build(Adam(lr=1.0, lr_scale={"x/*": 0.1}), 10, ["a/kernel"])
    with pytest.raises(ConfigError, match="decays names 'x/\\*', which matches none of the 1"):
        build(Adam(lr=1.0, decays=("x/*",)), 10, ["a/kernel"])


def test_ema_follows_the_parameters():
    with sharding.use(ONE, mesh := ONE.make_mesh(jax.devices()[:1])):
        blueprint = Blueprint(clip(), ONE, mesh)
        trained = trained_paths(blueprint.shapes, ("*",))
        optimizer = build(Adam(lr=1e-2), 10, sorted(trained))
        state = make_state(blueprint.init(0), trained, optimizer, blueprint, ema=True)
        start = jax.tree.map(np.asarray, state.params)
        state, _ = jax.jit(make_step(blueprint.graph, {"itc": InfoNCE()}, optimizer, ema=0.9))(state, batch_for(blueprint.cfg), jax.random.key(0))
    name = "project/text/kernel"
    np.testing.assert_allclose(state.ema[name], 0.9 * start[name] + 0.1 * np.asarray(state.params[name]), rtol=1e-5, atol=1e-7)
