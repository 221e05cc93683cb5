"""Cross-entropy straight from hidden states: work and memory only for positions that count.

A [batch, sequence, vocabulary] array of floats never exists.  On a CPU the positions with a weight are brought to the front of
each row, and a loop takes them a few columns at a time for as long as any row has some left: in instruction tuning, where
15-30 % of the positions are trained, the other 70-85 % cost nothing.  On accelerators the loop takes all that it is given, a
number that a plan can count with; `Data.trained` says how many that is.

The gradient is made in the same pass, while the logits of a chunk are at hand: three matmuls instead of
the four of a rematerialized loss (after the fused linear cross-entropy of Liger, arXiv:2410.10989, and
Cut Cross-Entropy, arXiv:2411.09009).  For a frozen output matrix it is two.

This holds the whole matrix on every chip.  Where the mesh splits it over chips that have different rows it stays split, and
split_vocabulary.py does the work.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.objectives import split_vocabulary
from mllm_jax.sharding import constrain, platform, row_shards
from mllm_jax.types import struct

CHUNK_FLOATS = 1 << 24                  # logits of one chunk on one device: 64 MiB in float32


@struct
class Sums:
    """Sums over all positions of weight times: the loss, the nll, right guesses."""

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array


def cross_entropy(
    hidden: jax.Array, unembed: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float = 0.0, smoothing: float = 0.0,
) -> Sums:
    """f[b s d], f[d v], i32[b s], f32[b s] -> Sums.  Only `loss` has a gradient, to hidden and unembed.

    The loss is the nll + z_loss * log-partition^2; with `smoothing` that part of the target is spread over all tokens.
    """
    split = split_vocabulary.plan(hidden, unembed, CHUNK_FLOATS)
    if split is None:
        # Gathered here, once, and not in every chunk.
        loss, nll, correct = _fused((z_loss, smoothing), hidden, constrain(unembed, "embed_act vocab"), targets, weights)
    else:
        loss, nll, correct = _split((split, (z_loss, smoothing)), hidden, unembed, targets, weights)
    return Sums(loss=loss, nll=jax.lax.stop_gradient(nll), correct=jax.lax.stop_gradient(correct))


def token_log_probs(hidden: jax.Array, unembed: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability f32[b s] of every target, a few columns at a time; differentiable in any combination."""
    b, s, d = hidden.shape
    unembed = constrain(unembed, "embed_act vocab")
    size = chunk_size(b, s, unembed.shape[1])
    pad = -s % size
    split = lambda x: jnp.moveaxis(jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(b, -1, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = _logits(args[0], unembed)
        return jnp.take_along_axis(logits, args[1][..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)

    return jnp.moveaxis(jax.lax.map(chunk, (split(hidden), split(targets))), 0, 1).reshape(b, -1)[:, :s]


def chunk_size(b: int, s: int, v: int) -> int:
    """Columns whose logits fit into CHUNK_FLOATS on each device; a power of two, at most s."""
    fits = CHUNK_FLOATS * row_shards() // (b * v)
    return min(s, 1 << max(fits, 8).bit_length() - 1)


def _logits(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
    return jnp.einsum("bcd,dv->bcv", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(options, hidden, unembed, targets, weights):
    return _loop(options, hidden, unembed, targets, weights, False, False)[0]


def _forward(options, hidden, unembed, targets, weights):
    sums, d_hidden, d_unembed = _loop(
        options, hidden.value, unembed.value, targets.value, weights.value, hidden.perturbed, unembed.perturbed)
    return sums, (d_hidden, d_unembed, targets.value, weights.value)


def _backward(options, saved, cotangents):
    d_hidden, d_unembed, targets, weights = saved
    up = cotangents[0]
    up = jnp.zeros(()) if isinstance(up, jax.custom_derivatives.SymbolicZero) else up
    scaled = lambda x: None if x is None else (x * up).astype(x.dtype)
    return scaled(d_hidden), scaled(d_unembed), np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(weights)


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _split(how, hidden, unembed, targets, weights):
    return split_vocabulary.forward(*how, hidden, unembed, targets, weights)[0]


def _split_forward(how, hidden, unembed, targets, weights):
    h, m, y, w = (a.value for a in (hidden, unembed, targets, weights))
    sums, lse = split_vocabulary.forward(*how, h, m, y, w)
    wanted = tuple(() if a.perturbed else None for a in (hidden, unembed))      # static, as a leaf of the saved values would not be
    return sums, (h, m, y, w, lse, wanted)


def _split_backward(how, saved, cotangents):
    hidden, unembed, targets, weights, lse, wanted = saved
    up = cotangents[0]
    if isinstance(up, jax.custom_derivatives.SymbolicZero):
        up = jnp.zeros(())
    d_hidden, d_unembed = split_vocabulary.backward(
        *how, hidden, unembed, targets, weights * up, lse, *(a is not None for a in wanted))
    return d_hidden, d_unembed, np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(weights)


_split.defvjp(_split_forward, _split_backward, symbolic_zeros=True)


def _loop(options, hidden, unembed, targets, weights, want_hidden: bool, want_unembed: bool):
    """The sums, and where wanted the gradients of the loss with respect to hidden and unembed."""
    b, s, d = hidden.shape
    v = unembed.shape[1]
    z_loss, smoothing = options
    size = chunk_size(b, s, v)
    some = platform() == "cpu"                                              # work for the positions that count, not for all
    order = jnp.argsort(weights == 0, axis=1, stable=True) if some else None
    first = lambda x: jnp.take_along_axis(x, order.reshape(b, s, *(1,) * (x.ndim - 2)), axis=1) if some else x
    take = lambda x: jnp.pad(first(x), ((0, 0), (0, -s % size)) + ((0, 0),) * (x.ndim - 2))
    x, y, w = take(hidden), take(targets), take(weights.astype(jnp.float32))
    chunks = ((jnp.max(jnp.sum(weights != 0, axis=1)) if some else s) + size - 1) // size
    # Each group of rows sums the gradient of the matrix for itself; they are added once, after the loop.
    groups = row_shards() if b % row_shards() == 0 else 1
    grouped = lambda a: constrain(a.reshape(groups, -1, a.shape[-1]), "batch row_seq vocab")
    matrix = unembed.astype(hidden.dtype)

    def body(i, carry):
        sums, dx, dm = carry
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * size, size, axis=1)
        xi, yi, wi = cut(x), cut(y), cut(w)
        logits = _logits(xi, matrix)
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, yi[..., None], axis=-1)[..., 0]
        right = (picked >= jnp.max(logits, axis=-1)).astype(jnp.float32)
        nll = lse - picked
        loss = nll + z_loss * lse**2 if z_loss else nll
        loss = loss + smoothing * (picked - jnp.mean(logits, axis=-1)) if smoothing else loss
        sums = tuple(t + jnp.sum(wi * a) for t, a in zip(sums, (loss, nll, right)))
        if want_hidden or want_unembed:
            coefficient = wi * (1 + 2 * z_loss * lse) if z_loss else wi
            dl = coefficient[..., None] * jnp.exp(logits - lse[..., None])
            hot = jax.lax.broadcasted_iota(jnp.int32, dl.shape, 2) == yi[..., None]
            dl = dl - jnp.where(hot, (1 - smoothing) * wi[..., None], 0.0)
            dl = (dl - wi[..., None] * (smoothing / v) if smoothing else dl).astype(hidden.dtype)
        if want_hidden:
            dx = jax.lax.dynamic_update_slice_in_dim(dx, jnp.einsum("bcv,dv->bcd", dl, matrix), i * size, axis=1)
        if want_unembed:
            dm = dm + jnp.einsum("gnd,gnv->gdv", grouped(xi), grouped(dl), preferred_element_type=jnp.float32)
        return sums, dx, dm

    zero = jnp.zeros((), jnp.float32)
    dx = jnp.zeros_like(x) if want_hidden else None
    dm = constrain(jnp.zeros((groups, d, v), jnp.float32), "batch embed_act vocab") if want_unembed else None
    sums, dx, dm = jax.lax.fori_loop(0, chunks, body, ((zero,) * 3, dx, dm))
    if want_hidden:
        dx = dx[:, :s]
        dx = jnp.take_along_axis(dx, jnp.argsort(order, axis=1)[..., None], axis=1) if some else dx
    if want_unembed:
        dm = jnp.sum(dm, axis=0).astype(unembed.dtype)
    return sums, dx, dm
