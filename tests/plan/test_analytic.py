"""The model of memory and time, against programs whose numbers are known by hand."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint

from mllm_jax.plan.analytic import Live
from mllm_jax.plan.roofline import flops
from mllm_jax.plan.traced import Reader, axes_of, in_tiles

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


def body(function, *arguments, parameters=()):
    """Of (shape, spec) arguments, split over the mesh above; those of these numbers are parameters."""
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, "float32") for shape, _ in arguments))
    axes = [axes_of(spec, len(shape), SIZES) for shape, spec in arguments]
    return Reader(SIZES, {arguments[k][0]: axes[k] for k in parameters}).read(jaxpr, axes)


ROWS = ((64, 16, 128), (("data", "fsdp"),))


@pytest.mark.parametrize(("function", "others", "local"), [
    (lambda x: jnp.tanh(x) + 1, [], (8, 16, 128)),
    (lambda x: x.reshape(64 * 16, 128), [], (128, 128)),
    (lambda x: x.reshape(8, 8, 16, 128), [], (1, 8, 16, 128)),
    (lambda x: x.transpose(1, 0, 2), [], (16, 8, 128)),
    (lambda x: x.sum(0), [], (16, 128)),
    (lambda x: x.sum(1, keepdims=True), [], (8, 1, 128)),
    (lambda x, w: x @ w, [((128, 512), ("fsdp", "tensor"))], (8, 16, 256)),
    (lambda x, w: jnp.einsum("bsd,bsf->df", x, x @ w), [((128, 512), (None, "tensor"))], (128, 256)),
    (lambda x, y: jnp.concatenate([x, y], 1), [((64, 4, 128), (("data", "fsdp"),))], (8, 20, 128)),
    (lambda x: jnp.stack([x, x], 1), [], (8, 2, 16, 128)),
    (lambda x: x * (jnp.arange(64)[:, None, None] > 3), [], (8, 16, 128)),
])
def test_axes_go_with_the_dimensions_they_split(function, others, local):
    [out] = body(function, ROWS, *others).outputs
    assert out.local == local


def test_a_matrix_that_is_split_along_the_rows_axes_is_gathered():
    made = body(lambda x, w, v: (x @ w) @ v, ROWS, ((128, 512), (None, "tensor")), ((512, 128), ("tensor", "fsdp")))
    assert [v.gathered for v in made.inputs] == [False, False, True]
    # Each chip has 128 rows and half of the hidden units.
    assert [flops(op) for op in made.ops if op.name == "dot_general"] == [2 * 128 * 128 * 256, 2 * 128 * 256 * 128]


def test_chains_are_fused_and_what_products_give_is_in_memory():
    made = Live(body(lambda x, w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) * 2) + 1), ROWS, ((128, 512), ())), top=True)
    assert made.peak == 8 * 16 * 512 * 4 + 4            # of the product; the sum is one number


def test_a_loop_over_layers_keeps_its_states_and_the_gradients_lie_as_parameters_do():
    layers, weights = 6, ((6, 128, 128), (None, "fsdp"))

    def step(w, x):
        grad = jax.grad(lambda w: jnp.sum(jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0] ** 2))(w)
        return w - grad

    made = Live(body(step, weights, ROWS, parameters=[0]), top=True)
    state, gradient = 8 * 16 * 128 * 4, 128 * 128 * 4
    known = {key.shape: size for size, key in made.alive if not isinstance(key, tuple)}
    assert known[layers, 64, 16, 128] == layers * state and known[weights[0]] == layers * gradient / 4
    # In a turn: what goes back, the gradient of the layer before it is summed over chips, and this chip's part of the weight.
    [inner] = made.loops[made.at]
    assert inner.peak == state + gradient + gradient / 4
    assert made.peak == layers * (state + gradient / 4) + state + inner.peak


@pytest.mark.parametrize(("dims", "width", "more", "takes"), [
    ((4, 2048, 5632), 2, {}, (4, 2048, 5632)),
    ((27, 4304, 18), 4, {}, (32, 4352, 18)),                    # 27 wastes less than 18
    ((24, 64, 16, 64), 4, {}, (24, 64, 16, 128)),
    ((2, 3, 576, 588), 1, {}, (2, 3, 576, 640)),                # of bytes 32 lie in a tile, and 576 is a multiple of that
    ((3, 128), 2, {}, (4, 128)),
    ((120, 32, 64, 64), 4, {}, (128, 32, 64, 64)),
    ((120, 32, 64, 64), 4, {"apart": (0, 1)}, (120, 32, 64, 128)),
    ((128, 257, 64), 2, {"rows": True}, (128, 264, 128)),
    ((4, 2048, 32, 64), 2, {}, (4, 2048, 32, 64)),              # 2048 lie along the tiles
    ((4, 2048, 32, 64), 2, {"minor": 3}, (4, 2048, 32, 128)),
])
def test_arrays_lie_in_tiles(dims, width, more, takes):
    """As the buffer assignment of programs for TPUs has them."""
    assert in_tiles(dims, width, **more) == math.prod(takes) * width


@pytest.mark.parametrize(("within", "hidden"), [(False, 2), (True, 3)])
def test_what_follows_a_product_is_done_at_its_end_in_the_place_of_what_it_reads(within, hidden):
    """Back through a feed-forward layer whose first product is computed again: its result is never there, the activation and its gradient
    are, and where weights come in during the product, also what they are made from."""
    big = ((1 << 10, 1 << 9), ("fsdp", None)), ((1 << 9, 1 << 10), (None, "fsdp"))
    rows = ((64, 256, 1 << 10), (("data", "fsdp"),))

    def back(x, w, v):
        grad = jnp.broadcast_to(x, x.shape) * 2 @ v.T           # of the activation
        again = x @ w
        return grad * (1 - jnp.tanh(again)**2) @ w.T, jnp.einsum("bsf,bsd->fd", jnp.tanh(again), x)

    made = Live(body(back, rows, *big), top=True, within=within)
    size = 8 * 256 * 512 * 4
    assert sum(s for s, key in made.alive if s == size) == hidden * size


@pytest.mark.parametrize("laid", [lambda x: x, lambda x: with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2)))], ids=["", "laid"])
def test_gradients_of_weights_wait_for_the_last_kernel(laid):
    """Where collectives run apart, so that the activation and its gradient are there beside the kernel; how an array is to lie makes no other."""
    rows, big = ((64, 256, 1 << 10), (("data", "fsdp"),)), ((1 << 10, 1 << 9), ("fsdp", None))

    def back(x, w, v):
        grad = jnp.broadcast_to(x, x.shape) * 2 @ v.T
        hidden = laid(x @ w)
        of_v = jnp.einsum("bsf,bsd->fd", jnp.tanh(hidden), x)
        grad_hidden = laid(jax.lax.optimization_barrier(grad * (1 - jnp.tanh(hidden)**2)))
        of_w = jnp.einsum("bsd,bsf->df", x, grad_hidden)
        return pl.pallas_call(lambda x, y: None, jax.ShapeDtypeStruct((64, 1024, 1 << 10), "float32"))(grad_hidden @ w.T), of_v, of_w

    made = Live(body(back, rows, big, ((1 << 9, 1 << 10), (None, "fsdp"))), top=True)
    assert made.body.ops[made.at].name == "pallas_call"
    size = 8 * 256 * 512 * 4
    assert sum(s for s, key in made.alive if s == size) == 2 * size


def test_what_is_made_for_a_kernel_lies_as_it_takes_it():
    """Queries go through a scale and a transposition before: heads of 64 take the room of 128 there, too."""
    def f(x):
        heads = (x @ jnp.ones((128, 128))).reshape(64, 16, 2, 64) * 3
        q = jnp.transpose(heads, (0, 2, 1, 3))
        return pl.pallas_call(lambda i, o: None, out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype))(q)

    made = body(f, ROWS)
    by = {op.name: op.outputs[0] for op in made.ops}
    assert by["mul"].minor == 3 and by["mul"].bytes == 2 * 8 * 16 * 2 * 64 * 4
    assert made.outputs[0].rows and made.outputs[0].bytes == by["mul"].bytes


def test_a_loop_makes_a_mask_of_one_number_itself():
    def step(x):
        zeros = jnp.full(x.shape, -1.0)
        return jax.lax.scan(lambda x, _: (jnp.where(x > 0, x, zeros), None), x, None, length=3)[0]

    assert Live(body(step, ROWS), top=True).peak < 2 * 8 * 16 * 128 * 4
