"""Rows of a table that lies split over chips are those of the whole table, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.nn import lookup as module
from mllm_jax.nn.lookup import lookup, plan
from mllm_jax.sharding import Layout, rows, sharding_of_parameter, use

N, D, ROWS, LENGTH = 24, 32, 8, 6


def both(layout: Layout, devices: list, dtype: str, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """The rows, and the gradient of a sum of them with weights that differ."""
    mesh = layout.make_mesh(devices)
    table = jax.device_put(jax.random.normal(jax.random.key(0), (n, D)), sharding_of_parameter(("vocab", "embed"), (n, D), layout, mesh))
    index = jax.device_put(jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, n), rows(mesh))
    weight = jax.random.normal(jax.random.key(2), (ROWS, LENGTH, D)).astype(dtype)

    def loss(table: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = lookup(table, index, "vocab", dtype)
        return jnp.sum((found * weight).astype(jnp.float32)), found

    with use(layout, mesh):
        grad, found = jax.jit(jax.grad(loss, has_aux=True))(table)
    return np.asarray(found), np.asarray(grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("sizes", "g"), [
    ({"fsdp": 8}, 8), ({"fsdp": 8}, 4), ({"fsdp": 8}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"fsdp": 4, "tensor": 2}, 1),
    ({"data": 2, "fsdp": 4}, 4), ({"fsdp": 2, "expert": 4}, 8), ({"fsdp": 2, "expert": 4}, 4),
], ids=lambda x: str(x))
def test_rows_and_gradient_are_those_of_one_device(sizes, g, dtype, monkeypatch):
    bytes_of_a_number = 4 + jnp.dtype(dtype).itemsize
    monkeypatch.setattr(module, "TABLE_BYTES", N * D * bytes_of_a_number // sizes.get("tensor", 1) // g)
    layout = Layout(mesh=sizes)
    mesh = layout.make_mesh()
    with use(layout, mesh):
        assert plan(jnp.zeros((N, D)), jnp.zeros((ROWS, LENGTH), int), "vocab", jnp.dtype(dtype)).g == g
    found, grad = both(layout, jax.devices(), dtype)
    want, want_grad = both(Layout(mesh={"data": 1}), jax.devices()[:1], dtype)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-6, atol=1e-6)       # sums of float32 in another order


def test_a_table_that_the_mesh_does_not_divide_is_whole_on_each_device():
    layout = Layout(mesh={"fsdp": 2, "tensor": 4})
    np.testing.assert_array_equal(both(layout, jax.devices(), "float32", n=27)[0], both(Layout(), jax.devices()[:1], "float32", n=27)[0])


def test_on_a_chip_only_its_part_of_the_table_is_held_in_memory():
    pytest.importorskip("libtpu")
    from benchmarks.lookup_memory import program
    from mllm_jax.plan.topology import not_kept

    tokens, width, length = 65_536, 2048, 1024
    with not_kept():
        temporaries = program("v5e:2x4", tokens, width, length).compile().memory_analysis().temp_size_in_bytes
    # The part and its gradient in the layout in which rows lie together; and rows and their gradient, sent and received.
    assert temporaries <= 2 * tokens * width * 4 // 8 + 4 * length * width * 2
