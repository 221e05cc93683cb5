"""What a layer keeps in the memory of the host is there, to the byte, in the program for a TPU."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

pytest.importorskip("libtpu")

from mllm_jax import sharding  # noqa: E402
from mllm_jax.nn import stack  # noqa: E402
from mllm_jax.nn.block import Block  # noqa: E402
from mllm_jax.nn.block_config import BlockConfig  # noqa: E402
from mllm_jax.nn.param import merge, split  # noqa: E402
from mllm_jax.plan.topology import topology  # noqa: E402
from mllm_jax.sharding import Layout  # noqa: E402

CFG = BlockConfig(width=128, mlp=512, heads=1, gated=True)
DEPTH, TOKENS = 4, 512


def test_bytes_on_the_host_are_those_of_what_is_named():
    layout = Layout(mesh={"data": 1}, dtype="bfloat16", remat="qkv+host:mlp", attention="xla")
    mesh = layout.make_mesh(list(topology("v5e:2x2").devices)[:1])
    graph, params = split(nnx.eval_shape(lambda: stack.make([lambda r: Block(CFG, rngs=r)], DEPTH, rngs=nnx.Rngs(0))))
    shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    def loss(params: dict, x: jax.Array) -> jax.Array:
        y, _ = stack.run(merge(graph, params), lambda x, layer, i, j: (layer(x)[0], None), x, depth=DEPTH)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    with sharding.use(layout, mesh):
        step = jax.jit(jax.grad(loss)).lower({k: shape(v.shape, v.dtype) for k, v in params.items()}, shape((1, TOKENS, CFG.width), jnp.bfloat16))
        memory = step.compile().memory_analysis()
    # Two products for each token and layer, in bfloat16.
    assert memory.host_temp_size_in_bytes == DEPTH * TOKENS * 2 * CFG.mlp * 2
