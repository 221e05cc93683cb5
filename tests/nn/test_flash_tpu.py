"""The kernel in programs compiled for TPU chips: it is chosen where the program will run, and leaves no scores."""

import re

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu")

from mllm_jax.nn.attention import attend
from mllm_jax.nn.visibility import Visibility
from mllm_jax.plan.topology import not_kept, topology
from mllm_jax.sharding import Layout, rows, use

B, S = 4, 1200                          # more than a block, and not full blocks
SIZES = {64: (4, 4), 72: (4, 2), 80: (4, 1), 96: (3, 3), 128: (8, 2), 256: (4, 4)}      # of a head -> heads of queries, of keys


def lowered(layout: Layout, sizes: dict) -> jax.stages.Lowered:
    """Gradients of attention with heads of each of these sizes, in one program."""
    mesh = layout.make_mesh(list(topology("v5e:2x2").devices))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows(mesh))

    def loss(qkvs: dict, segments: jax.Array) -> jax.Array:
        order = jnp.broadcast_to(jnp.arange(S), (B, S))
        sees = Visibility(segments=segments, order=order, key_segments=segments, key_order=order)
        return sum(jnp.sum(attend(*qkv, sees, window=k) ** 2) for k, qkv in qkvs.items())

    qkvs = {k: tuple(array(jnp.bfloat16, B, S, heads, k) for heads in (h, g, g)) for k, (h, g) in sizes.items()}
    with use(layout, mesh):
        return jax.jit(jax.grad(loss)).lower(qkvs, array(jnp.int32, B, S))


def test_heads_of_every_size_compile_on_a_mesh_without_scores(capfd):
    with not_kept():
        text = lowered(Layout(mesh={"fsdp": 2, "tensor": 2}), SIZES).compile().as_text()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    calls = re.findall(r"%[\w.]*flash_(fwd|bwd)[\w.]* = .*? custom-call", text)
    assert sorted(calls) == ["bwd"] * len(SIZES) + ["fwd"] * len(SIZES)
    long = {size for size in re.findall(r"\[([\d,]+)\]", text) if sum(int(n) >= S for n in size.split(",")) > 1}
    assert not long


def test_xla_is_used_where_the_layout_says_so():
    text = lowered(Layout(mesh={"data": 4}, attention="xla"), {64: (4, 4)}).as_text()
    assert "tpu_custom_call" not in text and f"x{S}x{S}x" in text
