"""Cross-entropy under an output matrix that is split over the chips, none of which ever holds all of it.

Parameters lie split along their width over the axes that also split the rows ("fsdp", "expert").  Gathering the matrix would
cost d x v numbers on every chip, and its gradient twice that: 4 GB a chip for Gemma 3's vocabulary.  Here `g` neighbouring
chips share their tokens, and a loop goes over the vocabulary: in each turn a chip receives a block of columns, as wide as it
has memory for, and multiplies it with the tokens of the g chips.  The gradient of a block is complete when the block is done,
is sent to where the parameter lies, and is never seen again.

What moves over the links, for n tokens a chip, in bytes a chip: the columns, twice in the forward and the backward pass and
once their gradient, 8 d v / g; and the tokens, twice, and their gradient, 6 d n (g - 1).  `g` is the divisor of the number of
chips with the smallest sum whose tokens and gradients fit into TOKEN_BYTES.  g = 1 moves columns alone, and g = all chips
leaves the matrix where it is but for an exchange of halves.

The log-partition must be known before any gradient is, so that the backward pass computes the logits anew: four matmuls,
where cross_entropy.py has three and an accumulator as large as the matrix.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mllm_jax.sharding import current, current_mesh, cut_axes, cut_spec, mesh_axes, spec

TOKEN_BYTES = 256 << 20                 # hidden states of a group of chips in the compute dtype, and their gradient in float32
LANES = 128                             # columns of a block are a multiple of this where the vocabulary has so many
Axes = tuple[str, ...]


class Split(NamedTuple):
    """How the work on one shape is divided; everything is known when the program is traced."""

    mesh: Mesh
    tokens: P                           # of the two first axes of hidden states
    width: Axes                         # of the matrix, as its parameter lies
    columns: Axes                       # of the matrix: those of "vocab"
    outer: Axes                         # `width` = outer x inner
    inner: Axes                         # the chips that share their tokens, g of them
    g: int
    block: int                          # columns that a chip takes in one turn
    turns: int

    @property
    def matrix(self) -> P:
        return P(self.width, self.columns or None)

    @property
    def others(self) -> Axes:
        """Axes over which tokens differ and the matrix is the same."""
        used = [a for entry in self.tokens for a in mesh_axes(entry)]
        return tuple(a for a in used if a not in self.width)


def plan(hidden: jax.Array, unembed: jax.Array, floats: int) -> Split | None:
    """The division for f[b s d] and f[d v], `floats` numbers of logits at a time; None where the matrix is not split among rows."""
    mesh, rules = current_mesh(), current().rules
    if mesh is None or mesh.size == 1:
        return None
    tokens = spec(("batch", "seq"), hidden.shape[:2], rules, mesh)
    width, columns = map(mesh_axes, spec(("embed", "vocab"), unembed.shape, rules, mesh))
    used = [a for entry in tokens for a in mesh_axes(entry)]
    size = lambda axes: math.prod(mesh.shape[a] for a in axes)
    if size(width) == 1 or not set(width) <= set(used) or set(columns) & set(used):
        return None
    (d, v), n = unembed.shape, math.prod(hidden.shape[:2]) // size(used)
    v //= size(columns)
    moved = lambda g: 8 * d * v / g + 6 * d * n * (g - 1)
    fits = lambda g: g * n * d * (4 + hidden.dtype.itemsize) <= TOKEN_BYTES
    ways = [g for g in range(1, size(width) + 1) if g == 1 or size(width) % g == 0 and g <= v and fits(g) and cut_axes(mesh, width, g)]
    g = min(ways, key=moved)
    cut, outer, inner = cut_axes(mesh, width, g)
    turns = max(1, math.ceil(v / g / max(LANES, floats // (g * n) // LANES * LANES)))
    block = min(v // g, math.ceil(v / g / turns / LANES) * LANES)
    return Split(
        mesh=cut, tokens=cut_spec(tokens, width), width=mesh_axes(*cut_spec(P(width), width)), columns=columns, outer=outer, inner=inner,
        g=g, block=block, turns=math.ceil(v / (g * block)))


def forward(split: Split, options: tuple[float, float], hidden, unembed, targets, weights) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """((sums of the loss, the nll, right guesses), log-partition f32[b s])."""
    z_loss, smoothing = options

    def local(hidden, matrix, targets, weights):
        x, y, w = (_together(split, a.reshape(-1, *a.shape[2:])) for a in (hidden, targets, weights))

        def turn(j, carry):
            top, total, picked, every = carry
            logits, hot, _ = _logits(split, x, y, matrix, j)
            new = jnp.maximum(top, jnp.max(logits, axis=-1))
            total = total * jnp.exp(top - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=-1)
            picked = picked + jnp.sum(jnp.where(hot, logits, 0.0), axis=-1)
            every = every + jnp.sum(jnp.where(logits > _OUT, logits, 0.0), axis=-1) if smoothing else every
            return new, total, picked, every

        zeros = jnp.zeros(len(x), jnp.float32)
        mine, total, picked, every = jax.lax.fori_loop(0, split.turns, turn, (zeros + _OUT, zeros, zeros, zeros))
        among = split.inner + split.columns
        top = jax.lax.pmax(mine, among)
        total, picked, every = jax.lax.psum((total * jnp.exp(mine - top), picked, every), among)
        lse = top + jnp.log(total)
        nll = lse - picked
        loss = nll + z_loss * lse**2 if z_loss else nll
        loss = loss + smoothing * (picked - every / unembed.shape[1]) if smoothing else loss
        right = (picked >= top).astype(jnp.float32)
        # All chips of a group have all its tokens.
        sums = jax.lax.psum(tuple(jnp.sum(w * a) for a in (loss, nll, right)), split.others + split.outer)
        return sums, _own(split, lse, len(lse) // split.g).reshape(hidden.shape[:2])

    return _run(split, local, ((P(),) * 3, split.tokens))(*_now(hidden, unembed), targets, weights)


def backward(split: Split, options: tuple[float, float], hidden, unembed, targets, weights, lse, want_hidden: bool, want_unembed: bool):
    """The gradients of the sum of the loss to hidden f[b s d] and unembed f[d v], or None; `weights` may have a factor in them."""
    z_loss, smoothing = options
    v = unembed.shape[1]

    def local(hidden, matrix, targets, weights, lse):
        x, y, w, lse = (_together(split, a.reshape(-1, *a.shape[2:])) for a in (hidden, targets, weights, lse))
        coefficient = w * (1 + 2 * z_loss * lse) if z_loss else w

        def turn(j, carry):
            dx, dm = carry
            logits, hot, block = _logits(split, x, y, matrix, j)
            dl = coefficient[:, None] * jnp.exp(logits - lse[:, None]) - jnp.where(hot, (1 - smoothing) * w[:, None], 0.0)
            dl = dl - jnp.where(logits > _OUT, w[:, None] * (smoothing / v), 0.0) if smoothing else dl
            dl = dl.astype(x.dtype)
            if want_hidden:
                dx = dx + jnp.einsum("nv,dv->nd", dl, block, preferred_element_type=jnp.float32)
            if want_unembed:
                start = _start(split, matrix, j)
                home = _home(split, jnp.einsum("nd,nv->dv", x, dl, preferred_element_type=jnp.float32))
                # The last block may begin in the one before, where it adds nothing.
                there = jax.lax.dynamic_slice_in_dim(dm, start, home.shape[1], axis=1)
                dm = jax.lax.dynamic_update_slice_in_dim(dm, there + home, start, axis=1)
            return dx, dm

        dx = jnp.zeros(x.shape, jnp.float32) if want_hidden else None
        dm = jnp.zeros(matrix.shape, jnp.float32) if want_unembed else None
        dx, dm = jax.lax.fori_loop(0, split.turns, turn, (dx, dm))
        if want_hidden:
            dx = jax.lax.psum_scatter(dx.astype(x.dtype), split.inner, scatter_dimension=0, tiled=True)
            dx = (jax.lax.psum(dx, split.columns) if split.columns else dx).reshape(hidden.shape)
        if want_unembed:
            dm = (jax.lax.psum(dm, split.others) if split.others else dm).astype(matrix.dtype)
        return dx, dm

    out = P(*split.tokens) if want_hidden else None, split.matrix if want_unembed else None
    return _run(split, local, out, more=(split.tokens,))(*_now(hidden, unembed), targets, weights, lse)


_OUT = -1e30                            # the logit of a column that is no token, or was seen before


def _now(hidden, unembed) -> tuple[jax.Array, jax.Array]:
    """The same, tied together: columns move when they are wanted, not as soon as the step begins, out of the loop over microbatches.

    On pretended devices that could hang: a program from the compilation cache keeps no order of transfers that are independent.
    """
    return jax.lax.optimization_barrier((hidden, unembed))


def _run(split: Split, local, out, more: tuple = ()):
    return jax.shard_map(local, mesh=split.mesh, in_specs=(split.tokens, split.matrix, split.tokens, split.tokens, *more), out_specs=out,
                         check_vma=False)


def _logits(split: Split, x, y, matrix, j) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(f32[n block] logits of turn j, bool[n block] where the target is, the columns f[d block])."""
    block = _columns(split, matrix, j, x.dtype)
    logits = jnp.einsum("nd,dv->nv", x, block, preferred_element_type=jnp.float32)
    number = _index(split.inner, split.mesh) * split.block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    start = _start(split, matrix, j)
    if matrix.shape[1] % (split.g * split.block):
        logits = jnp.where(start + number >= j * split.g * split.block, logits, _OUT)
    hot = (start + number + _index(split.columns, split.mesh) * matrix.shape[1] == y[:, None]) & (logits > _OUT)
    return logits, hot, block


