"""Products in eight bits against numpy, how far they are from whole ones, and that layouts, remat and training bear them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from mllm_jax import sharding
from mllm_jax.chips import CHIPS
from mllm_jax.config import ConfigError
from mllm_jax.launch.layouts import find
from mllm_jax.nn import quantized, stack
from mllm_jax.nn.block import Block
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.param import axes_of, merge, split
from mllm_jax.nn.quantized import multiply
from mllm_jax.sharding import Layout

CFG = BlockConfig(width=64, mlp=128, heads=4, kv_heads=4, gated=True)
LAST = {"int8": (127, 127), "fp8": (448, 57344)}        # the largest number, of values and of gradients
# Half of the distance between neighbours, relative to the largest value of a vector; of fp8 to a value itself, at 3 bits and 2.
STEP = {"int8": (1 / 254, 1 / 254), "fp8": (2**-4, 2**-3)}


def operands():
    """x f[2 12 64], a matrix f[64 48], dy f[2 12 48]; rows of unlike sizes, and a column of zeros."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, matrix, grad = (jax.random.normal(k, s) for k, s in zip(keys, ((2, 12, 64), (64, 48), (2, 12, 48)), strict=True))
    return x * jnp.logspace(-3, 3, 12)[:, None], matrix.at[:, 5].set(0), grad * jnp.logspace(-6, 0, 12)[:, None]


