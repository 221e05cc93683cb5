"""Layers of experts inside a decoder: what a position becomes does not depend on those after it, nor on how the row is read."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.decoders.layers import Layer
from mllm_jax.decoders.transformer import STABLELM_2_1_6B
from mllm_jax.nn.moe import MoEConfig
from mllm_jax.nn.param import merge, split
from mllm_jax.types import Batch
from tests.synthetic import randomized

CFG = replace(STABLELM_2_1_6B, cycle=(Layer(mlp=MoEConfig(experts=4, capacity=0.5, explore=True)), Layer())).tiny()
B, S, CUT = 2, 20, 13


def rows(start: int, stop: int) -> Batch:
    at = jnp.broadcast_to(jnp.arange(S), (B, S))
    segments = (at >= jnp.array([0, 4])[:, None]).astype(jnp.int32)       # padded at the left, as prompts are
    tokens = jax.random.randint(jax.random.key(0), (B, S), 0, CFG.vocab)
    whole = Batch(tokens=tokens, targets=tokens, weights=segments * 1.0, segments=segments, kinds=at * 0, positions=jnp.stack([at] * 3, -1))
    return jax.tree.map(lambda x: x[:, start:stop], whole)


def test_a_row_read_in_parts_with_a_cache_is_the_row_read_at_once():
    graph, params = split(CFG.build(rngs=nnx.Rngs(0)))
    params = randomized(params)

    @jax.jit
    def both(params):
        model = merge(graph, params)
        read = lambda batch, cache: model(model.embed(batch.tokens), batch, cache=cache)
        whole, aux, _ = read(rows(0, S), None)
        first, _, cache = read(rows(0, CUT), model.empty_cache(B, S))
        last, _, _ = read(rows(CUT, S), cache)
        return whole, jnp.concatenate([first, last], axis=1), aux

    whole, parts, aux = both(params)
    real = np.asarray(rows(0, S).segments) > 0
    # Sums of 32 products of order 1, in another order.
    np.testing.assert_allclose(np.asarray(parts)[real], np.asarray(whole)[real], atol=1e-5)
    # Outside of training there is room for all, although the capacity is half of what is fair; padding is not counted.
    assert float(aux["router/dropped"].value) == 0 and float(aux["router/dropped"].count) == 2 * real.sum()