def _start(split: Split, matrix, j) -> jax.Array:
    return jnp.minimum(j * split.g * split.block, matrix.shape[1] - split.g * split.block)


def _columns(split: Split, matrix, j, dtype) -> jax.Array:
    """This chip's columns of turn j, whole: f[d/outer/inner v] -> f[d block].

    Fetched when they are used: one turn ahead, v5e's compiler hides 8 ms of transfers in 157 and makes the matmuls 21 ms slower.
    """
    part = jax.lax.dynamic_slice_in_dim(matrix, _start(split, matrix, j), split.g * split.block, axis=1).astype(dtype)
    part = jax.lax.all_to_all(part, split.inner, 1, 0, tiled=True) if split.g > 1 else part
    return jax.lax.all_gather(part, split.outer, axis=0, tiled=True)


def _home(split: Split, block) -> jax.Array:
    """The inverse for gradients, summed: f[d block] -> f[d/outer/inner g*block]."""
    part = jax.lax.psum_scatter(block, split.outer, scatter_dimension=0, tiled=True)
    return jax.lax.all_to_all(part, split.inner, 0, 1, tiled=True) if split.g > 1 else part


def _together(split: Split, x) -> jax.Array:
    """The tokens of a group f[n ...] -> f[g*n ...]."""
    return jax.lax.all_gather(x, split.inner, axis=0, tiled=True) if split.g > 1 else x


def _own(split: Split, x, n: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, _index(split.inner, split.mesh) * n, n, axis=0)


def _index(axes: Axes, mesh: Mesh) -> jax.Array:
    """The number of this chip among those that differ in these axes."""
    return jax.lax.axis_index(axes) if axes else jnp.int32(0)
