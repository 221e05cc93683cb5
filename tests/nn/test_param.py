"""Keys of parameters: those that nnx would draw, traced or not."""

import jax
import pytest
from flax import nnx

from mllm_jax.nn.param import next_key


def three(next_one) -> list[jax.Array]:
    rngs = nnx.Rngs(7)
    return [jax.random.key_data(next_one(rngs)) for _ in range(3)]


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "traced"])
def test_keys_are_those_that_nnx_draws(how):
    ours, theirs = how(lambda: three(next_key))(), how(lambda: three(lambda rngs: rngs.params()))()
    assert [k.tolist() for k in ours] == [k.tolist() for k in theirs]
