"""Sparse layers against the dense one, transformers' Mixtral and deepspeed's gate; on one device and on meshes."""

import functools
from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.mlp import MLP
from mllm_jax.nn.moe import MoEConfig, choose, gumbel, queue, route
from mllm_jax.nn.param import axes_of, merge, split
from mllm_jax.sharding import Layout, sharding_of, use
from tests.golden.official import read

B, S, D, F = 8, 12, 16, 24
GATED = BlockConfig(width=D, heads=2, mlp=F)
PLAIN = replace(GATED, gated=False, activation="gelu_tanh", mlp_bias=True)
DROPLESS, TIGHT = MoEConfig(experts=4), MoEConfig(experts=4, capacity=0.6)
X = jax.random.normal(jax.random.key(1), (B, S, D))
PULL = jax.random.normal(jax.random.key(2), (B, S, D))
MASK = jnp.arange(S) < jnp.array([12, 12, 9, 12, 3, 12, 0, 1])[:, None]
DRAWS = jnp.arange(B, dtype=jnp.uint32)


@functools.cache
def layer(cfg, block=PLAIN):
    """Structure, weights with biases away from zero, and their axes."""
    module = cfg.build(block, rngs=nnx.Rngs(0))
    graph, params = split(module)
    return graph, {k: v + 0.1 * jax.random.normal(jax.random.key(i), v.shape) for i, (k, v) in enumerate(params.items())}, axes_of(module)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, x, mask=MASK, draws=DRAWS):
    return merge(graph, params)(x, mask, draws)


def loss(graph, params, x, mask=MASK, draws=DRAWS):
    y, aux = merge(graph, params)(x, mask, draws)
    return jnp.sum(y * PULL[: len(x)]) + 3 * aux["router/balance"].value + aux["router/z"].value


gradients = jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)


def close(a, b, tolerance=1e-5):
    """Relative to the largest number of each array: sums of hundreds of products in another order."""
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        scale = max(float(np.abs(want).max()), 1.0)
        np.testing.assert_allclose(got, want, atol=tolerance * scale, rtol=0, err_msg=str(path))


