import types
from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.connectors.resampler import PerceiverConfig, SincosResamplerConfig, sincos_2d
from mllm_jax.nn.param import merge, split
from mllm_jax.types import Features
from tests.connectors.golden import check_official, heads, linear, norm, split_heads, stacked
from tests.contracts import check_connector
from tests.golden import official

PERCEIVER = PerceiverConfig(grid=4, queries=3, depth=2, heads=2, head_dim=6)
SINCOS = SincosResamplerConfig(grid=4, to=2, width=16, heads=2)


@pytest.mark.parametrize(("cfg", "grid"), [(PERCEIVER, (1, 4, 4)), (replace(PERCEIVER, frames=2), (2, 4, 4)), (SINCOS, (1, 4, 4))])
def test_contract(cfg, grid):
    check_connector(cfg, grid)


def flamingo(g):
    def layer(i):
        out = norm(g, f"layers.{i}.0.norm_media", "norm_media") | norm(g, f"layers.{i}.0.norm_latents", "norm_queries")
        k, v = np.split(g[f"layers.{i}.0.to_kv.weight"], 2)
        out |= heads(g, f"layers.{i}.0.to_q", "attn/q", 4) | heads(g, f"layers.{i}.0.to_out", "attn/o", 4, out=True)
        out |= heads({"k.weight": k}, "k", "attn/k", 4) | heads({"v.weight": v}, "v", "attn/v", 4)
        return out | norm(g, f"layers.{i}.1.0", "norm_mlp") | linear(g, f"layers.{i}.1.1", "up") | linear(g, f"layers.{i}.1.3", "down")

    out = {"queries": g["latents"], "frames": g["frame_embs"]} | norm(g, "norm", "norm")
    return out | stacked([layer(0), layer(1)], "blocks/0")


def test_perceiver_is_that_of_open_flamingo():
    """No last linear layer: the queries keep the width of the encoder."""
    cfg = PerceiverConfig(grid=3, frames=3, queries=5, depth=2, heads=4, head_dim=6)
    check_official(cfg, official.read("open_flamingo_perceiver"), flamingo)


def idefics(g):
    def layer(i):
        names = {"norm_media": "context_layer_norm", "norm_queries": "latents_layer_norm", "attn/q_norm": "q_layer_norm",
                 "attn/k_norm": "k_layer_norm"}
        out = {k: v for ours, theirs in names.items() for k, v in norm(g, f"blocks.{i}.0.{theirs}", ours).items()}
        for x in "qkv":
            out |= heads(g, f"blocks.{i}.0.{x}_proj", f"attn/{x}", 2)
        out |= heads(g, f"blocks.{i}.0.output_proj", "attn/o", 2, out=True)
        return out | norm(g, f"blocks.{i}.1.ln", "norm_mlp") | linear(g, f"blocks.{i}.1.fc", "up") | linear(g, f"blocks.{i}.1.c_proj", "down")

    return {"queries": g["latents"]} | norm(g, "layer_norm", "norm") | stacked([layer(0), layer(1)], "blocks/0")


def test_perceiver_is_that_of_idefics(torch):
    """With ReLU, normalized queries and keys, and the class token among the patches."""
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    part = types.SimpleNamespace
    theirs = IdeficsPerceiverResampler(
        part(perceiver_config=part(qk_layer_norms_perceiver=True), vision_config=part(embed_dim=12)), 12, 2, 2, 6, 5)
    x = np.random.default_rng(0).normal(size=(2, 10, 12))
    fixture = official.groups(official.run(official.randomize(theirs), x))
    cfg = PerceiverConfig(
        grid=3, class_token=True, queries=5, depth=2, heads=2, head_dim=6, activation="relu", qk_norm=True)
    check_official(cfg, fixture, idefics)


def qwen(g):
    out = {"queries": g["attn_pool.query"], "out/kernel": g["proj"]} | linear(g, "attn_pool.kv_proj", "fit")
    out |= norm(g, "attn_pool.ln_q", "norm_queries") | norm(g, "attn_pool.ln_kv", "norm_media") | norm(g, "ln_post", "norm")
    for x, w, b in zip("qkv", np.split(g["attn_pool.attn.in_proj_weight"], 3), np.split(g["attn_pool.attn.in_proj_bias"], 3)):
        out |= heads({"x.weight": w, "x.bias": b}, "x", f"attn/{x}", 2)
    return out | split_heads(linear(g, "attn_pool.attn.out_proj", "attn/o"), 2, out=True)


def test_sincos_resampler_is_that_of_qwen_vl():
    fixture = official.read("qwen_vl_resampler")
    check_official(SincosResamplerConfig(grid=5, to=3, width=24, heads=2), fixture, qwen)
    np.testing.assert_allclose(sincos_2d(3, 24), fixture[1]["attn_pool.pos_embed"], atol=1e-6)


def test_the_column_comes_before_the_row():
    table = sincos_2d(2, 4).reshape(2, 2, 4)
    np.testing.assert_allclose(table[1, 0], [np.sin(0), np.cos(0), np.sin(1), np.cos(1)], atol=1e-6)


@pytest.mark.parametrize("cfg", [PERCEIVER, SINCOS])
def test_an_item_does_not_see_its_neighbours(cfg):
    graph, params = split(cfg.build(8, 8, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 32, 8))
    f = jax.jit(lambda x: merge(graph, params)(Features(tokens=x, mask=jnp.ones(x.shape[:2], bool))).tokens)
    n = int(np.prod(cfg.num_tokens((1, 4, 4))))
    np.testing.assert_array_equal(f(x.at[:, 16:].set(7.0))[:, :n], f(x)[:, :n])


def test_a_grid_that_is_not_the_encoders_is_said():
    assert replace(PERCEIVER, class_token=True).num_tokens((1, 1, 17)) == (1, 1, 3)
    assert PERCEIVER.num_tokens((5, 4, 4)) == (5, 1, 3) and replace(PERCEIVER, frames=5).num_tokens((5, 4, 4)) == (1, 1, 3)
    with pytest.raises(ConfigError, match="perceiver reads grids of 4x4 tokens; the encoder gives 16x16: set its grid to 16"):
        PERCEIVER.num_tokens((1, 16, 16))
    with pytest.raises(ConfigError, match="reads items of 2 frames; the view gives 3: set its frames to 3"):
        replace(PERCEIVER, frames=2).num_tokens((3, 4, 4))
    with pytest.raises(ConfigError, match="resampler reads grids of 4x4 tokens"):
        SINCOS.num_tokens((1, 5, 4))
