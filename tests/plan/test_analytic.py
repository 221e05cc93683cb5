"""The model of memory and time, against programs whose numbers are known by hand."""

import jax
import jax.numpy as jnp
import pytest

from mllm_jax.plan.analytic import Live
from mllm_jax.plan.roofline import flops
from mllm_jax.plan.traced import Reader, axes_of

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


def body(function, *arguments, parameters=()):
    """Of (shape, spec) arguments, split over the mesh above; those of these numbers are parameters."""
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, "float32") for shape, _ in arguments))
    axes = [axes_of(spec, len(shape), SIZES) for shape, spec in arguments]
    return Reader(SIZES, {arguments[k][0]: axes[k] for k in parameters}).read(jaxpr, axes)


ROWS = ((64, 16, 32), (("data", "fsdp"),))


@pytest.mark.parametrize(("function", "others", "local"), [
    (lambda x: jnp.tanh(x) + 1, [], (8, 16, 32)),
    (lambda x: x.reshape(64 * 16, 32), [], (128, 32)),
    (lambda x: x.reshape(8, 8, 16, 32), [], (1, 8, 16, 32)),
    (lambda x: x.transpose(1, 0, 2), [], (16, 8, 32)),
    (lambda x: x.sum(0), [], (16, 32)),
    (lambda x: x.sum(1, keepdims=True), [], (8, 1, 32)),
    (lambda x, w: x @ w, [((32, 128), ("fsdp", "tensor"))], (8, 16, 64)),
    (lambda x, w: jnp.einsum("bsd,bsf->df", x, x @ w), [((32, 128), (None, "tensor"))], (32, 64)),
    (lambda x, y: jnp.concatenate([x, y], 1), [((64, 4, 32), (("data", "fsdp"),))], (8, 20, 32)),
])
def test_axes_go_with_the_dimensions_they_split(function, others, local):
    [out] = body(function, ROWS, *others).outputs
    assert out.local == local


def test_a_matrix_that_is_split_along_the_rows_axes_is_gathered():
    made = body(lambda x, w, v: (x @ w) @ v, ROWS, ((32, 128), (None, "tensor")), ((128, 32), ("tensor", "fsdp")))
    assert [v.gathered for v in made.inputs] == [False, False, True]
    # Each chip has 128 rows and half of the hidden units.
    assert [flops(op) for op in made.ops if op.name == "dot_general"] == [2 * 128 * 32 * 64, 2 * 128 * 64 * 32]


def test_chains_are_fused_and_what_products_give_is_in_memory():
    made = Live(body(lambda x, w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) * 2) + 1), ROWS, ((32, 128), ())), top=True)
    assert made.peak == 8 * 16 * 128 * 4 + 4            # of the product; the sum is one number


def test_a_loop_over_layers_keeps_its_states_and_the_gradients_lie_as_parameters_do():
    layers, weights = 6, ((6, 32, 32), (None, "fsdp"))

    def step(w, x):
        grad = jax.grad(lambda w: jnp.sum(jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0] ** 2))(w)
        return w - grad

    made = Live(body(step, weights, ROWS, parameters=[0]), top=True)
    state, gradient = 8 * 16 * 32 * 4, 32 * 32 * 4
    known = {key.shape: size for size, key in made.alive if not isinstance(key, tuple)}
    assert known[layers, 64, 16, 32] == layers * state and known[weights[0]] == layers * gradient / 4
    # In a turn: what goes back, the gradient of the layer before it is summed over chips, and this chip's part of the weight.
    [inner] = made.loops[made.at]
    assert inner.peak == state + gradient + gradient / 4
    assert made.peak == layers * (state + gradient / 4) + state + inner.peak


def test_what_a_kernel_reads_lies_in_rows_of_128():
    value = body(lambda x: x, ROWS).inputs[0]
    plain = value.bytes
    value.kernel = True
    assert value.bytes == 4 * plain
