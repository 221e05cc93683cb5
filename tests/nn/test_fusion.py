"""What the TPU compiler is kept from, in its own programs; and that values are the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("libtpu")

from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from mllm_jax import sharding  # noqa: E402
from mllm_jax.nn.block import Block  # noqa: E402
from mllm_jax.nn.block_config import BlockConfig  # noqa: E402
from mllm_jax.nn.fusion import project  # noqa: E402
from mllm_jax.nn.param import merge, split  # noqa: E402
from mllm_jax.plan.topology import not_kept, topology  # noqa: E402
from mllm_jax.sharding import Layout  # noqa: E402

CFG = BlockConfig(width=512, mlp=1024, heads=4, kv_heads=2, gated=True)


def program() -> str:
    """A layer, forward and backward, compiled for four chips."""
    layout = Layout(mesh={"fsdp": 4}, dtype="bfloat16")
    mesh = layout.make_mesh(list(topology("v5e:2x2").devices))
    graph, params = split(nnx.eval_shape(lambda: Block(CFG, rngs=nnx.Rngs(0))))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=everywhere) for k, v in params.items()}
    x = jax.ShapeDtypeStruct((4, 512, 512), jnp.bfloat16, sharding=rows)

    def loss(params: dict, x: jax.Array) -> jax.Array:
        return jnp.sum(merge(graph, params)(x)[0].astype(jnp.float32) ** 2)

    with sharding.use(layout, mesh), not_kept():
        return jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile().as_text()


def test_no_product_with_weights_is_a_convolution_over_heads():
    windows = re.findall(r"convolution\([^\n]*?window=\{size=(\d+)", program())
    assert all(int(size) == 1 for size in windows), windows


@pytest.mark.parametrize(("shape", "n"), [((8, 6), 1), ((8, 2, 3), 1), ((2, 4, 6), 2)])
def test_a_kernel_as_a_matrix_gives_what_it_gives_as_it_is(shape, n):
    kernel = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (3, 5, *shape[:n]))
    over = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    np.testing.assert_allclose(project(x, kernel, n), jax.lax.dot_general(x, kernel, (over, ((), ()))), rtol=1e-5, atol=1e-5)
