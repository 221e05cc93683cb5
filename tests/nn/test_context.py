"""Attention of rows that are split over devices: which way it takes, and that it is attention, with XLA's kernels."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.nn import attention, context
from mllm_jax.nn.attention import attend
from mllm_jax.nn.context import Pieces, way
from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import Layout, check_length, use

B, S, K = 2, 640, 8
PLACE = jnp.broadcast_to(jnp.arange(S), (B, S))
SEGMENTS = jnp.array([[1] * 300 + [2] * 200 + [3] * 100 + [0] * 40, [7] * 640])


def visible(order):
    return Visibility(segments=SEGMENTS, order=order, key_segments=SEGMENTS, key_order=order)


@pytest.mark.parametrize(("mesh", "h", "s", "want"), [
    ({"context": 8}, 32, S, "heads"), ({"context": 8}, 28, S, "keys"), ({"context": 4}, 28, S, "heads"),
    ({"context": 4, "tensor": 2}, 12, S, "keys"), ({"context": 4, "tensor": 2}, 16, S, "heads"),
    ({"context": 8}, 32, 1, None), ({"context": 8}, 32, 8 * 9, None), ({"fsdp": 8}, 32, S, None)], ids=str)
def test_heads_are_exchanged_where_they_divide(mesh, h, s, want):
    q, k = (jax.ShapeDtypeStruct((B, s, heads, K), jnp.float32) for heads in (h, 4))
    layout = Layout(mesh=mesh)
    with use(layout, layout.make_mesh(jax.devices()[: int(np.prod(list(mesh.values())))])):
        assert way(q, k, visible(PLACE)) == want
        assert way(q, k, None) is None  # items, which lie on one device each


@pytest.mark.parametrize("parts", [2, 4, 5])
def test_pieces_from_the_front_go_with_pieces_from_the_back(parts):
    deal = Pieces(axis="context", parts=parts, length=3)
    mesh = Layout(mesh={"context": parts}).make_mesh(jax.devices()[:parts])
    row = jnp.arange(6 * parts)

    def local(mine):
        got = deal.deal(mine, 0)
        return got, deal.back(got, 0), deal.cut(row, 0), deal.numbers()

    P = jax.P("context")
    got, back, cut, numbers = jax.shard_map(local, mesh=mesh, in_specs=P, out_specs=P, check_vma=False)(row)
    np.testing.assert_array_equal(got, cut)
    np.testing.assert_array_equal(back, row)
    assert [sum(pair) for pair in numbers.reshape(-1, 2)] == [2 * parts - 1] * parts
    np.testing.assert_array_equal(got, (3 * numbers[:, None] + jnp.arange(3)).reshape(-1))


@pytest.mark.parametrize(("mesh", "h", "long"), [   # by heads; by keys, in blocks and whole
    ({"data": 2, "context": 4}, 4, 16), ({"data": 2, "context": 4}, 6, 16), ({"tensor": 2, "context": 4}, 4, 2048)], ids=str)
def test_values_and_gradients_are_those_of_one_device(monkeypatch, mesh, h, long):
    monkeypatch.setattr(attention, "LONG", long)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (B, S, heads, K)) for key, heads in zip(keys, (h, 2, 2, h)))
    weight = weight * (SEGMENTS > 0)[..., None, None]
    spans = visible(PLACE.at[:, 100:330].set(100))

    def loss(qkv):
        causal, near = attend(*qkv, replace(visible(PLACE), causal=True)), attend(*qkv, spans, window=90)
        return jnp.sum(weight * (causal + 2 * near))

    want = jax.jit(jax.value_and_grad(loss))((q, k, v))
    layout = Layout(mesh=mesh)
    with use(layout, layout.make_mesh()):
        ours = jax.jit(jax.value_and_grad(loss))((q, k, v))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)      # float32 sums of hundreds of terms in another order


def test_rows_that_do_not_divide_are_an_error_in_one_line():
    with pytest.raises(ConfigError, match=r"^stages.align.data.seq_len is 2056; the layout needs a multiple of 32: two pieces of a row for "
                                          r"each of the 16 parts of context=16$"):
        check_length("stages.align.data.seq_len", 2056, {"fsdp": 4, "context": 16})
    check_length("stages.align.data.seq_len", 2056, {"fsdp": 16})
    assert context.parts_of(("context",)) == 1
