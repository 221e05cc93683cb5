"""What is kept is not computed again, and what a layer computes does not depend on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax import sharding
from mllm_jax.config import ConfigError
from mllm_jax.nn import remat, stack
from mllm_jax.nn.block import Block
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.sharding import Layout

CFG = BlockConfig(width=16, mlp=24, heads=2, kv_heads=1, gated=True)
# Products with weights: 3 of qkv, 1 out, 3 of the feed-forward layer; 2 of attention. The last one, down, is never needed again.
FORWARD = 9


def gradient(words: str, places: int = 1, depth: int = 2):
    blocks = stack.make([lambda r: Block(CFG, rngs=r)] * places, depth, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 8, 16))

    def loss(blocks, x):
        with sharding.use(Layout(remat=words)):
            return jnp.sum(jnp.sin(stack.run(blocks, lambda x, layer, i, j: (layer(x)[0], None), x, depth=depth)[0]))

    return jax.grad(loss, (0, 1)), (blocks, x)


def products(words: str) -> int:
    """Matrix products in one layer's loops, forward and backward."""
    f, args = gradient(words)
    return str(jax.make_jaxpr(f)(*args)).count("dot_general[")


def test_what_is_kept_is_not_computed_again():
    none, full = products("none"), products("full")
    assert full - none == FORWARD - 1
    assert products("qkv+attention+out+mlp") - none == 1            # the scores, which softmax goes back through
    assert full - products("qkv") == 3
    assert full - products("mlp") == 2
    assert full - products("out") == 1


def test_layers_are_computed_again_when_their_gradient_comes():
    """Else the TPU's compiler keeps what it finds equal, or computes all of a turn at its beginning: gemma3 takes a quarter more memory."""
    waits = lambda **kw: jax.jit((made := gradient("full", **kw))[0]).lower(*made[1]).as_text().count("optimization_barrier")
    assert waits() == 0                                             # the loop itself waits
    assert waits(places=2, depth=1) == 1 and waits(places=2, depth=5) == 3


@pytest.mark.parametrize("words", ["full", "dots", "qkv", "qkv+attention+out+mlp"])
def test_gradients_do_not_depend_on_what_is_kept(words):
    (f, args), (g, _) = gradient(words), gradient("none")
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    jax.tree.map(same, jax.jit(f)(*args), jax.jit(g)(*args))


@pytest.mark.parametrize(("words", "says"), [("qvk", "nearest: qkv"), ("qkv+", "nothing that a layer keeps"), ("qkv+host:qkv", "twice")])
def test_a_word_that_is_not_known_is_told(words, says):
    with pytest.raises(ConfigError, match=says):
        remat.policy(words)
