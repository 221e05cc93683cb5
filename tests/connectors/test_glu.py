import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np

from mllm_jax.connectors.glu import GLUConfig
from mllm_jax.nn.param import merge, split
from mllm_jax.types import Features
from tests.contracts import check_connector


def test_contract():
    check_connector(GLUConfig(hidden=24))


def test_a_value_by_hand():
    graph, params = split(GLUConfig(hidden=1).build(1, 2, rngs=nnx.Rngs(0)))
    assert {k: v.shape for k, v in params.items() if v.ndim == 2} == {
        "proj/kernel": (1, 2), "mlp/gate/kernel": (2, 1), "mlp/up/kernel": (2, 1), "mlp/down/kernel": (1, 2)}
    params |= {"proj/kernel": jnp.array([[1.0, -1.0]]), "norm/scale": jnp.array([1.0, 1.0]), "norm/bias": jnp.zeros(2),
               "mlp/gate/kernel": jnp.array([[1.0], [0.0]]), "mlp/up/kernel": jnp.array([[0.0], [1.0]]), "mlp/down/kernel": jnp.array([[1.0, 2.0]])}
    x = Features(tokens=jnp.full((1, 1, 1), 3.0), mask=jnp.ones((1, 1), bool))
    # The norm makes (1, -1) of (3, -3); gelu of it is (0.841345, -0.158655); silu(0.841345) = 0.587890
    np.testing.assert_allclose(merge(graph, params)(x).tokens[0, 0], 0.587890 * -0.158655 * np.array([1, 2]), atol=1e-5)
