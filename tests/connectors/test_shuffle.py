import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.shuffle import ShuffleConfig
from mllm_jax.nn.param import LayerNorm, merge, split
from mllm_jax.types import Features
from tests.contracts import check_connector


@pytest.mark.parametrize("cfg", [
    ShuffleConfig(grid=4, side=2, mlp=MLPConfig(depth=1, bias=False)), ShuffleConfig(grid=4, side=4),
    ShuffleConfig(grid=4, mlp=MLPConfig(norm=LayerNorm())),
])
def test_contract(cfg):
    check_connector(cfg)


def test_a_square_is_read_row_by_row_and_patches_whole():
    """Two items of 4 x 4 patches (2 k, 2 k + 1) through the identity."""
    graph, params = split(ShuffleConfig(grid=4, mlp=MLPConfig(depth=1, bias=False)).build(2, 8, rngs=nnx.Rngs(0)))
    x = jnp.arange(64.0).reshape(1, 32, 2)
    y = merge(graph, {k: jnp.eye(8) for k in params})(Features(tokens=x, mask=jnp.arange(32)[None] < 16))
    assert y.tokens.shape == (1, 8, 8)
    np.testing.assert_array_equal(y.tokens[0, 1], [4, 5, 6, 7, 12, 13, 14, 15])
    np.testing.assert_array_equal(y.tokens[0, 6], [48, 49, 50, 51, 56, 57, 58, 59])
    np.testing.assert_array_equal(y.mask, [[True] * 4 + [False] * 4])


@pytest.mark.parametrize(("grid", "side"), [(6, 2), (6, 3), (8, 4)])
def test_the_order_of_values_is_that_of_both_families(torch, grid, side):
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.internvl.modeling_internvl import InternVLModel

    x = np.random.default_rng(0).normal(size=(2, grid * grid, 5)).astype(np.float32)
    n = 5 * side * side
    graph, params = split(ShuffleConfig(grid=grid, side=side, mlp=MLPConfig(depth=1, bias=False)).build(5, n, rngs=nnx.Rngs(0)))
    ours = merge(graph, {k: jnp.eye(n) for k in params})(Features(tokens=jnp.asarray(x), mask=jnp.ones(x.shape[:2], bool))).tokens
    np.testing.assert_array_equal(ours, Idefics3Connector.pixel_shuffle(None, torch.tensor(x), side))
    if side == 2:                       # floats of 1/3 do not divide there
        theirs = InternVLModel.pixel_shuffle(None, torch.tensor(x).reshape(2, grid, grid, 5), 1 / side)
        np.testing.assert_array_equal(ours, theirs.reshape(2, -1, n))


def test_the_grid_must_be_the_encoder_s_and_divide():
    with pytest.raises(ConfigError, match="27x27 tokens does not divide into 2x2 squares"):
        ShuffleConfig(grid=27).num_tokens((1, 27, 27))
    with pytest.raises(ConfigError, match="pixel shuffle reads grids of 4x4 tokens; the encoder gives 6x6"):
        ShuffleConfig(grid=4).num_tokens((1, 6, 6))
