from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError, load
from mllm_jax.encoders import vit
from mllm_jax.hf.family import parameter_shapes
from mllm_jax.nn.param import merge, split
from mllm_jax.types import Media
from tests.contracts import check_encoder

CLIP, SIGLIP = vit.CLIP_L14_336.tiny(), vit.SIGLIP_B16_224.tiny()


@pytest.mark.parametrize(
    ("cfg", "unused"),
    [
        (CLIP, ("norm/",)),                                     # the last norm is that of the pooled vector
        (replace(SIGLIP, pool="none"), ()),
        (vit.EVA_G14_224.tiny(), ()),
        (replace(SIGLIP, final_norm=True), ("pool/",)),
        (replace(CLIP, keep_class=True, final_norm=True, norm=vit.RMSNorm(), gated=True, table=3), ()),
        (vit.INTERNVIT_6B_448.tiny(), ()),
    ],
)
def test_contract(cfg, unused):
    check_encoder(cfg, (1, cfg.grid, cfg.grid), unused)


def media(cfg, seed=0):
    values = jax.random.normal(jax.random.key(seed), (1, 1, cfg.grid**2, cfg.patch_dim))
    return Media(values=values, coords=jnp.zeros((1, 1, cfg.grid**2, 3), int), mask=jnp.ones((1, 1), bool), slot=jnp.zeros((1, 1), int))


def test_a_bias_of_keys_would_change_nothing():
    """Softmax takes what all keys share away, so EVA and Whisper have none; here is the law that it rests on."""
    cfg = replace(SIGLIP, pool="none", key_bias=True)
    graph, params = split(cfg.build(rngs=nnx.Rngs(0)))
    path = "blocks/0/attn/k/bias"
    without = merge(split(replace(cfg, key_bias=False).build(rngs=nnx.Rngs(0)))[0], {k: v for k, v in params.items() if k != path})
    biased = params | {path: 3 * jax.random.normal(jax.random.key(1), params[path].shape)}
    run = jax.jit(lambda module: module(media(cfg)).tokens)
    np.testing.assert_allclose(run(without), run(merge(graph, biased)), atol=1e-5)      # rounding of larger scores


def test_eva_has_its_published_size():
    """Blip2VisionModel of transformers has 985_952_256 parameters, of which 39 biases of keys are zero."""
    shapes = jax.eval_shape(lambda: vit.EVA_G14_224.build(rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 985_952_256 - 39 * 1408


def test_layers_after_the_chosen_one_do_not_count():
    cfg = replace(CLIP, layer=-2)
    graph, params = split(cfg.build(rngs=nnx.Rngs(0)))
    run = jax.jit(lambda p: merge(graph, p)(media(cfg)).tokens)
    change = lambda i: {k: x.at[i].add(1.0) if k.startswith("blocks/") else x for k, x in params.items()}
    np.testing.assert_array_equal(run(change(2)), run(params))
    assert not np.array_equal(run(change(1)), run(params))


def test_every_hidden_state_can_be_chosen():
    """Layer k of a deep tower is the last of a tower with k layers."""
    graph, params = split(CLIP.build(rngs=nnx.Rngs(0)))
    for k in range(CLIP.depth + 1):
        chosen = merge(split(replace(CLIP, layer=k).build(rngs=nnx.Rngs(0)))[0], params)(media(CLIP)).tokens
        np.testing.assert_array_equal(chosen, merge(graph, params).encode(media(CLIP).values[0], k)[None, 0, 1:])


def test_bytes_are_normalized_as_floats_would_be():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 192)
    want = (pixels.reshape(-1, 3) / 255 - np.array(vit.CLIP_MEAN)) / np.array(vit.CLIP_STD)
    np.testing.assert_allclose(vit.normalize(jnp.asarray(pixels), vit.CLIP_MEAN, vit.CLIP_STD).reshape(-1, 3), want, atol=1e-5)


def test_what_does_not_fit_is_said():
    with pytest.raises(ConfigError, match="takes images of 4x4 patches of 8 pixels; the view cuts 5x4: make the view 32 pixels wide"):
        CLIP.num_tokens((1, 5, 4))
    with pytest.raises(ConfigError, match="need class_token=True"):
        replace(SIGLIP, pool="class").build(rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="pool='none' has no vector"):
        replace(CLIP, pool="none").build(rngs=nnx.Rngs(0)).embed(media(CLIP))


def test_a_model_reads_more_pixels_with_the_same_parameters():
    """MM1 goes from 378 pixels to five times 672: tables of positions are stretched, so that one stage begins with those of the other."""
    recipe = load("experts/mm1")
    low, high = recipe.stages["pretrain"].model, recipe.model
    assert parameter_shapes(low) == parameter_shapes(high)
    tokens = [m.inputs["image"].num_tokens(m.inputs["image"].nominal.grid) for m in (low, high)]
    assert tokens == [(1, 12, 12)] * 2 and high.inputs["image"].nominal.tiles == 5
    assert [m.inputs["image"].nominal.grid for m in (low, high)] == [(1, 27, 27), (1, 48, 48)]
