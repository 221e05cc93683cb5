"""Products with the matrices of transformer layers in eight bits, on chips that are faster at those (`Layout.quantize`).

    y  = x w          rows of x and columns of w, each divided by its largest value, as int8 or e4m3
    dx = dy w'        rows of dy likewise, as int8 or e5m2, with the w of the forward pass
    dw = x' dy        in the compute dtype

This is SwitchBack (arXiv:2304.13013, section 2.2) with a scale for each column of w, where the paper's has one for all of it; by that a
CLIP of a billion parameters trained to within a tenth of a point of bfloat16.
The last product sums over all tokens of a batch: its noise grows with the batch, and all chips would have to agree on its scales.
Parameters stay float32; scales and sums are too, or int32.  How values are rounded and multiplied is qwix's.

Embeddings, the head, norms, routers, patches and single projections of connectors are not products of layers: there is little to gain,
and the first and the last layers of a network are the ones that suffer.  Nor are experts of sparse layers (nn/experts.py) and adapters.
"""

import functools
import math
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.config import ConfigError, nearest
from mllm_jax.nn.fusion import once
from mllm_jax.nn.param import Linear
from mllm_jax.nn.remat import LOW, keep
from mllm_jax.sharding import current

# What values are rounded to, and what gradients are, whose rows differ more within themselves.
NUMBERS = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}
# The largest value becomes 127.  By itself qwix makes it 127.5, so that the last bit of a scale would decide between -127 and -128.
LARGEST = {jnp.int8: f"absmax,{127.5 / 127}"}


def check(kind: str) -> None:
    """Raises ConfigError if there are no such numbers, or qwix is not here."""
    if kind not in ("none", *NUMBERS):
        raise ConfigError(f"quantize={kind!r} is no kind of numbers; nearest: {nearest(kind, ['none', *NUMBERS])}")
    if kind != "none" and find_spec("qwix") is None:
        raise ConfigError(f'quantize={kind} needs qwix, which is not installed; pip install "mllm_jax[quant]"')


class LayerLinear(Linear):
    """A Linear of a transformer layer, in the numbers of the layout."""

    def product(self, x: jax.Array) -> jax.Array:
        if (kind := current().quantize) == "none":
            return super().product(x)
        check(kind)
        kernel, n = self.kernel[...].astype(jnp.float32), self.inputs
        outer = kernel.shape[n:]
        y = multiply(x.reshape(*x.shape[: x.ndim - n], -1), kernel.reshape(-1, math.prod(outer)), kind)
        return y.reshape(*y.shape[:-1], *outer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(x: jax.Array, matrix: jax.Array, kind: str) -> jax.Array:
    """f[... k], f32[k n] -> f[... n] in the dtype of x."""
    return _forward(x, matrix, kind)[0]


def _forward(x: jax.Array, matrix: jax.Array, kind: str) -> tuple[jax.Array, tuple]:
    number, _ = NUMBERS[kind]
    # Rounded once for both products, where it lies: what is gathered is eight bits wide.
    low = once(_rounded(matrix, number, over=0))
    y = qwix().dot_general(_rounded(x, number, over=-1), low, (((x.ndim - 1,), (0,)), ((), ())))
    return keep(y.astype(x.dtype), LOW), (x, low)


def _backward(kind: str, kept: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, low), tokens = kept, tuple(range(grad.ndim - 1))
    # The scales of the columns, over which this product sums, go to the other side.
    rows = _rounded(grad * low.scale[0], NUMBERS[kind][1], over=-1)
    dx = qwix().dot_general(rows, low.qvalue, (((grad.ndim - 1,), (1,)), ((), ())))
    dw = jax.lax.dot_general(x, grad, ((tokens, tokens), ((), ())))
    return dx.astype(x.dtype), dw.astype(jnp.float32)


multiply.defvjp(_forward, _backward)


def _rounded(x: jax.Array, number: jnp.dtype, *, over: int) -> Any:
    """x as such numbers, with a scale for each of its vectors along this axis: a qwix.QArray."""
    x, others = x.astype(jnp.float32), tuple(k for k in range(x.ndim) if k != over % x.ndim)
    low = qwix().quantize(x, number, channelwise_axes=others, calibration_method=LARGEST.get(number, "absmax"))
    # qwix gives vectors of zeros the scale 1; a gradient times that would outshine those of all other columns.
    return replace(low, scale=jnp.where(jnp.max(jnp.abs(x), axis=over, keepdims=True) == 0, 0, low.scale))


def qwix() -> Any:
    """The package, which is an extra and takes half a second to import."""
    import qwix

    return qwix
