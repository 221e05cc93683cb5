"""Attention on TPU by a kernel that holds no scores: forward and backward, for whatever a `Visibility` says.

FlashAttention (arXiv:2205.14135) in Pallas.  Masks are made from segments and order inside, block by block, so that
causal, prefix, bidirectional spans, windows and packed examples are one program and no [s t] array exists.  A code for
each pair of blocks, from the smallest and largest numbers of both, says whether it is left out, needs its mask, or is
seen whole; blocks before the first and after the last needed one cost nothing.

Scores are kept transposed, keys by queries: what belongs to a query (its largest score, its sum, its numbers) is then a
row, which costs nothing to spread over the keys.  The backward pass is one kernel: a chunk of keys stays in fast memory
while all queries pass, the gradients of keys and values are summed there, those of queries leave block by block.

Under a mesh every device runs the kernel on its own rows and heads.

Nothing here has run on a TPU yet: values and gradients come from the interpreter, and libtpu compiles it for v4, v5e, v5p and v6e
(benchmarks/flash_cycles.py).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from mllm_jax.nn import context
from mllm_jax.nn.remat import keep
from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import current, current_mesh, spec
from mllm_jax.types import record

BLOCKS = (512, 384, 256, 128)           # positions
ONE = 768                               # where all see all, so many are one block: images of 576 to 729 patches
CHUNK = 1 << 20                         # bytes of keys that stay in fast memory
VMEM = 48 << 20                         # bytes of fast memory that the compiler may give to a kernel
LEAST = -1e37                           # the largest score of a query that has seen nothing
NEVER = -2e38                           # a masked score: exp(NEVER - LEAST) is 0
SKIP, PART, WHOLE = 0, 1, 2             # codes of a pair of blocks
NN, NT, TN = ((((i,), (j,)), ((), ())) for i, j in ((1, 0), (1, 1), (0, 0)))    # a b, a b^T and a^T b

# What goes into the two passes and comes out, a letter for each array: queries, keys, lines of one number a query, numbers of rows.
FORWARD, BACKWARD = ("qkknnnn", "ql"), ("qkknnnnqll", "qkk")

Numbers = tuple[jax.Array, jax.Array, jax.Array, jax.Array]             # segments and order of queries, and of keys; i32[b 1 s], i32[b 1 t]


@record
class Plan:
    """Static sizes of a call."""

    block: int                          # queries
    key_block: int
    n: int                              # blocks of queries on a device
    m: int                              # blocks of keys
    per: int                            # blocks of keys in a chunk, which fast memory holds
    window: int | None
    causal: bool                        # is known to be so: says what a call costs
    axes: tuple[str, str]               # what the mesh splits rows and heads as
    pieces: context.Pieces | None       # where it splits positions
    keys: int                           # before they fill the last chunk
    interpret: bool                     # run by the interpreter of Pallas, on any platform

    @property
    def chunk(self) -> int:
        return self.per * self.key_block

    @property
    def share(self) -> float:
        """The part of the pairs of blocks that rows of one example need, as far as is known here."""
        parts = 1 if self.pieces is None else self.pieces.parts
        first, key_first = self.block * np.arange(self.n * parts)[:, None], self.key_block * np.arange(self.m)
        seen = key_first < first + self.block if self.causal else np.ones((len(first), self.m), bool)
        return float(np.mean(seen if self.window is None else seen & (first - key_first - self.key_block < self.window - 1)))


def attend_flash(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility | None, *, scale: float, window: int | None = None,
    heads: str = "heads", interpret: bool = False,
) -> jax.Array:
    """f[b s h k], f[b t g k], f[b t g k] -> f[b s h k]; a query that sees nothing gives 0.  Without visibility all see all.

    `heads` is what the mesh splits heads as.
    """
    (b, s, h, _), t = q.shape, k.shape[1]
    one, axes = (ONE, ("item", heads)) if visibility is None else (0, ("batch", heads))
    if visibility is None:
        ones = lambda n: jnp.ones((b, n), jnp.int32)
        visibility, window = Visibility(segments=ones(s), order=ones(s), key_segments=ones(t), key_order=ones(t)), None
    pieces = context.pieces(q, k, visibility, heads)
    block, key_block = block_of(s if pieces is None else pieces.length, one), block_of(t, one)
    most = max(1, CHUNK // (-(-k.shape[-1] // 128) * 128 * k.dtype.itemsize * key_block))
    chunks = -(-(blocks := -(-t // key_block)) // most)
    per = -(-blocks // chunks)
    plan = Plan(block=block, key_block=key_block, n=-(-s // block) if pieces is None else 2 * -(-pieces.length // block), m=per * chunks,
                per=per, window=window, causal=visibility.causal, axes=axes, pieces=pieces, keys=t, interpret=interpret)

    fill = lambda x, size, **how: jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)), **how)
    if pieces is None:
        whole, cut = lambda x, **how: fill(x, block, **how), lambda x: x[:, :s]
    else:                               # each piece fills blocks of its own
        split = lambda x: x.reshape(b * 2 * pieces.parts, -1, *x.shape[2:])
        whole = lambda x, **how: fill(split(x), block, **how).reshape(b, -1, *x.shape[2:])
        cut = lambda x: split(x)[:, : pieces.length].reshape(b, s, *x.shape[2:])
    key_segments = fill(visibility.key_segments, plan.chunk)
    # Queries that fill the last block see what its last one sees: the block needs no mask for their sake, nor more keys.
    numbers = (whole(visibility.segments, mode="edge"), whole(visibility.order, mode="edge"),
               jnp.where(key_segments > 0, key_segments, -1), fill(visibility.key_order, plan.chunk, mode="edge"))
    q = whole(q * scale)
    if pieces is None:
        k, v = fill(k, plan.chunk), fill(v, plan.chunk)
    k, v = (context.repeated(x, h, heads) for x in (k, v))
    heads_first = lambda x: rearrange(x, "b s h k -> b h s k")
    out = _flash(heads_first(q), heads_first(k), heads_first(v), tuple(x[:, None] for x in numbers), plan)
    return cut(rearrange(out, "b h s k -> b s h k"))


def block_of(n: int, one: int = 0) -> int:
    """The size of blocks for n positions: large ones are faster, and those that fill their last one waste less; up to `one`
    positions are one block."""
    return -(-n // 128) * 128 if n <= one else min(BLOCKS, key=lambda block: -(-n // block) * (block + 64))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, numbers: Numbers, plan: Plan) -> jax.Array:
    """f[b h s k], f[b g t k], f[b g t k] -> f[b h s k], queries scaled."""
    return _on_mesh(_forward, plan, (q, k, v, *numbers), FORWARD)[0]


def _flash_forward(q: jax.Array, k: jax.Array, v: jax.Array, numbers: Numbers, plan: Plan) -> tuple:
    out, lse = (keep(x, "attention") for x in _on_mesh(_forward, plan, (q, k, v, *numbers), FORWARD))
    return out, (q, k, v, numbers, out, lse)


def _flash_backward(plan: Plan, kept: tuple, d_out: jax.Array) -> tuple:
    q, k, v, numbers, out, lse = kept
    both = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, None]
    return *_on_mesh(_backward, plan, (q, k, v, *numbers, d_out, lse, both), BACKWARD), None


_flash.defvjp(_flash_forward, _flash_backward)


def _on_mesh(f: Callable, plan: Plan, args: tuple, kinds: tuple[str, str]) -> tuple:
    """f(plan, *args) on each device's rows, heads and positions; `kinds` says what goes in and what comes out, see FORWARD."""
    mesh, (q, k) = current_mesh(), args[:2]
    if mesh is None or mesh.size == 1:
        return f(plan, *args)
    rows, heads = spec(plan.axes, q.shape[:2], current().rules, mesh)
    heads = heads if k.shape[1] % context.parts_of(context.axes_of(plan.axes[1], q.shape[1])) == 0 else None
    along = None if plan.pieces is None else plan.pieces.axis
    keys = along if plan.pieces is not None and k.shape[2] % plan.pieces.parts == 0 else None
    by = {"q": PartitionSpec(rows, heads, along), "k": PartitionSpec(rows, heads, keys), "l": PartitionSpec(rows, heads, None, along),
          "n": PartitionSpec(rows)}
    ins, outs = (tuple(by[kind] for kind in word) for word in kinds)
    f = partial(f, plan) if plan.pieces is None else partial(_of_pieces, f, plan, kinds, keys is not None)
    # The kernel does not say how what it writes varies over devices.
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)(*args)


