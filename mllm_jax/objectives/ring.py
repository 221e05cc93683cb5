"""Every row of the batch meets every other, a block of pairs at a time, and no device ever holds all of either.

The rows of one side stay where they are; those of the other go round the devices in a ring, with what was found about them,
and come home when all have seen them.  A device holds one block of similarities, of its own rows and a visitor's: its memory
depends on its own rows alone, whatever their number in the whole batch (a matrix of all pairs takes 4.8 GiB a chip for
131,072 rows on 16 chips).  Gradients go round a second time, when the normalizers are known, from blocks that are computed anew.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mllm_jax.sharding import BATCH_AXES, current_mesh, row_shards

BLOCK_FLOATS = 1 << 23                  # similarities of one block: 32 MiB in float32
OUT = -1e30                             # the similarity with a row that holds no example


class Kind(NamedTuple):
    """What is asked of the pairs."""

    softmax: bool                       # which is the partner, among all; otherwise of each alone, whether it is
    smoothing: float = 0.0              # softmax: part of a target that is spread over all rows
    candidates_learn: bool = True       # softmax: rows are moved by being candidates too


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contrast(kind: Kind, x: jax.Array, y: jax.Array, scale: jax.Array, bias: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of the losses, rows whose partner is the most similar) of f[b d] or f[b n d] and f[b d] or f[b m d].

    Only rows with real f32[b] = 1 count.  The similarity is scale times the largest product of a pair's vectors, plus bias.
    With softmax the loss of a row is the mean of both directions.  Only the sum of losses has a gradient, not to `real`.
    """
    return _sums(kind, x, y, scale, bias, real)[0]


def _forward(kind: Kind, *given):
    values = tuple(a.value for a in given)
    sums, lse = _sums(kind, *values)
    wanted = tuple(() if a.perturbed else None for a in given[:2])      # static, as a leaf of the saved values would not be
    return sums, (*values, lse, wanted)


def _sums(kind: Kind, x, y, scale, bias, real):
    number = jnp.sum(real)

    def local(axes, x, y, scale, bias, real):
        def block(mine, row, theirs, column, hot, before):
            (x, real), (y, there) = mine, theirs
            similar = alike(x, y)
            pairs = (real[:, None] * there) > 0
            # Products are compared, not logits, which XLA may round in two ways, so that a row beats itself.  Ties go to the first, as argmax has it.
            rivals = jnp.where(pairs, similar, OUT)
            own = row["own"] + jnp.sum(jnp.where(hot, rivals, 0.0), axis=1)
            row["beaten"] |= jnp.any((rivals > own[:, None]) | ((rivals == own[:, None]) & before), axis=1)
            row["own"] = own
            logits = scale * similar + bias
            if not kind.softmax:
                row["nll"] += jnp.sum(jnp.where(there > 0, jax.nn.softplus(jnp.where(hot, -logits, logits)), 0.0), axis=1)
                return row, column
            masked = jnp.where(pairs, logits, OUT)
            row["lse"] = jnp.logaddexp(row["lse"], jax.nn.logsumexp(masked, axis=1))
            column["lse"] = jnp.logaddexp(column["lse"], jax.nn.logsumexp(masked, axis=0))
            if kind.smoothing:
                row["sum"] += jnp.sum(jnp.where(pairs, logits, 0.0), axis=1)
                column["sum"] += jnp.sum(jnp.where(pairs, logits, 0.0), axis=0)
            return row, column

        zero = jnp.zeros(real.shape, jnp.float32)
        side = {"lse": zero - jnp.inf} | ({"sum": zero} if kind.smoothing else {}) if kind.softmax else {}
        row = side | {"own": zero, "beaten": zero > 0} | ({} if kind.softmax else {"nll": zero})
        row, column = _meet(axes, block, (x, real), row, (y, real), side)
        if kind.softmax:
            own = scale * row["own"] + bias
            nll = sum(_smoothed(kind, s, own, number) for s in (row, column)) / 2
        else:
            nll = row["nll"]
        sums = jnp.sum(real * nll), jnp.sum(real * ~row["beaten"])
        sums = jax.lax.psum(sums, axes) if axes else sums
        return sums, (row["lse"], column["lse"]) if kind.softmax else ()

    rows = P(_axes(len(real)))
    sums, lse = _spread(local, len(real), (rows, rows, P(), P(), rows), ((P(), P()), rows))(x, y, scale, bias, real)
    return sums, lse


def _smoothed(kind: Kind, side: dict[str, jax.Array], own: jax.Array, number: jax.Array) -> jax.Array:
    nll = side["lse"] - own
    if not kind.smoothing:
        return nll
    return (1 - kind.smoothing) * nll + kind.smoothing * (side["lse"] - side["sum"] / jnp.maximum(number, 1))


