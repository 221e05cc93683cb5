import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.connectors.deformable import DAbstractorConfig, Look, directions, middles
from mllm_jax.nn.param import merge, split
from mllm_jax.types import Features
from tests.connectors.golden import check_official, heads, linear, norm, split_heads, stacked
from tests.contracts import check_connector
from tests.golden import official

CFG = DAbstractorConfig(grid=4, to=2, width=16, depth=2, heads=2, points=3, mlp=24)


def test_contract():
    check_connector(CFG)


def theirs(g):
    def layer(i):
        at = f"layers.{i}."
        out = {k: v for x in "qkv" for k, v in heads(g, f"{at}self_attn.{x}_proj", f"attn/{x}", 2).items()}
        out |= heads(g, f"{at}self_attn.out_proj", "attn/o", 2, out=True)
        look = linear(g, f"{at}encoder_attn.sampling_offsets", "look/offsets") | linear(g, f"{at}encoder_attn.attention_weights", "look/weights")
        out |= {k: v.reshape(*v.shape[:-1], 2, 3, *([2] if "offsets" in k else [])) for k, v in look.items()}
        out |= heads(g, f"{at}encoder_attn.value_proj", "look/v", 2)
        out |= split_heads(linear(g, f"{at}encoder_attn.output_proj", "look/o"), 2, out=True)
        out |= linear(g, f"{at}fc1", "up") | linear(g, f"{at}fc2", "down") | norm(g, f"{at}self_attn_layer_norm", "norm1")
        return out | norm(g, f"{at}encoder_attn_layer_norm", "norm2") | norm(g, f"{at}final_layer_norm", "norm3")

    out = {"position": g["v_pos_emb"][0], "queries": g["query_position_embeddings.weight"], "points": g["reference_points"][0]}
    return out | linear(g, "input_proj.0", "fit") | linear(g, "output_proj", "out") | stacked([layer(0), layer(1)], "blocks/0")


def test_d_abstractor_is_that_of_honeybee():
    """Points that lie outside of the image among them."""
    cfg = DAbstractorConfig(grid=5, to=3, width=16, depth=2, heads=2, points=3, mlp=24)
    check_official(cfg, official.read("honeybee_d_abstractor"), theirs)


def test_it_has_the_size_of_the_official_module():
    shapes = jax.eval_shape(lambda: DAbstractorConfig(grid=16, to=12).build(1024, 4096, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 55_616_352


def test_looking_by_hand():
    """One head with one point and the identity for values, on 2x2 patches of 1 2 / 3 4."""
    cfg = DAbstractorConfig(grid=2, to=1, width=1, heads=1, points=1)
    graph, params = split(Look(cfg, rngs=nnx.Rngs(0)))
    one = jnp.ones((1, 1, 1))
    params |= {"v/kernel": one, "o/kernel": one, "offsets/bias": jnp.zeros((1, 1, 2))}
    look = lambda x, y: merge(graph, params)(jnp.zeros((1, 1, 1)), jnp.array([[x, y]]), jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, ..., None])
    at = {(0.25, 0.25): 1, (0.75, 0.25): 2, (0.25, 0.75): 3, (0.5, 0.5): 2.5, (0.5, 0.25): 1.5,     # middles, and between them
          (0.0, 0.25): 0.5, (1.0, 1.0): 1.0, (2.0, 0.5): 0.0}                                      # half, and wholly outside
    for (x, y), value in at.items():
        np.testing.assert_allclose(look(x, y), [[[value]]], atol=1e-6)


def test_queries_start_evenly_and_heads_look_around():
    np.testing.assert_allclose(middles(4, 2), [[0.125, 0.125], [0.875, 0.125], [0.125, 0.875], [0.875, 0.875]])
    np.testing.assert_allclose(directions(4, 2)[:, 0], [[1, 0], [0, 1], [-1, 0], [0, -1]], atol=1e-6)
    np.testing.assert_allclose(directions(8, 2)[1], [[1, 1], [2, 2]], atol=1e-6)
    _, params = split(CFG.build(8, 12, rngs=nnx.Rngs(0)))
    assert not params["blocks/0/look/offsets/kernel"].any() and not params["blocks/0/look/weights/kernel"].any()
    np.testing.assert_array_equal(params["blocks/0/look/offsets/bias"], np.broadcast_to(directions(2, 3), (2, 2, 3, 2)))


def test_an_item_does_not_see_its_neighbours():
    graph, params = split(CFG.build(8, 8, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 32, 8))
    f = jax.jit(lambda x: merge(graph, params)(Features(tokens=x, mask=jnp.ones(x.shape[:2], bool))).tokens)
    np.testing.assert_array_equal(f(x.at[:, 16:].set(7.0))[:, :4], f(x)[:, :4])


def test_a_grid_that_is_not_the_encoders_is_said():
    with pytest.raises(ConfigError, match="D-Abstractor reads grids of 4x4 tokens; the encoder gives 16x16: set its grid to 16"):
        CFG.num_tokens((1, 16, 16))