def _of_pieces(f: Callable, plan: Plan, kinds: tuple[str, str], split: bool, *args: jax.Array) -> tuple:
    """The same on a device that has a part of the positions of a row, and, where they are split, of its keys."""
    pieces = plan.pieces
    fill = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, plan.m * plan.key_block - x.shape[2]), (0, 0)))
    enter = {"q": lambda x: pieces.deal(x, 2), "l": lambda x: pieces.deal(x, 3), "n": lambda x: x,
             "k": lambda x: fill(jax.lax.all_gather(x, pieces.axis, axis=2, tiled=True) if split else x)}
    home = lambda x: jax.lax.psum_scatter(x, pieces.axis, scatter_dimension=2, tiled=True) if split else jax.lax.psum(x, pieces.axis)
    leave = {"q": lambda x: pieces.back(x, 2), "l": lambda x: pieces.back(x, 3), "k": lambda x: home(x[:, :, : plan.keys])}
    args = [enter[kind](x) for kind, x in zip(kinds[0], args, strict=True)]
    args[3:5] = (pieces.cut(x, 2) for x in args[3:5])
    return tuple(leave[kind](x) for kind, x in zip(kinds[1], f(plan, *args), strict=True))


def codes(plan: Plan, segments: jax.Array, order: jax.Array, key_segments: jax.Array, key_order: jax.Array) -> jax.Array:
    """i32[b n m]: what block n of queries sees of block m of keys: nothing, a part (or so it may be), or all.

    Of i32[b s] and i32[b t]; key segments are -1 where nobody looks.
    """
    blocks = lambda x, size: rearrange(x, "b (n c) -> b n c", c=size)
    low, high = lambda x: jnp.min(x, -1), lambda x: jnp.max(x, -1)
    q = lambda f, x: f(blocks(x, plan.block))[:, :, None]
    k = lambda f, x: f(blocks(x, plan.key_block))[:, None]
    some = jnp.where(key_segments > 0, key_segments, jnp.iinfo(jnp.int32).max)
    sees = (q(high, segments) >= k(low, some)) & (q(low, segments) <= k(high, key_segments)) & (q(high, order) >= k(low, key_order))
    whole = (q(low, segments) == k(high, key_segments)) & (q(high, segments) == k(low, key_segments))
    whole &= q(low, order) >= k(high, key_order)
    if plan.window is not None:
        first = starts(plan)[:, None] - plan.key_block * jnp.arange(sees.shape[2])
        sees &= first - (plan.key_block - 1) < plan.window
        whole &= first + (plan.block - 1) < plan.window
    return jnp.where(sees, jnp.where(whole, WHOLE, PART), SKIP)


