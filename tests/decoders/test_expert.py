"""A second set of weights: who goes through it, and what it starts as."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.decoders.expert import ExpertLayer
from mllm_jax.decoders.layers import Layer
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.nn.param import merge, split
from tests.hf import ours
from tests.synthetic import randomized

PLAIN = DecoderConfig(vocab=20, width=16, depth=2, heads=2, kv_heads=1, mlp=12, qk_norm=True, cycle=(Layer(window=5), Layer()))
GROWN = replace(PLAIN, cycle=(ExpertLayer(window=5), ExpertLayer()))


def decoder(cfg):
    graph, params = split(cfg.build(rngs=nnx.Rngs(0)))
    return graph, randomized(params)


def batch():
    """Media at 2 to 5 of the first row, of which two are no images; the second is text."""
    b = ours.batch(np.random.default_rng(0).integers(0, 20, (2, 9)), [9, 7])
    return replace(b, kinds=b.kinds.at[0, 2:4].set(1).at[0, 4:6].set(2))


def run(graph, params, batch):
    model = merge(graph, params)
    return model(model.embed(batch.tokens), batch)[0]


program = lambda graph: jax.jit(lambda params, batch: run(graph, params, batch))


def test_copies_are_the_language_model_that_it_grew_from():
    assert GROWN.origin == PLAIN
    (plain, weights), (grown, both) = decoder(PLAIN), decoder(GROWN)
    copied = {k: weights[k.replace("expert/", "")] for k in both}
    # Not to the last bit: the two programs add up in another order.
    np.testing.assert_allclose(program(grown)(copied, batch()), program(plain)(weights, batch()), atol=1e-6)


def test_media_train_the_expert_and_text_the_rest():
    graph, params = decoder(GROWN)
    gradient = jax.jit(jax.grad(lambda params, here: jnp.sum(jnp.where(here[..., None], run(graph, params, batch()), 0) ** 2)))
    # In the last layer a position reads its own queries, and keys of the others through attention.
    own = [f"blocks/1/{where}{x}/kernel" for where in ("", "expert/") for x in ("attn/q", "attn/o", "mlp/up", "mlp/down")]
    for media in (False, True):
        here = (jnp.asarray(batch().kinds) > 0) == media
        grads = gradient(params, here)
        for name in own:
            assert bool(jnp.any(grads[name][-1] != 0)) == (("expert/" in name) == media), (media, name)


def test_a_grown_answer_is_that_of_the_whole_row():
    """The prompt with its media at once, then text, position by position, through the weights of text."""
    graph, params = decoder(GROWN)
    whole, got = batch(), []
    cache = merge(graph, params).empty_cache(2, 9)

    @jax.jit
    def step(cut, cache):
        model = merge(graph, params)
        return model(model.embed(cut.tokens), cut, cache=cache)

    for at in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 9)):
        cut = jax.tree.map(lambda x, at=at: x[:, at], replace(whole, segments=jnp.ones_like(whole.segments)))
        x, _, cache = step(cut, cache)
        got.append(x)
    want = program(graph)(params, replace(whole, segments=jnp.ones_like(whole.segments)))
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, atol=2e-5)        # sums in another order


def test_norms_stand_before():
    with pytest.raises(ConfigError, match="norms='both'"):
        split(replace(GROWN, norms="both").build(rngs=nnx.Rngs(0)))
