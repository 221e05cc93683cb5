import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.nn.param import RMSNorm, merge, split
from mllm_jax.types import Features
from tests.contracts import check_connector


@pytest.mark.parametrize("cfg", [MLPConfig(depth=1), MLPConfig(depth=2), MLPConfig(depth=3, activation="silu", bias=False),
                                 MLPConfig(depth=1, bias=False, norm=RMSNorm(offset=1.0))])
def test_contract(cfg):
    check_connector(cfg)


def test_an_activation_stands_between_layers_and_not_after_the_last():
    graph, params = split(MLPConfig(depth=2).build(2, 1, rngs=nnx.Rngs(0)))
    params |= {"layers/0/kernel": jnp.array([[1.0], [0.0]]), "layers/0/bias": jnp.zeros(1),
               "layers/1/kernel": jnp.array([[2.0]]), "layers/1/bias": jnp.array([-3.0])}
    x = Features(tokens=jnp.array([[[1.0, 9.0]]]), mask=jnp.ones((1, 1), bool))
    # 2 gelu(1) - 3, gelu(1) = 0.8413447 (the normal distribution below 1)
    np.testing.assert_allclose(merge(graph, params)(x).tokens, [[[2 * 0.8413447 - 3]]], atol=1e-6)
