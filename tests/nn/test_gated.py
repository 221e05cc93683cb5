from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.gated import Gated, open_flamingo
from mllm_jax.nn.param import merge, split
from mllm_jax.nn.visibility import Visibility
from tests.connectors.golden import heads, linear, norm
from tests.golden import official

S, NEW, D, MEDIA, LATENTS, D_MEDIA = 9, 2, 16, 2, 5, 12         # as in tests/golden/make_flamingo.py
SLOT = np.array([[-1, -1, 0, 0, 0, 1, 1, 1, 1] + [1] * NEW, [0] * (S + NEW)])
CFG = Gated(width=D_MEDIA, block=replace(open_flamingo(D), heads=3, head_dim=4))


def sees(slot: np.ndarray) -> Visibility:
    """What decoders.layers.Memory makes of slots, beside media that are all there."""
    owner = np.repeat(np.arange(MEDIA), LATENTS)[None].repeat(len(slot), 0)
    number = lambda x: jnp.asarray(x + 1, jnp.int32)
    return Visibility(
        segments=number(slot), order=jnp.zeros(slot.shape, jnp.int32), key_segments=number(owner), key_order=jnp.zeros(owner.shape, jnp.int32))


def ours(g: official.Group) -> official.Group:
    out = norm(g, "attn.norm", "norm1") | norm(g, "ff.0", "norm2") | linear(g, "ff.1", "mlp/up") | linear(g, "ff.3", "mlp/down")
    k, v = np.split(g["attn.to_kv.weight"], 2)
    out |= heads(g, "attn.to_q", "attn/q", 3) | heads(g, "attn.to_out", "attn/o", 3, out=True)
    out |= heads({"k.weight": k}, "k", "attn/k", 3) | heads({"v.weight": v}, "v", "attn/v", 3)
    return out | {"attn_gate/gate": g["attn_gate"][0], "mlp_gate/gate": g["ff_gate"][0]}


def test_layer_is_that_of_open_flamingo():
    """Values and all gradients: text before the first medium, two media in turn, and positions that come when decoding."""
    io, weights, grads = official.read("open_flamingo_gated")
    graph, fresh = split(CFG.build(BlockConfig(width=D, heads=2, mlp=8), rngs=nnx.Rngs(0)))
    params = {k: jnp.asarray(v) for k, v in ours(weights).items()}
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in fresh.items()}

    def run(params, flat):
        layer = merge(graph, params)
        x, media = flat[:, : (S + NEW) * D].reshape(2, S + NEW, D), flat[:, (S + NEW) * D :].reshape(2, MEDIA * LATENTS, D_MEDIA)
        keys = layer.keys(media)        # once, for the positions now and those to come
        y = jnp.concatenate([layer(x[:, :S], keys, sees(SLOT[:, :S])), layer(x[:, S:], keys, sees(SLOT[:, S:]))], axis=1)
        return jnp.sum(y * io["pull"]), y

    (dp, dx), y = jax.jit(jax.grad(run, (0, 1), has_aux=True))(params, io["x"])
    # float32 on both sides, sums in another order; of gradients, which reach 60, to their size.
    np.testing.assert_allclose(y, io["y"], atol=1e-5)
    np.testing.assert_allclose(dx, io["dx"], atol=1e-5 * np.abs(io["dx"]).max())
    for path, want in ours(grads).items():
        np.testing.assert_allclose(dp[path], want, atol=1e-5 * max(1, np.abs(want).max()), err_msg=path)


def opened(cfg: Gated, attn: float, mlp: float):
    graph, params = split(cfg.build(BlockConfig(width=D, heads=2, mlp=8), rngs=nnx.Rngs(0)))
    return merge(graph, params | {"attn_gate/gate": jnp.full_like(params["attn_gate/gate"], attn),
                                  "mlp_gate/gate": jnp.full_like(params["mlp_gate/gate"], mlp)})


@pytest.mark.parametrize("each", [False, True])
def test_a_fresh_layer_changes_nothing_and_an_open_one_does(each):
    cfg = replace(CFG, each=each)
    x = jax.random.normal(jax.random.key(0), (2, S, D))
    media = jax.random.normal(jax.random.key(1), (2, MEDIA * LATENTS, D_MEDIA))
    run = jax.jit(lambda layer: layer(x, layer.keys(media), sees(SLOT[:, :S])))
    np.testing.assert_array_equal(run(cfg.build(BlockConfig(width=D, heads=2, mlp=8), rngs=nnx.Rngs(0))), x)
    # The attention alone: what sees no medium stays as it is, to the last bit.
    moved = np.asarray(run(opened(cfg, 0.5, 0.0)) != x).any(-1)
    np.testing.assert_array_equal(moved, SLOT[:, :S] >= 0)


def test_text_alone_goes_through_the_feed_forward_layer():
    """As in a row with media where it sees none: whether the batch has media elsewhere changes nothing."""
    layer = opened(CFG, 0.5, 0.5)
    x, media = jnp.ones((2, S, D)).at[..., 0].set(3.0), jnp.ones((2, MEDIA * LATENTS, D_MEDIA))
    alone = layer(x, None, None)
    np.testing.assert_array_equal(alone, layer(x, layer.keys(media), sees(np.full((2, S), -1))))
    assert not np.array_equal(alone, x)


def test_a_block_of_another_width_is_said():
    with pytest.raises(ConfigError, match="width 16 with norms='before' stands before decoder layers of width 32; give its block"):
        CFG.build(BlockConfig(width=32, heads=2, mlp=8), rngs=nnx.Rngs(0))
