from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.connectors.items import join_items
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.pool import NestedConfig, PoolConfig, average_weights, bilinear_weights, resample
from mllm_jax.nn.param import merge, split
from mllm_jax.types import Features
from tests.contracts import check_connector

MLP = MLPConfig(depth=2)


@pytest.mark.parametrize("cfg", [
    PoolConfig(grid=4, to=2, before=MLP), PoolConfig(grid=4, to=3, mode="bilinear", after=MLP),
    PoolConfig(grid=4, to=4, before=MLP, after=MLPConfig(depth=1)), NestedConfig(grid=4, windows=(2,)),
])
def test_contract(cfg):
    check_connector(cfg)


@pytest.mark.parametrize(("n", "out"), [(24, 12), (16, 12), (27, 14), (27, 9), (5, 3), (4, 1), (7, 7), (3, 5)])
def test_weights_are_those_of_torch(n: int, out: int, torch):
    x = np.random.default_rng(0).normal(size=(2, n, n, 3)).astype(np.float32)
    theirs = lambda f: np.asarray(f(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    pooled = theirs(lambda y: torch.nn.functional.adaptive_avg_pool2d(y, out))
    resized = theirs(lambda y: torch.nn.functional.interpolate(y, size=(out, out), mode="bilinear", align_corners=False))
    # Sums of floats near 1, in another order; torch finds the places to interpolate at in float32.
    np.testing.assert_allclose(resample(jnp.asarray(x), average_weights(n, out)), pooled, atol=1e-6)
    np.testing.assert_allclose(resample(jnp.asarray(x), bilinear_weights(n, out)), resized, atol=1e-5)


def test_a_pool_averages_squares_of_neighbours_of_each_item():
    """Two items whose patches are numbered, through the identity."""
    graph, _ = split(PoolConfig(grid=4, to=2, after=MLPConfig(depth=1, bias=False)).build(1, 1, rngs=nnx.Rngs(0)))
    x = jnp.arange(32.0).reshape(1, 32, 1)
    y = merge(graph, {"after/layers/0/kernel": jnp.ones((1, 1))})(Features(tokens=x, mask=jnp.arange(32)[None] < 16))
    np.testing.assert_allclose(y.tokens[0, :, 0], [2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5])
    np.testing.assert_array_equal(y.mask, [[True] * 4 + [False] * 4])


def test_nested_sets_are_the_averages_of_the_first_and_lie_item_by_item_behind_it():
    cfg = NestedConfig(grid=4, windows=(1, 2, 4))
    graph, params = split(cfg.build(3, 5, rngs=nnx.Rngs(0)))
    x = Features(tokens=jax.random.normal(jax.random.key(0), (2, 32, 3)), mask=jnp.ones((2, 32), bool).at[1, 16:].set(False))
    y, plain = merge(graph, params)(x), merge(split(MLPConfig(depth=2).build(3, 5, rngs=nnx.Rngs(0)))[0], params)(x)
    np.testing.assert_array_equal(y.tokens[:, :32], plain.tokens)
    squares = plain.tokens.reshape(2, 2, 2, 2, 2, 2, 5)                 # row, item, rows of 2, columns of 2
    np.testing.assert_allclose(y.tokens[:, 32:40].reshape(2, 2, 2, 2, 5), squares.mean(axis=(3, 5)), atol=1e-6)
    np.testing.assert_allclose(y.tokens[:, 40:], plain.tokens.reshape(2, 2, 16, 5).mean(axis=2), atol=1e-6)
    np.testing.assert_array_equal(y.mask[1], [True] * 16 + [False] * 16 + [True] * 4 + [False] * 4 + [True, False])
    # Any of the scales alone, with the same parameters.
    one = replace(cfg, windows=(2,))
    np.testing.assert_array_equal(merge(split(one.build(3, 5, rngs=nnx.Rngs(0)))[0], params)(x).tokens, y.tokens[:, 32:40])
    assert cfg.num_tokens((1, 4, 4)) == (1, 4, 4) and one.num_tokens((1, 4, 4)) == (1, 2, 2)
    assert NestedConfig(grid=24, windows=(1, 2, 4, 8, 24)).sides == (24, 12, 6, 3, 1)


def test_what_does_not_fit_is_said():
    with pytest.raises(ConfigError, match="pool reads grids of 4x4 tokens; the encoder gives 6x6: set its grid to 6"):
        PoolConfig(grid=4, to=2, before=MLP).num_tokens((1, 6, 6))
    with pytest.raises(ConfigError, match="encoder gives 1x257: set its grid to 16, and let the encoder give a square"):
        PoolConfig(grid=4, to=2, before=MLP).num_tokens((1, 1, 257))
    with pytest.raises(ConfigError, match="needs a connector before or after it"):
        PoolConfig(grid=4, to=2).build(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="mode='max' of a pool is not one of: average, bilinear"):
        PoolConfig(grid=4, to=2, mode="max", after=MLP).build(2, 2, rngs=nnx.Rngs(0))
    module = PoolConfig(grid=4, to=2, after=MLP).build(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="reads items of 16 tokens; a row has 17"):
        module(Features(tokens=jnp.zeros((1, 17, 2)), mask=jnp.ones((1, 17), bool)))


def test_an_item_is_there_if_any_of_its_tokens_is():
    x = Features(tokens=jnp.zeros((1, 6, 1)), mask=jnp.array([[False, False, True, False, False, False]]))
    np.testing.assert_array_equal(join_items(jnp.zeros((3, 3, 1)), x).mask, [[False] * 3 + [True] * 3 + [False] * 3])
