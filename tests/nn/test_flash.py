"""The kernel for TPU, run by the interpreter of Pallas, is attention: values and gradients, on one device and on a mesh."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.nn import attention, flash, stack
from mllm_jax.nn.attention import Attention, attend
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.flash import attend_flash
from mllm_jax.nn.flash_kernel import PART, SKIP, WHOLE, Plan, codes
from mllm_jax.nn.param import merge, split
from mllm_jax.nn.position import Rope
from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import Layout, put_rows, use

B, S, H, K = 2, 300, 4, 16              # three blocks of 128, the last one not full
PLACE = jnp.broadcast_to(jnp.arange(S), (B, S))
SEGMENTS = jnp.array([[1] * 140 + [2] * 60 + [3] * 80 + [0] * 20, [0] * 5 + [7] * 295])


def visible(order, segments=SEGMENTS):
    return Visibility(segments=segments, order=order, key_segments=segments, key_order=order)


SPAN = PLACE.at[1, 10:180].set(10)
CASES = {                               # visibility, window, key heads, queries, chunks of keys
    "all see all, whatever the window": (None, 7, 4, S, 1),
    "whole segments": (visible(PLACE * 0), None, 2, S, 3),
    "causal": (visible(PLACE), None, 4, S, 1),
    "causal, keys in chunks": (visible(PLACE), None, 1, S, 3),
    "prefix": (visible(PLACE.at[:, :150].set(0)), None, 1, S, 1),
    "a span that sees itself, in a window": (visible(SPAN), 60, 2, S, 3),
    "a narrow window": (visible(PLACE), 3, 1, S, 1),
    "windows that alternate": (visible(PLACE * 0, 1 + PLACE // 12 * 2 + PLACE % 2), None, 4, S, 1),
    "fewer queries than keys": (replace(visible(PLACE * 0), segments=SEGMENTS[:, ::2], order=PLACE[:, ::2] * 0), None, 2, S // 2, 1),
}


def inputs(g, s=S, width=K, h=H):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (B, n, heads, width)) for key, n, heads in zip(keys, (s, S, S, s), (h, g, g, h)))
    return (q, k, v), weight


def value_and_grads(attend, qkv, weight):
    """What attention gives where there is no padding, and the gradients of its weighted sum."""

    def loss(qkv):
        out = attend(*qkv) * (weight != 0)
        return jnp.sum(out * weight), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return out, *grads


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_whole_matrix(monkeypatch, name):
    sees, window, g, s, chunks = CASES[name]
    monkeypatch.setattr(flash, "BLOCKS", (128,))
    monkeypatch.setattr(flash, "ONE", 0)
    monkeypatch.setattr(flash, "CHUNK", flash.CHUNK if chunks == 1 else 128 * 128 * 4 // 2)
    qkv, weight = inputs(g, s)
    if sees is not None:
        weight = weight * (sees.segments > 0)[..., None, None]
    want = value_and_grads(partial(attend, visibility=sees, window=window), qkv, weight)
    ours = value_and_grads(partial(attend_flash, visibility=sees, scale=K**-0.5, window=window, interpret=True), qkv, weight)
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)             # float32 sums of hundreds of terms in another order


WIDE = {                                # heads that are read as they lie; width, heads, visibility, window, key heads, queries, chunks of keys, rope
    "rotated inside, keys at once": (128, 2, visible(SPAN), 60, 1, S, 1, Rope()),
    "rotated inside, keys in chunks": (128, 2, visible(PLACE), None, 2, S, 3, Rope(sections=(24, 20, 20))),
    "rotated in part, so outside": (128, 2, visible(PLACE), None, 2, S, 1, Rope(part=0.5)),
    "not rotated, fewer queries than keys": (128, 2, *CASES["fewer queries than keys"], None),
    "two heads in the lanes": (64, 4, visible(SPAN), 60, 4, S, 1, None),
    "two heads, rotated outside, keys in chunks": (64, 2, visible(PLACE), None, 2, S, 3, Rope()),
    "four heads": (32, 4, visible(PLACE * 0), None, 4, S, 1, None),
}


@pytest.mark.parametrize("name", WIDE)
def test_heads_of_whole_lanes_are_read_as_they_lie_and_rotated_inside(monkeypatch, name):
    width, h, sees, window, g, s, chunks, rope = WIDE[name]
    monkeypatch.setattr(flash, "BLOCKS", (128,))
    monkeypatch.setattr(flash, "CHUNK", flash.CHUNK if chunks == 1 else 128 * 128 * 4 // 2)
    qkv, weight = inputs(g, s, width=width, h=h)
    rotation = rope and rope(jnp.stack([PLACE, PLACE // 7, PLACE % 11], axis=-1), width)
    how = {"visibility": sees, "window": window, "rotation": rotation}
    weight = weight * (sees.segments > 0)[..., None, None]
    want = value_and_grads(partial(attend, **how), qkv, weight)
    run = partial(attend_flash, scale=width**-0.5, interpret=True, **how)
    for a, b in zip(value_and_grads(run, qkv, weight), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)             # as above, of eight times as many numbers
    assert "transpose" not in [x.primitive.name for x in jax.make_jaxpr(run)(*qkv).eqns]


def test_a_query_that_sees_nothing_gives_zero_and_finite_gradients(monkeypatch):
    monkeypatch.setattr(flash, "BLOCKS", (128,))
    qkv, _ = inputs(2)
    run = partial(attend_flash, visibility=visible(PLACE), scale=1.0, interpret=True)
    assert not jnp.where(SEGMENTS[..., None, None] > 0, 0, run(*qkv)).any()
    _, *grads = value_and_grads(run, qkv, 1.0)
    assert all(jnp.isfinite(x).all() for x in grads)
    assert not jnp.where(SEGMENTS[..., None, None] > 0, 0, grads[1]).any()      # nobody sees padding


def test_blocks_are_left_out_or_need_no_mask_by_their_smallest_and_largest_numbers():
    plan = Plan(block=2, key_block=2, n=4, m=4, per=4, width=K, merged=False, together=1, scale=1.0, window=None, causal=False,
                axes=("batch", "heads"), pieces=None, keys=8, interpret=True)
    segments, place = jnp.array([[1, 1, 1, 1, 1, 2, 0, 0]]), jnp.arange(8)[None]
    keys = jnp.where(segments > 0, segments, -1)
    table = lambda order, window=None: codes(replace(plan, window=window), segments, order, keys, order)[0].tolist()
    _, P, W = SKIP, PART, WHOLE
    assert table(place * 0) == [[W, W, P, _], [W, W, P, _], [P, P, P, _], [_, _, _, _]]
    assert table(place) == [[P, _, _, _], [W, P, _, _], [P, P, P, _], [_, _, _, _]]
    assert table(place, 2) == [[P, _, _, _], [P, P, _, _], [_, P, P, _], [_, _, _, _]]


def test_blocks_that_nobody_sees_are_not_read(monkeypatch):
    """What is read shows: nothing times NaN is NaN."""
    monkeypatch.setattr(flash, "BLOCKS", (128,))
    (q, k, v), _ = inputs(2)
    segments = 1 + PLACE // 128
    run = partial(attend_flash, scale=1.0, interpret=True)
    out = run(q, k, v.at[:, 128:256].set(jnp.nan), visible(PLACE * 0, segments))
    assert jnp.isnan(out[:, 128:256]).all() and jnp.isfinite(out[:, :128]).all() and jnp.isfinite(out[:, 256:]).all()
    assert jnp.isfinite(run(q, k, v.at[:, 128:].set(jnp.nan), visible(PLACE, SEGMENTS * 0 + 1))[:, :128]).all()
    assert jnp.isfinite(run(q, k, v.at[:, :128].set(jnp.nan), visible(PLACE, SEGMENTS * 0 + 1), window=2)[:, 257:]).all()


@pytest.mark.parametrize(("mesh", "g", "k"), [
    ({"data": 2, "fsdp": 2, "tensor": 2}, 1, 8), ({"data": 2, "fsdp": 2, "tensor": 2}, 2, 128),
    ({"fsdp": 2, "context": 4}, 2, 8),  # positions exchanged for heads, of which keys have too few
    ({"context": 8}, 2, 8),             # keys gathered, and queries dealt out
    ({"context": 8}, 2, 128),
    ({"fsdp": 4, "tensor": 2}, 4, 64),  # two heads go together on a device
    ({"fsdp": 2, "tensor": 4}, 4, 64),  # where it has one they do not
    ({"context": 8}, 4, 64),
], ids=str)
def test_layers_on_a_mesh_are_those_of_one_device(monkeypatch, mesh, g, k):
    """Rows, positions and heads split over devices, in a loop over layers that are computed again, in a loop over parts of the batch."""
    cfg, layout = BlockConfig(width=32, mlp=1, heads=4, kv_heads=g, head_dim=k), Layout(mesh=mesh, remat="full")
    graph, params = split(stack.make([lambda r: Attention(cfg, rngs=r)], 2, rngs=nnx.Rngs(0)))
    # A row of 16 pieces, of which none fills a block.
    segments = jnp.pad(jnp.tile(SEGMENTS, (4, 1)), ((0, 0), (0, 4)))
    batch = (jax.random.normal(jax.random.key(1), (8, S + 4, 32)), segments, jnp.pad(jnp.tile(SPAN, (4, 1)), ((0, 0), (0, 4))))

    def loss(params, batch):
        def part(_, batch):
            x, segments, order = batch
            rotation = Rope()(jnp.broadcast_to(jnp.arange(S + 4)[:, None], (*x.shape[:2], 3)), k)
            step = lambda x, layer, *_: (x + layer(x, visible(order, segments), window=60, rotation=rotation)[0], None)
            y = stack.run(merge(graph, params), step, x, depth=2)[0]
            return None, jnp.sum(jnp.where(segments[..., None] > 0, y, 0) ** 2)
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(4, 2, *x.shape[1:]), 0, 1), batch)
        return jnp.sum(jax.lax.scan(jax.checkpoint(part), None, parts)[1])

    want = jax.jit(jax.value_and_grad(loss))(params, batch)
    monkeypatch.setattr(attention, "kernel", lambda: "flash")
    monkeypatch.setattr(attention, "attend_flash", partial(attend_flash, interpret=True))
    monkeypatch.setattr(flash, "BLOCKS", (128,))
    mesh = layout.make_mesh()
    with use(layout, mesh):
        ours = jax.jit(jax.value_and_grad(loss))(params, jax.tree.map(lambda x: put_rows(np.asarray(x), mesh), batch))
    np.testing.assert_allclose(ours[0], want[0], rtol=1e-6)
    for name, grad in want[1].items():
        np.testing.assert_allclose(ours[1][name], grad, rtol=1e-4, atol=1e-5 * float(jnp.abs(grad).max()), err_msg=name)


def test_blocks_waste_little():
    assert [flash.block_of(n) for n in (300, 512, 1024, 1200, 4096)] == [384, 512, 512, 256, 512]
    assert [flash.block_of(n, flash.ONE) for n in (577, 729, 1024)] == [640, 768, 512]


def test_a_kernel_that_the_platform_lacks_is_named():
    with use(Layout(attention="flash")), pytest.raises(ConfigError, match="attention by 'flash', which cpu lacks; choose 'auto' or one of"):
        attention.kernel()
