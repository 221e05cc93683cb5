"""The kernel in programs compiled for TPU chips: it is chosen where the program will run, and leaves no scores."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

pytest.importorskip("libtpu")

from mllm_jax.nn import stack
from mllm_jax.nn.attention import Attention, attend
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.param import merge, split
from mllm_jax.nn.visibility import Visibility
from mllm_jax.plan.topology import not_kept, topology
from mllm_jax.sharding import Layout, positions, rows, use

B, S = 4, 1200                          # more than a block, and not full blocks
SIZES = {64: (4, 4), 72: (4, 2), 80: (4, 1), 96: (3, 3), 128: (8, 2), 256: (4, 4)}      # of a head -> heads of queries, of keys


def lowered(layout: Layout, sizes: dict, on: str = "v5e:2x2", s: int = S) -> jax.stages.Lowered:
    """Gradients of attention with heads of each of these sizes, in one program."""
    mesh = layout.make_mesh(list(topology(on).devices))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows(mesh))

    def loss(qkvs: dict, segments: jax.Array) -> jax.Array:
        order = jnp.broadcast_to(jnp.arange(s), (B, s))
        sees = Visibility(segments=segments, order=order, key_segments=segments, key_order=order)
        return sum(jnp.sum(attend(*qkv, sees, window=k) ** 2) for k, qkv in qkvs.items())

    qkvs = {k: tuple(array(jnp.bfloat16, B, s, heads, k) for heads in (h, g, g)) for k, (h, g) in sizes.items()}
    with use(layout, mesh):
        return jax.jit(jax.grad(loss)).lower(qkvs, array(jnp.int32, B, s))


def calls(text: str) -> list[str]:
    return sorted(re.findall(r"%[\w.]*flash_(fwd|bwd)[\w.]* = .*? custom-call", text))


def test_heads_of_every_size_compile_on_a_mesh_without_scores(capfd):
    with not_kept():
        text = lowered(Layout(mesh={"fsdp": 2, "tensor": 2}), SIZES).compile().as_text()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert calls(text) == ["bwd"] * len(SIZES) + ["fwd"] * len(SIZES)
    long = {size for size in re.findall(r"\[([\d,]+)\]", text) if sum(int(n) >= S for n in size.split(",")) > 1}
    assert not long


def test_rows_that_are_longer_than_fast_memory_compile_where_it_is_small():
    """v4 has 16 MiB, an eighth of v5e: wide heads, and narrow ones that go together, leave less of it to keys."""
    with not_kept():
        text = lowered(Layout(mesh={"data": 4}), {64: (4, 4), 72: (2, 2), 128: (2, 2), 256: (2, 2)}, "v4:2x2x1", 4096).compile().as_text()
    assert len(calls(text)) == 8


def test_xla_is_used_where_the_layout_says_so():
    text = lowered(Layout(mesh={"data": 4}, attention="xla"), {64: (4, 4)}).as_text()
    assert "tpu_custom_call" not in text and f"x{S}x{S}x" in text


def test_attention_that_is_kept_is_not_computed_again():
    mesh = (layout := Layout(mesh={"data": 4}, remat="qkv+attention")).make_mesh(list(topology("v5e:2x2").devices))
    cfg = BlockConfig(width=256, mlp=1, heads=4)
    with use(layout, mesh), not_kept():
        graph, params = split(nnx.eval_shape(lambda: stack.make([lambda r: Attention(cfg, rngs=r)], 2, rngs=nnx.Rngs(0))))
        step = lambda x, layer, *_: (x + layer(x)[0], None)
        loss = lambda params, x: jnp.sum(stack.run(merge(graph, params), step, x, depth=2)[0])
        x = jax.ShapeDtypeStruct((4, 512, 256), jnp.float32, sharding=rows(mesh))
        assert calls(jax.jit(jax.grad(loss)).lower(params, x).compile().as_text()) == ["bwd", "fwd"]


@pytest.mark.parametrize("h", [8, 6], ids=["heads exchanged", "keys gathered"])
def test_memory_falls_as_positions_of_a_row_are_split(h):
    """Of a layer and its gradients, for rows of 16,384 positions, as many as devices have together."""
    cfg = BlockConfig(width=512, mlp=1, heads=h, kv_heads=2, head_dim=64)

    def temporaries(parts: int) -> int:
        layout = Layout(mesh={"data": 8 // parts, "context": parts}, dtype="bfloat16", remat="full")
        mesh = layout.make_mesh(list(topology("v5e:2x4").devices))
        with use(layout, mesh), not_kept():
            graph, params = split(nnx.eval_shape(lambda: Attention(cfg, rngs=nnx.Rngs(0))))
            array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=positions(mesh, shape))

            def loss(params: dict, x: jax.Array, segments: jax.Array) -> jax.Array:
                order = jnp.broadcast_to(jnp.arange(x.shape[1]), segments.shape)
                sees = Visibility(segments=segments, order=order, key_segments=segments, key_order=order, causal=True)
                return jnp.sum(merge(graph, params)(x, sees)[0] ** 2)

            rows = 8 // parts
            x, segments = array(jnp.bfloat16, rows, 16384, 512), array(jnp.int32, rows, 16384)
            return jax.jit(jax.grad(loss, (0, 1))).lower(params, x, segments).compile().memory_analysis().temp_size_in_bytes

    whole, split_ = temporaries(1), temporaries(8)
    # Of what a device has of its own an eighth; gathered keys, a quarter of the queries here, and their gradients stay whole.
    assert split_ < whole / (7 if h == 8 else 3)