@pytest.mark.parametrize("block", [GATED, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize("cfg", [DROPLESS, replace(TIGHT, capacity=4.0)], ids=["dropless", "capacity"])
def test_experts_that_are_all_alike_are_the_dense_layer(cfg, block):
    dense = MLP(block, rngs=nnx.Rngs(3))
    _, weights = split(dense)
    graph, params, _ = layer(cfg, block)
    params |= {f"experts/{k}": jnp.broadcast_to(v, (4, *v.shape)) for k, v in weights.items()}
    y, aux = run(graph, params, X)
    np.testing.assert_allclose(y, dense(X) * MASK[..., None], atol=1e-6)
    assert float(aux["router/dropped"].value) == 0


def test_values_gradients_and_the_balance_loss_are_those_of_mixtral(torch):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    hf = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=6, num_experts_per_tok=2)
    theirs = MixtralSparseMoeBlock(hf)
    graph, params, _ = layer(MoEConfig(experts=6, balance=2), GATED)
    tensor = lambda x: torch.tensor(np.asarray(x))
    with torch.no_grad():
        theirs.gate.weight.copy_(tensor(params["router"].T))
        both = [params[f"experts/{n}/kernel"] for n in ("gate", "up")]
        theirs.experts.gate_up_proj.copy_(tensor(jnp.swapaxes(jnp.concatenate(both, axis=2), 1, 2)))
        theirs.experts.down_proj.copy_(tensor(jnp.swapaxes(params["experts/down/kernel"], 1, 2)))
    x = tensor(X).requires_grad_()
    y = theirs(x * 1.0)
    logits, _, _ = theirs.gate(x)
    balance = load_balancing_loss_func((logits,), 6, 2, tensor(MASK))
    z = (torch.logsumexp(logits, -1).square() * tensor(MASK).flatten()).sum() / int(MASK.sum())
    ((y * tensor(MASK)[..., None] * tensor(PULL)).sum() + 3 * balance + z).backward()
    ours, aux = run(graph, params, X)
    np.testing.assert_allclose(ours, y.detach() * tensor(MASK)[..., None], atol=1e-5)
    assert float(aux["router/balance"].value) == pytest.approx(balance.item(), rel=1e-5)
    assert float(aux["router/z"].value) == pytest.approx(z.item(), rel=1e-5)
    got, dx = gradients(graph, params, X)
    gate_up = jnp.swapaxes(jnp.concatenate([got["experts/gate/kernel"], got["experts/up/kernel"]], axis=2), 1, 2)
    close((x.grad.numpy(), theirs.gate.weight.grad.numpy(), theirs.experts.gate_up_proj.grad.numpy()),
          (dx, got["router"].T, gate_up))
    close(theirs.experts.down_proj.grad.numpy(), jnp.swapaxes(got["experts/down/kernel"], 1, 2))


def test_values_gradients_and_who_finds_room_are_those_of_deepspeed():
    io, weights, grads = read("deepspeed_top2")
    theirs = lambda group: {
        "router": group["wg.weight"].T,
        **{f"experts/{ours}/{leaf}": np.stack([group[f"{fc}.{e}.{name}"].T for e in range(4)])
           for ours, fc in (("up", "fc1"), ("down", "fc2")) for leaf, name in (("kernel", "weight"), ("bias", "bias"))}}
    cfg = replace(TIGHT, explore=True)
    graph, _ = split(cfg.build(replace(PLAIN, width=12, mlp=20), rngs=nnx.Rngs(0)))
    mask = jnp.ones((1, 24), bool)

    def forward(params, x):
        model = merge(graph, params)
        logits = x @ model.router[...]
        room = cfg.room(24)
        _, routes = route(cfg, logits, mask, room, weights["noise"][None])
        return jnp.append(model.experts(x, routes, room).reshape(-1), model(x, mask)[1]["router/balance"].value)

    params, x = jax.tree.map(jnp.asarray, theirs(weights)), io["x"][None]
    y, pull = jax.jit(lambda *a: (lambda y, pull: (y, pull(jnp.asarray(io["pull"]))))(*jax.vjp(forward, *a)))(params, x)
    np.testing.assert_allclose(y, io["y"], atol=1e-5)
    close((theirs(grads), io["dx"][None]), pull)


@pytest.mark.parametrize("normalize", [True, False])
def test_with_room_for_all_the_two_ways_are_one(normalize):
    cfg = replace(DROPLESS, top_k=3, normalize=normalize)
    graph, params, _ = layer(cfg)
    roomy = layer(replace(cfg, capacity=4 / 3))[0]          # ceil(4/3 * 12 * 3 / 4) = 12 tokens: the whole row
    close(run(graph, params, X)[0], run(roomy, params, X)[0])
    close(gradients(graph, params, X), gradients(roomy, params, X))


def test_places_in_the_queue_by_hand():
    """Five tokens, the fourth of which is padding; second choices stand behind all first ones."""
    choice = jnp.array([[[0, 1], [0, 2], [1, 0], [0, 1], [0, 1]]])
    mask = jnp.array([[True, True, True, False, True]])
    place = queue(choice, mask, 3)[0]
    assert place[np.array([0, 1, 2, 4])].tolist() == [[0, 1], [1, 0], [0, 3], [2, 2]]


def test_room_by_hand():
    assert [replace(TIGHT, capacity=c).room(2048) for c in (1.5, 1.0, 0.1, 9.0)] == [1536, 1024, 103, 2048]
    assert replace(TIGHT, capacity=0.1, min_capacity=200).room(2048) == 200 and DROPLESS.room(2048) is None


def test_who_is_left_out_does_not_depend_on_other_rows_or_on_padding():
    cfg = replace(TIGHT, explore=True)
    graph, params, _ = layer(cfg)
    y, aux = run(graph, params, X)
    assert 0.1 < float(aux["router/dropped"].value) < 0.6
    for i in (0, 2, 5):
        one = slice(i, i + 1)
        alone, _ = run(graph, params, X[one], MASK[one], DRAWS[one])
        np.testing.assert_allclose(alone, y[one], atol=1e-6)
    other, again = run(graph, params, jnp.where(MASK[..., None], X, 100.0))
    np.testing.assert_array_equal(other, y)
    assert all(np.array_equal(aux[k].total, again[k].total) for k in aux)
    assert not y[~MASK].any()


def test_without_seeds_no_token_is_left_out_and_nothing_is_drawn():
    graph, params, _ = layer(replace(TIGHT, explore=True))
    y, aux = run(graph, params, X, MASK, None)
    np.testing.assert_array_equal(y, run(layer(DROPLESS)[0], params, X)[0])
    assert float(aux["router/dropped"].value) == 0


def test_the_second_choice_is_drawn_by_its_probability():
    """Of 20,000 tokens with the same logits; the first choice is always the most probable."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    logits = jnp.broadcast_to(jnp.log(p), (2, n // 2, 4))
    choice = np.asarray(choose(logits, 2, gumbel(jnp.array([7, 8], jnp.uint32), (n // 2, 4)))).reshape(-1, 2)
    assert (choice[:, 0] == 0).all()
    share = np.bincount(choice[:, 1], minlength=4) / n
    # Five standard deviations of a share of n draws.
    np.testing.assert_allclose(share, [0, 0.6, 0.3, 0.1], atol=5 * np.sqrt(0.25 / n))
    assert np.asarray(choose(logits[:, :1], 2)).tolist() == [[[0, 1]], [[0, 1]]]


def test_a_router_that_does_not_care_is_balanced():
    graph, params, _ = layer(DROPLESS)
    _, aux = run(graph, params | {"router": jnp.zeros((D, 4))}, X)
    value = {k.removeprefix("router/"): float(v.value) for k, v in aux.items()}
    # All logits are 0: probabilities 1/4, and ties go to the first two experts.
    want = {"balance": 1.0, "z": np.log(4) ** 2, "entropy": np.log(4), "most": 0.5, "least": 0.0, "dropped": 0.0}
    assert value == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert all(float(v.count) == int(MASK.sum()) * (2 if k == "router/dropped" else 1) for k, v in aux.items())


def test_of_rows_without_tokens_everything_is_zero():
    graph, params, _ = layer(TIGHT)
    y, aux = run(graph, params, X, jnp.zeros_like(MASK))
    assert not y.any() and not any(float(v.total) or float(v.count) for v in aux.values())


MESHES = {
    "expert-data": Layout(mesh={"data": 2, "expert": 4}),
    "fsdp-expert-tensor": Layout(mesh={"fsdp": 2, "expert": 2, "tensor": 2}),
    "expert-context": Layout(mesh={"fsdp": 2, "expert": 2, "context": 2}),
    "experts on the axis of tensors": Layout(mesh={"data": 4, "tensor": 2}, rules={**Layout().rules, "expert": "tensor"}),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("cfg", [DROPLESS, replace(TIGHT, explore=True)], ids=["dropless", "capacity"])
def test_experts_on_a_mesh_are_those_of_one_device(cfg, mesh, capfd):
    layout = MESHES[mesh]
    devices = layout.make_mesh()
    graph, params, axes = layer(cfg)
    want = run(graph, params, X), gradients(graph, params, X)
    with use(layout, devices):
        put = lambda x, names: jax.device_put(x, sharding_of(names, x.shape, layout, devices))
        split_params = {k: put(v, axes[k]) for k, v in params.items()}
        x = put(X, ("batch", "seq", "embed_act"))

        def both(params, x, mask, draws):
            return merge(graph, params)(x, mask, draws), jax.grad(loss, (1, 2))(graph, params, x, mask, draws)

        program = jax.jit(both).lower(split_params, x, put(MASK, ("batch", "seq")), put(DRAWS, ("batch",))).compile()
        close(want, program(split_params, x, put(MASK, ("batch", "seq")), put(DRAWS, ("batch",))))
        few = jax.jit(lambda p, x, m: merge(graph, p)(x, m)[0])(split_params, X[:1], MASK[:1])
    np.testing.assert_allclose(few, run(graph, params, X[:1], MASK[:1], None)[0], atol=1e-5)     # too few rows to split
    text = program.as_text()
    assert f"f32[4,{D},{F}]" not in text and f"f32[4,{F},{D}]" not in text, "a device holds all experts"
    assert f"f32[{B},{S},4]" not in text, "a device routes all rows"
    assert ("all-to-all" in text) == (cfg.capacity is not None and "expert" in layout.mesh)
    assert "rematerialization" not in capfd.readouterr().err


def test_experts_and_rows_share_all_axes_or_none():
    layout = Layout(mesh={"expert": 2, "tensor": 2}, rules={**Layout().rules, "expert": ("expert", "tensor"), "mlp": None})
    graph, params, _ = layer(DROPLESS)
    with use(layout, layout.make_mesh(jax.devices()[:4])), pytest.raises(ConfigError, match="share only"):
        merge(graph, params)(X)


@pytest.mark.parametrize(("change", "says"), [({"top_k": 5}, "1 to 4"), ({"balance": 3}, "top_k=2"), ({"capacity": 0.0}, "above 0")])
def test_what_cannot_be_is_said(change, says):
    with pytest.raises(ConfigError, match=says):
        replace(DROPLESS, **change).build(PLAIN, rngs=nnx.Rngs(0))