def starts(plan: Plan) -> jax.Array:
    """i32[n]: where in the row the first query of each block stands."""
    if plan.pieces is None:
        return plan.block * jnp.arange(plan.n, dtype=jnp.int32)
    inside = plan.block * jnp.arange(plan.n // 2, dtype=jnp.int32)
    return (plan.pieces.length * plan.pieces.numbers()[:, None] + inside).reshape(-1)


def _table(plan: Plan, numbers: Numbers) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """For the scalar core: codes, sixteen to a word, and for each block of queries the first needed block, the one after the last,
    and where it stands."""
    code = codes(plan, *(x[:, 0] for x in numbers))
    last = jnp.max(jnp.where(code > SKIP, jnp.arange(plan.m) + 1, 0), -1)
    first = jnp.minimum(jnp.min(jnp.where(code > SKIP, jnp.arange(plan.m), plan.m), -1), last)
    flat = jnp.pad(code.reshape(-1), (0, -code.size % 16)).reshape(-1, 16)
    words = jnp.sum(flat << (2 * jnp.arange(16)), -1, dtype=jnp.int32)
    return words, first.reshape(-1), last.reshape(-1), starts(plan)


def _forward(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, *numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f[b h s k] and f32[b h 1 s], the logarithm of the sum of exponentials."""
    (b, h, s, d), r = q.shape, q.shape[1] // k.shape[1]

    def near(b: int, i: int, c: int, first: jax.Array, last: jax.Array, _) -> int:
        """A chunk that is not needed is not fetched: the index is that of the nearest one that is."""
        at = b * plan.n + i
        return jnp.clip(c, jax.lax.div(first[at], plan.per), jax.lax.div(jnp.maximum(last[at] - 1, 0), plan.per))

    mine = pl.BlockSpec((1, 1, plan.block, d), lambda b, h, i, c, *_: (b, h, i, 0))
    keys = pl.BlockSpec((1, 1, plan.chunk, d), lambda b, h, i, c, _, *ends: (b, jax.lax.div(h, r), near(b, i, c, *ends), 0))
    line = pl.BlockSpec((1, 1, plan.block), lambda b, h, i, c, *_: (b, 0, i))
    key_line = pl.BlockSpec((1, 1, plan.chunk), lambda b, h, i, c, _, *ends: (b, 0, near(b, i, c, *ends)))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4, grid=(b, h, plan.n, plan.m // plan.per),
        in_specs=[mine, keys, keys, line, line, key_line, key_line],
        out_specs=[mine, pl.BlockSpec((1, 1, 1, plan.block), lambda b, h, i, c, *_: (b, h, 0, i))],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((1, plan.block), (1, plan.block), (d, plan.block))])
    return pl.pallas_call(
        partial(_forward_kernel, plan), grid_spec=grid, interpret=plan.interpret, name="flash_fwd",
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, 1, s), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=_cost(2, plan, q, k, v),
    )(*_table(plan, numbers), q, k, v, *numbers)


def _forward_kernel(plan: Plan, words, first, last, place, q, k, v, *refs) -> None:
    numbers, (out, lse, largest, total, sums) = refs[:4], refs[4:]
    b, i, c = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(c == 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, LEAST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def pair(here: pl.Slice, mask: jax.Array | None) -> None:
        scores = jax.lax.dot_general(k[0, 0, here], q[0, 0], NT, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, NEVER)
        old = largest[...]
        new = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
        weights, fade = jnp.exp(scores - new), jnp.exp(old - new)
        largest[...] = new
        total[...] = total[...] * fade + jnp.sum(weights, axis=0, keepdims=True)
        seen = jax.lax.dot_general(v[0, 0, here], weights.astype(v.dtype), TN, preferred_element_type=jnp.float32)
        sums[...] = sums[...] * fade + seen

    _each_pair(plan, (b, i, c), (words, first, last, place), numbers, pair)

    @pl.when(c == pl.num_programs(3) - 1)
    def _() -> None:
        some = total[...] > 0
        whole = jnp.where(some, total[...], 1.0)
        out[0, 0] = (sums[...] / whole).T.astype(out.dtype)
        lse[0, 0] = largest[...] + jnp.log(whole)


def _each_pair(plan: Plan, where: tuple, table: tuple, numbers: tuple, pair: Callable) -> None:
    """pair(keys, mask) for what block i of queries of row b needs of chunk c; the mask is bool[keys, queries], None where all is seen."""
    (b, i, c), (words, first, last, place), (segments, order, key_segments, key_order) = where, table, numbers
    at, per = b * plan.n + i, plan.per

    def body(j: jax.Array, _: None) -> None:
        bit = at * plan.m + j
        code = (words[bit >> 4] >> (2 * (bit & 15))) & 3
        here = pl.ds(pl.multiple_of((j - c * per) * plan.key_block, plan.key_block), plan.key_block)

        @pl.when(code == WHOLE)
        def _() -> None:
            pair(here, None)

        @pl.when(code == PART)
        def _() -> None:
            column = lambda x: jnp.broadcast_to(x[0, :, here], (8, plan.key_block)).T[:, :1]
            mask = (column(key_segments) == segments[0]) & (column(key_order) <= order[0])
            if plan.window is not None:
                shape = (plan.key_block, plan.block)
                at_row = place[i] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
                mask &= at_row - jax.lax.broadcasted_iota(jnp.int32, shape, 0) < plan.window + j * plan.key_block
            pair(here, mask)

    jax.lax.fori_loop(jnp.maximum(first[at], c * per), jnp.minimum(last[at], (c + 1) * per), body, None)


def _backward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, *others: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients f[b h s k], f[b g t k] and f[b g t k]."""
    numbers, (d_out, lse, both) = others[:4], others[4:]
    table, chunks = _table(plan, numbers), k.shape[2] // plan.chunk
    if chunks == 1:
        return _backward_chunk(plan, q.dtype, table, jnp.int32(0), q, k, v, *numbers, d_out, lse, both)

    def step(total: jax.Array, c: jax.Array) -> tuple:
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, c * plan.chunk, plan.chunk, axis=2)
        keys = (part(k), part(v), *numbers[:2], part(numbers[2]), part(numbers[3]))
        d_q, d_k, d_v = _backward_chunk(plan, jnp.float32, table, c, q, *keys, d_out, lse, both)
        return total + d_q, (d_k, d_v)

    d_q, (d_k, d_v) = jax.lax.scan(step, jnp.zeros(q.shape, jnp.float32), jnp.arange(chunks))
    join = lambda x: rearrange(x, "c b g t k -> b g (c t) k")
    return d_q.astype(q.dtype), join(d_k), join(d_v)


def _backward_chunk(plan: Plan, dtype, table: tuple, c: jax.Array, q, k, v, *others) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries as far as they come from chunk c of keys, whose gradients are complete."""
    (b, h, _, d), g = q.shape, k.shape[1]
    r = h // g
    mine = pl.BlockSpec((1, 1, plan.block, d), lambda b, g, r_, i, *_: (b, g * r + r_, i, 0))
    keys = pl.BlockSpec((1, 1, plan.chunk, d), lambda b, g, r_, i, *_: (b, g, 0, 0))
    line = pl.BlockSpec((1, 1, plan.block), lambda b, g, r_, i, *_: (b, 0, i))
    key_line = pl.BlockSpec((1, 1, plan.chunk), lambda b, g, r_, i, *_: (b, 0, 0))
    head_line = pl.BlockSpec((1, 1, 1, plan.block), lambda b, g, r_, i, *_: (b, g * r + r_, 0, i))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5, grid=(b, g, r, plan.n),
        in_specs=[mine, keys, keys, line, line, key_line, key_line, mine, head_line, head_line],
        out_specs=[mine, keys, keys],
        scratch_shapes=[pltpu.VMEM((plan.block, d), jnp.float32), *[pltpu.VMEM((plan.chunk, d), jnp.float32)] * 2])
    return pl.pallas_call(
        partial(_backward_kernel, plan), grid_spec=grid, interpret=plan.interpret, name="flash_bwd",
        out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=_cost(5, plan, q, k, v),
    )(*table, c.reshape(1), q, k, v, *others)


def _backward_kernel(plan: Plan, words, first, last, place, c, q, k, v, *refs) -> None:
    numbers, (d_out, lse, both, d_q, d_k, d_v, q_sum, k_sum, v_sum) = refs[:4], refs[4:]
    b, r, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    q_sum[...] = jnp.zeros_like(q_sum)

    @pl.when((r == 0) & (i == 0))
    def _() -> None:
        k_sum[...] = jnp.zeros_like(k_sum)
        v_sum[...] = jnp.zeros_like(v_sum)

    def pair(here: pl.Slice, mask: jax.Array | None) -> None:
        product = lambda a, b, how: jax.lax.dot_general(a, b, how, preferred_element_type=jnp.float32)
        scores = product(k[0, 0, here], q[0, 0], NT)
        if mask is not None:
            scores = jnp.where(mask, scores, NEVER)
        weights = jnp.exp(scores - lse[0, 0])
        v_sum[here] += product(weights.astype(d_out.dtype), d_out[0, 0], NN)
        d_scores = (weights * (product(v[0, 0, here], d_out[0, 0], NT) - both[0, 0])).astype(q.dtype)
        k_sum[here] += product(d_scores, q[0, 0], NN)
        q_sum[...] += product(d_scores, k[0, 0, here], TN)

    _each_pair(plan, (b, i, c[0]), (words, first, last, place), numbers, pair)
    d_q[0, 0] = q_sum[...].astype(d_q.dtype)

    @pl.when((r == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
    def _() -> None:
        d_k[0, 0] = k_sum[...].astype(d_k.dtype)
        d_v[0, 0] = v_sum[...].astype(d_v.dtype)


def _cost(products: int, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> pl.CostEstimate:
    pairs = round(math.prod(q.shape[:3]) * k.shape[2] * plan.share)
    moved = sum(x.size * x.dtype.itemsize for x in (q, k, v)) + q.size * q.dtype.itemsize
    return pl.CostEstimate(flops=2 * products * pairs * q.shape[3], transcendentals=pairs, bytes_accessed=moved)
