"""What is not fused into matrix products on a TPU, and how arrays lie between them; elsewhere these functions do nothing.

Left alone, XLA makes the chain of operations before a product again for each block of it, lets the sums of a norm's backward
pass ride on the product before, and turns a kernel with axes for heads into a convolution over them.  By the compiler's own
count such products reach 38 to 64 % of the peak, and apart from all that 78 to 97 %: a step of Llama-2-7B on 256 chips of v5e
takes a fifth less time.

Where a chip has several rows, it also lets positions and numbers change places in some arrays, and what was kept is copied to
lie so too, at twice the cost of reading it; products of such arrays are slower besides, by a tenth on v6e.
"""

import math
from functools import partial

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from mllm_jax.sharding import platform


def once(x: jax.Array) -> jax.Array:
    """x, which is made once however many products read it; and so is its gradient."""
    return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


def once_back(x: jax.Array) -> jax.Array:
    """x, whose gradient is made once."""
    return _once_back(x, False) if platform() == "tpu" else x


def as_written(x: jax.Array) -> jax.Array:
    """x, whose gradient is made once; in both the last axis lies along lanes, and the first is the slowest.

    The partitioner does not look through this: what comes before and after must be split by other reasons.
    """
    return _once_back(x, True) if platform() == "tpu" else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _once_back(x: jax.Array, laid: bool) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))) if laid else x


_once_back.defvjp(lambda x, laid: (_once_back(x, laid), None),
                  lambda laid, _, grad: (_once_back(jax.lax.optimization_barrier(grad), laid),))


def project(x: jax.Array, kernel: jax.Array, n: int = 1) -> jax.Array:
    """Contracts the last n axes of x with the first n of the kernel, as matrices."""
    inner, outer = math.prod(kernel.shape[:n]), kernel.shape[n:]
    matrix = kernel if kernel.ndim == 2 else once(kernel.reshape(inner, -1))
    y = x.reshape(*x.shape[: x.ndim - n], inner) @ matrix
    return y.reshape(*y.shape[:-1], *outer)