def rounded(x: np.ndarray, axis: int, kind: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, scales)."""
    x = x.astype(np.float32)
    largest = np.abs(x).max(axis=axis, keepdims=True)
    scale = largest / np.float32(LAST[kind][k])
    x = x / np.where(scale == 0, np.float32(1), scale)
    if kind == "int8":
        return np.rint(x).astype(np.float64), scale.astype(np.float64)
    return x.astype((ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)[k]).astype(np.float64), scale.astype(np.float64)


@pytest.fixture(scope="module", params=["int8", "fp8"])
def product(request):
    x, matrix, grad = operands()
    y, pull = jax.vjp(lambda x, m: multiply(x, m, request.param), x, matrix)
    return request.param, [np.asarray(a, np.float64) for a in (x, matrix, grad, y, *pull(grad))]


def close(found: np.ndarray, want: np.ndarray) -> None:
    # A value on the edge between two numbers may fall to the other one in float32; that is few, and one step of many that add up.
    off = np.abs(found - want) > 1e-5 * np.abs(want).max(axis=-1, keepdims=True)
    assert off.mean() <= 0.01 and np.linalg.norm(found - want) <= 1e-3 * np.linalg.norm(want)


def test_values_and_gradients_are_those_of_numpy(product):
    kind, (x, matrix, grad, y, dx, dm) = product
    (qx, sx), (qm, sm) = rounded(x, -1, kind, 0), rounded(matrix, 0, kind, 0)
    close(y, (qx @ qm) * sx * sm)
    qg, sg = rounded(grad * sm[0], -1, kind, 1)
    close(dx, (qg @ qm.T) * sg)
    np.testing.assert_allclose(dm, np.einsum("bsk,bsn->kn", x, grad), rtol=1e-4, atol=1e-4 * np.abs(dm).max())


def test_errors_are_those_of_rounding(product):
    """|x' m' - x m| <= the sum over k of |dx m| + |x dm| + |dx dm|, with each value off by half a step at most."""
    kind, (x, matrix, grad, y, dx, _) = product

    def bound(a: np.ndarray, b: np.ndarray, of_a: int) -> np.ndarray:
        off = lambda v, axis, k: STEP[kind][k] * (np.abs(v) if kind == "fp8" else np.abs(v).max(axis=axis, keepdims=True) * np.ones_like(v))
        # Under the smallest numbers of fp8 steps are even, a thousandth of a thousandth of the largest value.
        least = lambda v, axis: 0 if kind == "int8" else np.abs(v).max(axis=axis, keepdims=True) * 1e-5
        da, db = off(a, -1, of_a) + least(a, -1), off(b, 0, 0) + least(b, 0)
        return da @ np.abs(b) + np.abs(a) @ db + da @ db

    assert (np.abs(y - x @ matrix) <= bound(x, matrix, 0) * 1.01).all()
    # Of a whole row the noise adds up by chance: a hundredth with int8, three with fp8.
    relative = lambda found, want: np.linalg.norm(found - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert relative(y, x @ matrix).max() <= {"int8": 0.02, "fp8": 0.06}[kind]
    assert relative(dx, grad @ matrix.T).max() <= {"int8": 0.02, "fp8": 0.1}[kind]


def gradient(layout: Layout, mesh: jax.sharding.Mesh | None = None):
    """(the function that gives loss and gradients of two layers, its arguments)."""
    graph, params = split(stack.make([lambda r: Block(CFG, rngs=r)], 2, rngs=nnx.Rngs(0)))
    axes = axes_of(merge(graph, params))
    x = jax.random.normal(jax.random.key(1), (8, 16, 64))
    if mesh is not None:
        params = {k: jax.device_put(v, sharding.sharding_of(axes[k], v.shape, layout, mesh)) for k, v in params.items()}
        x = jax.device_put(x, sharding.rows(mesh))

    def loss(params, x):
        with sharding.use(layout, mesh):
            y, _ = stack.run(merge(graph, params), lambda x, layer, i, j: (layer(x)[0], None), x, depth=2)
            return jnp.mean(jnp.sin(y) ** 2)

    return jax.value_and_grad(loss, (0, 1)), (params, x)


@pytest.fixture(scope="module")
def alone():
    f, args = gradient(Layout(quantize="int8"))
    return jax.jit(f)(*args)


@pytest.mark.parametrize("other", ["k", "n"])
def test_scales_are_those_of_whole_vectors_to_the_last_bit_however_they_are_split(other):
    """Rows over two devices, and inputs or outputs of the matrix over four: largest values and sums of int32 do not depend on it."""
    x, matrix, grad = operands()
    mesh = Layout(mesh={"m": 2, other: 4}).make_mesh()
    lies = lambda *names: jax.NamedSharding(mesh, jax.P(*(n if n in mesh.axis_names else None for n in names)))

    def both(x, matrix, grad):
        y, pull = jax.vjp(lambda x, m: multiply(x, m, "int8"), x, matrix)
        return y, *pull(grad)

    want = jax.jit(both)(x, matrix, grad)
    found = jax.jit(both)(jax.device_put(x, lies("m", None, "k")), jax.device_put(matrix, lies("k", "n")), jax.device_put(grad, lies("m", None, "n")))
    np.testing.assert_array_equal(found[0], want[0])
    np.testing.assert_array_equal(found[1], want[1])
    np.testing.assert_allclose(found[2], want[2], rtol=1e-5, atol=1e-5 * np.abs(want[2]).max())     # float32 sums in another order


@pytest.mark.parametrize("layout", [
    Layout(mesh={}, remat="full"), Layout(mesh={}, remat="dots"), Layout(mesh={}, remat="qkv+attention+mlp"), Layout(mesh={"fsdp": 2, "tensor": 4}),
], ids=lambda x: f"{x.remat} on {x.mesh}")
def test_neither_a_mesh_nor_what_is_kept_changes_the_gradients_of_layers(layout, alone):
    layout = replace(layout, quantize="int8")
    f, args = gradient(layout, layout.make_mesh() if "tensor" in layout.mesh else None)
    loss, grads = jax.jit(f)(*args)
    # Norms and attention in another order move a value in a thousand over the edge between two numbers, which is seen in what follows:
    # a hundredth of a gradient at most.  Quantizing itself moves them by six.
    np.testing.assert_allclose(loss, alone[0], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(alone[1]), strict=True):
        assert np.linalg.norm(np.asarray(a) - b) <= 0.02 * np.linalg.norm(b)


def test_what_is_kept_is_not_computed_again_nor_wider_than_it_is():
    def products(words: str) -> int:
        f, args = gradient(Layout(quantize="int8", remat=words))
        return str(jax.make_jaxpr(f)(*args)).count("preferred_element_type=int32")

    # Seven with weights and seven gradients of inputs; of those that are done again the last of a layer is not needed.
    assert [products(w) for w in ("full", "dots", "qkv")] == [20, 14, 17]


def test_the_layout_alone_says_so_and_parameters_know_nothing():
    names = lambda layout: {k: (v.shape, v.dtype) for k, v in gradient(layout)[1][0].items()}
    assert names(Layout(quantize="int8")) == names(Layout())


@pytest.mark.parametrize(("layout", "says"), [
    ("v5e-8:quantize=fp8", "v5e has no units for quantize=fp8; it has them for int8, and fp8 is of h100, h200"),
    ("a100-8:quantize=fp8", "no layout is called"),
])
def test_a_chip_that_has_no_such_units_is_told(layout, says):
    with pytest.raises(ConfigError, match=says):
        find(layout, "tpu")


def test_a_chip_that_jax_finds_is_told_too():
    device = type("Device", (), {"device_kind": "TPU v5 lite", "platform": "tpu"})()
    with pytest.raises(ConfigError, match="TPU v5 lite has no units for quantize=fp8"):
        Layout(quantize="fp8").make_mesh([device])
    assert "fp8" in CHIPS["h100"].quantized


def test_other_words_are_told_and_so_is_a_package_that_is_not_here(monkeypatch):
    with pytest.raises(ConfigError, match="nearest: int8"):
        quantized.check("int4")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "mllm_jax\[quant\]"'):
        quantized.check("fp8")
    quantized.check("none")
