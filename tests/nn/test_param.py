"""Keys of parameters: those that nnx would draw, traced or not."""

import jax
import pytest
from flax import nnx

from mllm_jax.config import load, override
from mllm_jax.nn.param import abstract, next_key, split


def three(next_one) -> list[jax.Array]:
    rngs = nnx.Rngs(7)
    return [jax.random.key_data(next_one(rngs)) for _ in range(3)]


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "traced"])
def test_keys_are_those_that_nnx_draws(how):
    ours, theirs = how(lambda: three(next_key))(), how(lambda: three(lambda rngs: rngs.params()))()
    assert [k.tolist() for k in ours] == [k.tolist() for k in theirs]


def test_an_abstract_model_is_made_once_for_equal_configurations():
    cfg = load("projector/llava_15").tiny().model
    assert abstract(cfg) is abstract(load("projector/llava_15").tiny().model)
    wider = override(cfg, "decoder.mlp=48")
    assert split(abstract(wider))[1].keys() == split(abstract(cfg))[1].keys() and abstract(wider) is not abstract(cfg)
    assert {k: v.shape for k, v in split(abstract(wider))[1].items()} == {
        k: v.shape for k, v in split(wider.build(rngs=nnx.Rngs(0)))[1].items()}
