from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.connectors.qformer import QFormerConfig, Text, Words
from mllm_jax.nn.param import merge, split
from mllm_jax.types import Features
from tests.contracts import check_connector
from tests.synthetic import randomized

CFG = QFormerConfig(tokens=257).tiny()
READS = QFormerConfig(tokens=257, words=Words()).tiny()
CLOSE = 1e-5        # float32 sums in another order


@pytest.mark.parametrize("cfg", [replace(CFG, tokens=16, depth=3), replace(CFG, tokens=16, every=1)])
def test_contract(cfg):
    check_connector(cfg)


def test_an_item_must_have_as_many_tokens_as_are_read():
    assert CFG.tokens == 17 and CFG.num_tokens((1, 1, 17)) == (1, 1, 4)
    with pytest.raises(ConfigError, match=r"reads items of 257 tokens; the encoder gives 256: set tokens to that"):
        QFormerConfig(tokens=257).num_tokens((1, 16, 16))


@pytest.fixture(scope="module")
def former():
    graph, params = split(READS.build(8, 12, rngs=nnx.Rngs(0)))
    return merge(graph, {k: jnp.asarray(v) for k, v in randomized(params).items()})


def ids(rows, t, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 260, (rows, t)), jnp.int32)


run = jax.jit(lambda module, *args: module(*args))


def test_the_three_passes_of_blip_2_are_one(former):
    """Queries alone, text alone and a caption after the queries, side by side: each is what it is by itself."""
    memory, tokens = jax.random.normal(jax.random.key(0), (2, 17, 8)), ids(2, 6)
    there = jnp.array([[1] * 6, [1] * 4 + [0] * 2])
    at = jnp.broadcast_to(jnp.arange(6), (2, 6))
    text = lambda segments, order: Text(tokens=tokens, positions=at, segments=segments, order=order)
    apart, caption = text(2 * there, 0 * at), text(there, 1 + at)
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), apart, caption)
    module, n = former.former, READS.queries
    y = run(module, memory, both)
    np.testing.assert_allclose(y[:, :n], run(module, memory), atol=CLOSE)
    real = np.asarray(there, bool)
    np.testing.assert_allclose(y[:, n : n + 6][real], run(module, None, apart)[real], atol=CLOSE)
    np.testing.assert_allclose(y[:, n + 6 :][real], run(module, memory, caption)[:, n:][real], atol=CLOSE)


def test_a_caption_does_not_see_what_comes_after_it_and_sees_the_image(former):
    memory, tokens = jax.random.normal(jax.random.key(0), (1, 17, 8)), ids(1, 5)
    at, ones = jnp.arange(5)[None], jnp.ones((1, 5), int)
    caption = lambda tokens, memory: run(former.former, memory, Text(tokens=tokens, positions=at, segments=ones, order=1 + at))
    y, later = caption(tokens, memory), caption(tokens.at[0, 3].add(1), memory)
    np.testing.assert_array_equal(y[:, : 4 + 3], later[:, : 4 + 3])
    assert not np.allclose(y[:, 4 + 3 :], later[:, 4 + 3 :])
    assert not np.allclose(y[:, 4], caption(tokens, memory + 1)[:, 4])


def test_the_text_of_an_item_is_read_and_its_padding_is_not(former):
    x = Features(tokens=jax.random.normal(jax.random.key(0), (2, 34, 8)), mask=jnp.ones((2, 34), bool))
    text = ids(2, 2 * 6).reshape(2, 2, 6).at[:, 1, 4:].set(-1)
    y = run(former, replace(x, text=text))
    assert y.tokens.shape == (2, 8, 12) and y.mask.all()
    np.testing.assert_allclose(y.tokens, run(former, replace(x, text=jnp.pad(text, ((0, 0), (0, 0), (0, 3)), constant_values=-1))).tokens,
                               atol=CLOSE)
    other = run(former, replace(x, text=text.at[0, 1, 0].set(7))).tokens
    np.testing.assert_array_equal(other[:, :4], y.tokens[:, :4])
    assert not np.allclose(other[0, 4:], y.tokens[0, 4:])
    with pytest.raises(ConfigError, match=r"reads the text of each item, and the batch has none in Media.text"):
        former(x)