def _backward(kind: Kind, saved, cotangents):
    x, y, scale, bias, real, lse, wanted = saved
    want_x, want_y = (a is not None for a in wanted)
    up = jnp.zeros(()) if isinstance(cotangents[0], jax.custom_derivatives.SymbolicZero) else cotangents[0]
    even = kind.smoothing / jnp.maximum(jnp.sum(real), 1)

    def local(axes, x, y, scale, bias, real, lse, up, even):
        def block(mine, row, theirs, column, hot, before):
            (x, real, *row_lse), (y, there, *column_lse) = mine, theirs
            moved = ({"x": x} if want_x else {}) | ({"y": y} if want_y else {})
            similar, pull = jax.vjp(lambda moved: alike(**{"x": x, "y": y, **moved}), moved)
            logits = scale * similar + bias
            weight = up * real[:, None] * there
            if kind.softmax:
                target = jnp.where(hot, 1 - kind.smoothing, 0.0) + even
                forth = weight / 2 * (jnp.exp(jnp.where(weight != 0, logits - row_lse[0][:, None], OUT)) - target)
                back = weight / 2 * (jnp.exp(jnp.where(weight != 0, logits - column_lse[0], OUT)) - target)
                both = forth + back
            else:
                both = weight * jnp.where(hot, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
            row["scale"] += jnp.sum(both * similar, axis=1)
            row["bias"] += jnp.sum(both, axis=1)
            to_x, to_y = (pull(scale * both)[0],) * 2 if kind.candidates_learn else (pull(scale * forth)[0], pull(scale * back)[0])
            if want_x:
                row["x"] += to_x["x"]
            if want_y:
                column["y"] += to_y["y"]
            return row, column

        zero = jnp.zeros(real.shape, jnp.float32)
        row = {"scale": zero, "bias": zero} | ({"x": jnp.zeros(x.shape, jnp.float32)} if want_x else {})
        column = {"y": jnp.zeros(y.shape, jnp.float32)} if want_y else {}
        row, column = _meet(axes, block, (x, real, *lse[:1]), row, (y, real, *lse[1:]), column)
        sums = jnp.sum(row["scale"]), jnp.sum(row["bias"])
        sums = jax.lax.psum(sums, axes) if axes else sums
        return row["x"].astype(x.dtype) if want_x else None, column["y"].astype(y.dtype) if want_y else None, *sums

    rows = P(_axes(len(real)))
    given = (rows, rows, P(), P(), rows, rows, P(), P())
    dx, dy, dscale, dbias = _spread(local, len(real), given, (rows, rows, P(), P()))(x, y, scale, bias, real, lse, up, even)
    return dx, dy, dscale.astype(scale.dtype), dbias.astype(bias.dtype), jnp.zeros_like(real)


contrast.defvjp(_forward, _backward, symbolic_zeros=True)


def alike(x: jax.Array, y: jax.Array) -> jax.Array:
    """f32[b c], the largest products of vectors of the rows f[b d] or f[b n d] and f[c d] or f[c m d]."""
    left, right = {2: "bd", 3: "bnd"}[x.ndim], {2: "cd", 3: "cmd"}[y.ndim]
    several = left[1:-1] + right[1:-1]
    products = jnp.einsum(f"{left},{right}->bc{several}", x, y, preferred_element_type=jnp.float32)
    return jnp.max(products, axis=tuple(range(2, products.ndim))) if several else products


def _meet(axes: tuple[str, ...], block: Callable, mine: Any, row: Any, theirs: Any, column: Any) -> tuple[Any, Any]:
    """(row, column) after the rows of this device met those of all; each is a tree of arrays whose first axis is rows.

    block(mine, row, theirs, column, hot, before) -> (row, column) is given some of the rows of this device and all of a visitor's;
    `mine` and `theirs` are what is known of them, hot bool[r c] says which are the same row, before which come earlier.
    """
    n = jax.lax.axis_size(axes) if axes else 1
    me = jax.lax.axis_index(axes) if axes else 0
    vectors = [jax.tree.leaves(side)[0] for side in (mine, theirs)]
    b, each = len(vectors[0]), [x.shape[1] if x.ndim == 3 else 1 for x in vectors]
    parts = next(q for q in range(1, b + 1) if b % q == 0 and (b // q * b * each[0] * each[1] <= BLOCK_FLOATS or q == b))
    size = b // parts
    split = lambda tree: jax.tree.map(lambda a: a.reshape(parts, size, *a.shape[1:]), tree)
    mine, row = split(mine), split(row)

    def visit(k: jax.Array, state: tuple) -> tuple:
        row, theirs, column = state
        there = (me - k) % n * b + jnp.arange(b)

        def some(column: Any, part: tuple) -> tuple:
            i, mine, row = part
            here = (me * b + i * size + jnp.arange(size))[:, None]
            row, column = block(mine, dict(row), theirs, dict(column), here == there, there < here)
            return column, row

        column, row = jax.lax.scan(some, column, (jnp.arange(parts), mine, row))
        if n > 1:
            onward = lambda a: jax.lax.ppermute(a, axes, [(i, (i + 1) % n) for i in range(n)])
            theirs, column = jax.tree.map(onward, (theirs, column))
        return row, theirs, column

    row, _, column = jax.lax.fori_loop(0, n, visit, (row, theirs, column))
    return jax.tree.map(lambda a: a.reshape(b, *a.shape[2:]), row), column


def _axes(rows: int) -> tuple[str, ...]:
    """The mesh axes over which so many rows are spread."""
    mesh = current_mesh()
    return () if mesh is None or rows % row_shards(mesh) else tuple(a for a in BATCH_AXES if mesh.shape.get(a, 1) > 1)


def _spread(local: Callable, rows: int, given: Any, out: Any) -> Callable:
    """`local` on every device with its own rows, or once where there is nothing to spread."""
    axes = _axes(rows)
    if not axes:
        return functools.partial(local, ())
    return jax.shard_map(functools.partial(local, axes), mesh=current_mesh(), in_specs=given, out_specs=out, check_vma=False)
