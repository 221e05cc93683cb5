from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.connectors.merge import MergeConfig
from mllm_jax.nn.param import RMSNorm
from mllm_jax.types import Features
from tests.contracts import check_connector, run


@pytest.mark.parametrize("cfg", [MergeConfig(), MergeConfig(side=1, norm=RMSNorm())])
def test_contract(cfg):
    check_connector(cfg)


def test_a_token_is_made_of_four_neighbours_of_the_row():
    merge = MergeConfig().build(8, 12, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 12, 8))
    features = lambda x: run(merge, Features(tokens=x, mask=jnp.ones((1, 12), bool).at[0, 8:].set(False)))
    one, two = features(x), features(x.at[0, 5].add(1.0))
    moved = np.abs(np.asarray(one.tokens - two.tokens)).max(-1)[0] > 0
    assert moved.tolist() == [False, True, False] and one.mask.tolist() == [[True, True, False]]


def test_every_level_has_a_merger_of_its_own():
    """Earlier levels are normalized four at a time: a factor on one patch changes what becomes of the others."""
    cfg = MergeConfig(deep=2)
    merge = cfg.build(8, 12, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 8, 8))
    features = Features(tokens=x, mask=jnp.ones((1, 8), bool), deep=jnp.stack([x, x]))
    out = run(merge, features)
    assert out.deep.shape == (2, 1, 2, 12) and np.abs(out.deep[0] - out.deep[1]).max() > 1e-3
    assert jax.tree.leaves(merge.deep.norm.scale)[0].shape == (2, 32)
    scaled = run(merge, replace(features, tokens=x * 3, deep=features.deep * 3))
    np.testing.assert_allclose(scaled.deep, out.deep, atol=1e-4)            # a norm takes a common factor away, up to its epsilon
    np.testing.assert_allclose(scaled.tokens, out.tokens, atol=1e-4)
    factors = jnp.array([3.0, 1, 1, 1] * 2)[None, :, None]
    other = run(merge, replace(features, tokens=x * factors, deep=features.deep * factors))
    np.testing.assert_allclose(other.tokens, out.tokens, atol=1e-4)
    assert np.abs(other.deep - out.deep).max() > 0.05


def test_levels_must_be_as_many_as_mergers():
    merge = MergeConfig().build(8, 12, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, 4, 8))
    with pytest.raises(ConfigError, match="gives 1 earlier levels and the connector merges 0"):
        merge(Features(tokens=x, mask=jnp.ones((1, 4), bool), deep=x[None]))


def test_a_grid_must_divide():
    assert MergeConfig().num_tokens((3, 4, 6)) == (3, 2, 3)
    with pytest.raises(ConfigError, match="a grid of 5x4 patches does not divide into 2x2 squares"):
        MergeConfig().num_tokens((1, 5, 4))
