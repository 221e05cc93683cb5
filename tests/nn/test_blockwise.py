"""Attention by blocks is attention, and leaves out what nobody sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.nn import attention
from mllm_jax.nn.attention import attend
from mllm_jax.nn.blockwise import attend_blockwise, needed
from mllm_jax.nn.visibility import Visibility

B, S, H, G, K = 2, 50, 4, 2, 8          # no multiple of the block


def qkv(s=S, t=S):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (B, n, heads, K)) for key, n, heads in zip(keys, (s, t, t), (H, G, G))]


def visible(order, start=0):
    """Queries from `start` of two rows of packed segments, with padding at the end or at the beginning."""
    segments = jnp.array([[1] * 21 + [2] * 9 + [3] * 13 + [0] * 7, [0] * 5 + [7] * 45])
    return Visibility(segments=segments[:, start:], order=order[:, start:], key_segments=segments, key_order=order, start=start)


PLACE = jnp.broadcast_to(jnp.arange(S), (B, S))
CASES = {
    "whole segments": (visible(jnp.zeros((B, S), int)), None),
    "causal": (visible(PLACE), None),
    "a span that sees itself, in a window": (visible(PLACE.at[1, 10:30].set(29)), 6),
    "a narrow window": (visible(PLACE), 3),
    "queries behind a cache": (visible(PLACE, 30), 12),
    "windows that alternate": (Visibility(
        segments=(w := 1 + PLACE // 12 * 2 + PLACE % 2), order=PLACE * 0, key_segments=w, key_order=PLACE * 0), None),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_whole_matrix(name):
    sees, window = CASES[name]
    q, k, v = qkv(s=sees.order.shape[1])
    real = np.asarray(sees.segments) > 0
    weight = jax.random.normal(jax.random.key(1), q.shape) * real[..., None, None]
    both = lambda f: jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(f(q, k, v) * weight), (0, 1, 2), has_aux=False))
    want, want_grads = both(lambda q, k, v: attend(q, k, v, sees, window=window))(q, k, v)
    value, grads = both(lambda q, k, v: attend_blockwise(q, k, v, sees, scale=K**-0.5, window=window, block=8))(q, k, v)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(grads, want_grads):
        np.testing.assert_allclose(a, b, atol=2e-6)             # float32 sums in another order


def test_blocks_that_nobody_sees_are_not_read():
    """What is read shows: nothing times NaN is NaN."""
    q, k, v = qkv(48, 48)
    segments = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 0]), jnp.array([16, 24, 8]), total_repeat_length=48), (B, 48))
    sees = Visibility(segments=segments, order=segments * 0, key_segments=segments, key_order=segments * 0)
    out = attend_blockwise(q, k, v.at[:, 16:].set(jnp.nan), sees, scale=1.0, block=8)
    assert jnp.isfinite(out[:, :16]).all() and jnp.isnan(out[:, 16:40]).all() and not out[:, 40:].any()
    order = jnp.broadcast_to(jnp.arange(48), (B, 48))
    causal = Visibility(segments=segments * 0 + 1, order=order, key_segments=segments * 0 + 1, key_order=order)
    out = attend_blockwise(q, k, v.at[:, 24:].set(jnp.nan), causal, scale=1.0, block=8)
    assert jnp.isfinite(out[:, :24]).all()
    out = attend_blockwise(q, k, v.at[:, :16].set(jnp.nan), causal, scale=1.0, window=9, block=8)
    assert jnp.isfinite(out[:, 24:]).all()


def test_blocks_are_left_out_by_their_smallest_and_largest_segments():
    segments = jnp.array([[[1, 1], [1, 2], [2, 0], [0, 0]]]).swapaxes(0, 1)      # one row, four blocks of two
    order, place = segments * 0, 2 * jnp.arange(4)
    want = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(needed(segments, order, segments, order, place, place, None), np.array(want, bool))


def test_a_row_of_8192_patches_needs_no_matrix_of_scores(monkeypatch):
    shape = lambda h: jax.ShapeDtypeStruct((1, 8192, h, 16), jnp.float32)
    numbers = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def loss(q, k, v, segments):
        sees = Visibility(segments=segments, order=segments * 0, key_segments=segments, key_order=segments * 0)
        return jnp.sum(attend(q, k, v, sees))

    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape(4), shape(4), shape(4), numbers).compile()
    assert step.memory_analysis().temp_size_in_bytes < 4 * 8192 * 8192 * 4 / 10
    monkeypatch.setattr(attention, "LONG", 1 << 20)
    dense = jax.jit(loss).lower(shape(4), shape(4), shape(4), numbers).compile()
    assert dense.memory_analysis().temp_size_in_bytes >= 4 * 8192 * 8192 * 4
