import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.nn.lora import LoRA, merge_adapters
from mllm_jax.nn.param import axes_of, merge, split
from mllm_jax.types import Batch

PLAIN = DecoderConfig(vocab=30, width=16, depth=3, heads=4, kv_heads=2, mlp=24)
CFG = LoRA(model=PLAIN, rank=3, alpha=6.0, targets=("blocks/*/attn/*", "blocks/0/mlp/down"))


def rows():
    tokens = jnp.arange(14).reshape(2, 7)
    one = jnp.ones((2, 7), jnp.int32)
    at = jnp.broadcast_to(jnp.arange(7)[:, None], (2, 7, 3))
    return Batch(tokens=tokens, targets=tokens, weights=one.astype(float), segments=one, positions=at, kinds=0 * one)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params):
    model = merge(graph, params)
    return model(model.embed(rows().tokens), rows())[0]


@functools.cache
def trained():
    """Adapters away from zero."""
    graph, params = split(CFG.build(rngs=nnx.Rngs(0)))
    noise = lambda i, x: 0.3 * jax.random.normal(jax.random.key(i), x.shape)
    return graph, {k: noise(i, x) if "/lora/" in k else x for i, (k, x) in enumerate(params.items())}


def test_merged_is_the_same_function():
    graph, params = trained()
    plain = split(PLAIN.build(rngs=nnx.Rngs(0)))[0]
    merged = merge_adapters(params, CFG.rank, CFG.alpha)
    assert sorted(merged) == sorted(split(PLAIN.build(rngs=nnx.Rngs(0)))[1])
    adapted = run(graph, params)
    # Sums of 16 to 24 products of order 1 in another order, three layers of them.
    np.testing.assert_allclose(run(plain, merged), adapted, atol=1e-4)
    without = run(plain, {k: x for k, x in params.items() if "/lora/" not in k})
    assert np.abs(np.asarray(without - adapted)).max() > 0.1


def test_the_model_starts_unchanged():
    graph, params = split(CFG.build(rngs=nnx.Rngs(0)))
    plain = {k: x for k, x in params.items() if "/lora/" not in k}
    np.testing.assert_array_equal(run(graph, params), run(split(PLAIN.build(rngs=nnx.Rngs(0)))[0], plain))


def test_adapters_have_names_for_their_axes_and_few_parameters():
    module = CFG.build(rngs=nnx.Rngs(0))
    axes, params = axes_of(module), split(module)[1]
    assert axes["blocks/0/attn/q/lora/a"] == ("embed", "rank") and axes["blocks/0/attn/q/lora/b"] == ("rank", "heads", "head_dim")
    assert axes["blocks/0/attn/o/lora/a"] == ("heads", "head_dim", "rank")
    assert params["blocks/0/attn/k/lora/b"].shape == (3, 3, 2, 4)               # layers rank kv_heads head_dim
    # q: 16 + 16, k and v: 16 + 8, o: 16 + 16, down: 24 + 16; times rank 3, times 3 layers
    assert sum(x.size for k, x in params.items() if "/lora/" in k) == (32 + 24 + 24 + 32 + 40) * 9


def test_targets_that_match_nothing_are_an_error():
    with pytest.raises(ConfigError, match="no Linear layer matches"):
        LoRA(model=PLAIN, rank=2, alpha=1.0, targets=("decoder/nothing",)).build(rngs=nnx.Rngs(0))


def test_a_gradient_reaches_every_adapter():
    graph, params = trained()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(run(graph, p)))))(params)
    assert all(jnp.any(g != 0) for k, g in grads.items() if "/lora/" in k)
