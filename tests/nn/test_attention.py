import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from mllm_jax.nn import attention
from mllm_jax.nn.attention import LayerCache, attend
from mllm_jax.nn.visibility import Visibility

B, S, H, K = 2, 24, 6, 8


def qkv(groups, s=S):
    keys = jax.random.split(jax.random.key(groups), 3)
    return [jax.random.normal(key, (B, s, n, K)) for key, n in zip(keys, (H, groups, groups))]


def packed():
    """Two rows of packed examples with padding; in the first, a bidirectional span at positions 3-6."""
    segments = jnp.array([[1] * 10 + [2] * 9 + [0] * 5, [1] * 24])
    order = jnp.broadcast_to(jnp.arange(S), (B, S)).at[0, 3:7].set(6)
    return Visibility(segments=segments, order=order, key_segments=segments, key_order=order)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_queries_are_those_of_jax_and_torch(torch, groups):
    q, k, v = qkv(groups)
    np.testing.assert_allclose(attend(q, k, v, None), jax.nn.dot_product_attention(q, k, v), atol=2e-6)
    sees = packed()
    real = np.asarray(sees.segments) > 0
    want = jax.nn.dot_product_attention(q, k, v, mask=sees.mask()[:, None])
    np.testing.assert_allclose(np.asarray(attend(q, k, v, sees))[real], np.asarray(want)[real], atol=2e-6)
    theirs = [torch.tensor(np.asarray(x)).transpose(1, 2) for x in (q, k, v)]
    mask = torch.tensor(np.asarray(sees.mask() | ~sees.segments.astype(bool)[:, :, None])[:, None])
    want = torch.nn.functional.scaled_dot_product_attention(*theirs, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    np.testing.assert_allclose(np.asarray(attend(q, k, v, sees))[real], want.numpy()[real], atol=2e-6)


def test_gradients_are_those_of_jax():
    q, k, v = qkv(2)
    sees = packed()
    weight = jax.random.normal(jax.random.key(9), (B, S, H, K)) * (sees.segments > 0)[..., None, None]
    ours = jax.grad(lambda *a: jnp.sum(attend(*a, sees) * weight), (0, 1, 2))(q, k, v)
    want = jax.grad(lambda *a: jnp.sum(jax.nn.dot_product_attention(*a, mask=sees.mask()[:, None]) * weight), (0, 1, 2))(q, k, v)
    for a, b in zip(ours, want):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_segment_sees_itself_alone():
    """Packed equals unpacked, and the other example may hold anything."""
    q, k, v = qkv(2)
    first = slice(0, 10)
    alone = attend(q[:1, first], k[:1, first], v[:1, first], cut(packed(), first))
    np.testing.assert_allclose(attend(q, k, v, packed())[:1, first], alone, atol=1e-6)
    other = attend(q, k.at[0, 10:].set(1e3), v.at[0, 10:].set(1e3), packed())
    np.testing.assert_array_equal(other[0, first], attend(q, k, v, packed())[0, first])
    assert jnp.isfinite(other).all()                            # padding too


def cut(sees, part):
    return Visibility(segments=sees.segments[:1, part], order=sees.order[:1, part],
                      key_segments=sees.key_segments[:1, part], key_order=sees.key_order[:1, part])


def test_who_sees_whom():
    sees = np.asarray(packed().mask()[0])
    assert sees[2].nonzero()[0].tolist() == [0, 1, 2]                   # causal
    assert sees[4].nonzero()[0].tolist() == [0, 1, 2, 3, 4, 5, 6]       # the whole span, and not position 7
    assert sees[11].nonzero()[0].tolist() == [10, 11]                   # its own example
    assert not sees[20].any() and not sees[:, 20].any()                 # padding


def test_a_window_ends_what_is_seen_before_and_nothing_after():
    sees = packed()                                                     # the span is longer than the window
    seen = [np.flatnonzero(row).tolist() for row in np.asarray(sees.mask(3)[0])]
    assert seen[2] == [0, 1, 2] and seen[9] == [7, 8, 9] and seen[10] == [10]
    assert seen[3] == [1, 2, 3, 4, 5, 6] and seen[6] == [4, 5, 6]
    later = Visibility(segments=sees.segments[:, 9:10], order=sees.order[:, 9:10], key_segments=sees.key_segments,
                       key_order=sees.key_order, start=9)               # one query of a cache
    assert np.flatnonzero(later.mask(3)[0, 0]).tolist() == seen[9]


def test_a_cache_keeps_what_was_written():
    cache = LayerCache(k=jnp.zeros((3, B, 8, 2, K)), v=jnp.zeros((3, B, 8, 2, K)), layer=jnp.array(1), index=jnp.array(5))
    _, k, v = qkv(2, s=2)
    new = cache.write(k, v)
    np.testing.assert_array_equal(new.read()[0][:, 5:7], k)
    np.testing.assert_array_equal(new.read()[1][:, 5:7], v)
    assert float(jnp.abs(new.k).sum()) == pytest.approx(float(jnp.abs(k).sum()))


def half(s):
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(2, s))
    order = jnp.broadcast_to(jnp.arange(s), (B, s))
    segments = jnp.minimum(1 + order // 100, 2)
    return q, k, v, Visibility(segments=segments, order=order, key_segments=segments, key_order=order)


def test_on_gpu_cudnn_is_given_what_xla_would_compute(monkeypatch):
    q, k, v, sees = half(128)
    want = [attend(q, k, v, None), attend(q, k, v, sees, scale=0.3), attend(q, k, v, sees, window=5)]
    given, real = [], jax.nn.dot_product_attention

    def stand_in(*args, implementation, **options):
        given.append(implementation)
        return real(*args, implementation="xla", **options)

    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    ours = [attend(q, k, v, None), attend(q, k, v, sees, scale=0.3), attend(q, k, v, sees, window=5)]
    assert given == ["cudnn"] * 3
    for a, b in zip(ours, want):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.02)     # half precision
    attend(*(x.astype(jnp.float32) for x in (q, k, v)), sees)       # cuDNN has no float32,
    attend(*half(129))                                              # no mask of an odd side,
    attend(q[:, :64], k, v, None)                                   # and is not asked for few queries
    assert given == ["cudnn"] * 3


def test_cudnn_lowers_for_cuda_with_a_mask_that_all_heads_share(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)        # the one thing that is asked of the machine
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    grad = jax.jit(jax.grad(lambda q, k, v, sees: jnp.sum(attend(q, k, v, sees)), (0, 1, 2)))
    text = grad.trace(*half(256)).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn$fmhaScaleBiasSoftmax" in text and f"tensor<{B}x1x256x256xbf16>" in text
    assert f"tensor<{B}x{H}x256x256x" not in text
