"""The two kernels of nn/flash.py: what a device does with its own rows, heads and positions.

Scores are kept transposed, keys by queries: what belongs to a query (its largest score, its sum, its numbers) is then a
row, which costs nothing to spread over the keys.  The backward pass is one kernel: a chunk of keys stays in fast memory
while all queries pass, the gradients of keys and values are summed there, those of queries leave block by block.

Where the numbers of a head fill whole lanes, heads are read where the projections leave them, [b s (h k)]; others come as
[b h s k].  Queries are rotated and scaled as they come in, keys once for all queries of a head where one chunk holds them all, and
their gradients are turned back as they go out.

Narrow heads fill lanes together, those of 64 in twos, where each has keys of its own.  Queries of one then have zeros where the numbers of
the others are, so that a product over all lanes is that of one head.  It takes as long as one over its own lanes alone would, which the
matrix units fill up.
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

from mllm_jax.nn import context
from mllm_jax.types import record

LANES = 128
VMEM = 48 << 20                         # bytes of fast memory that the compiler may give to a kernel
LEAST = -1e37                           # the largest score of a query that has seen nothing
NEVER = -2e38                           # a masked score: exp(NEVER - LEAST) is 0
LOG2E = math.log2(math.e)               # exponentials are of base 2, as the chip has them: queries are scaled for it
SKIP, PART, WHOLE = 0, 1, 2             # codes of a pair of blocks
NN, NT, TN = ((((i,), (j,)), ((), ())) for i, j in ((1, 0), (1, 1), (0, 0)))    # a b, a b^T and a^T b

Numbers = tuple[jax.Array, jax.Array, jax.Array, jax.Array]             # segments and order of queries, and of keys; i32[b 1 s], i32[b 1 t]


@record
class Plan:
    """Static sizes of a call."""

    block: int                          # queries
    key_block: int
    n: int                              # blocks of queries on a device
    m: int                              # blocks of keys
    per: int                            # blocks of keys in a chunk, which fast memory holds
    width: int                          # numbers of a head
    merged: bool                        # heads and their numbers are one axis
    together: int                       # heads that fill whole lanes, and go through the kernel side by side
    scale: float                        # of scores
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
    def along(self) -> int:
        """The axis of positions."""
        return 1 if self.merged else 2

    @property
    def share(self) -> float:
        """The part of the pairs of blocks that rows of one example need, as far as is known here."""
        parts = 1 if self.pieces is None else self.pieces.parts
        first, key_first = self.block * np.arange(self.n * parts)[:, None], self.key_block * np.arange(self.m)
        seen = key_first < first + self.block if self.causal else np.ones((len(first), self.m), bool)
        return float(np.mean(seen if self.window is None else seen & (first - key_first - self.key_block < self.window - 1)))

    @property
    def lanes(self) -> int:
        """Numbers of heads that go through together."""
        return self.width * self.together

    def rows(self, e: int) -> slice:
        """Of an array whose rows are numbers of heads that go together, those of head e."""
        return slice(e * self.width, (e + 1) * self.width)

    def own(self, e: int) -> Callable[[jax.Array], jax.Array]:
        """[n lanes] -> the same with zeros for the numbers of other heads than e."""
        if self.together == 1:
            return lambda x: x
        return lambda x: jnp.where(jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1), self.width) == e, x, 0)

    def heads(self, x: jax.Array) -> int:
        return x.shape[2] // self.width if self.merged else x.shape[1]

    def spec(self, size: int, at: Callable[..., tuple]) -> pl.BlockSpec:
        """So many positions of heads that go together; `at` says which (row, heads, block) a step of the grid needs."""
        if self.merged:
            return pl.BlockSpec((None, size, self.lanes), lambda *step: (lambda b, h, i: (b, i, h))(*at(*step)))
        return pl.BlockSpec((None, None, size, self.width), lambda *step: (*at(*step), 0))

    def turns(self, size: int, at: Callable[..., tuple]) -> pl.BlockSpec:
        stays = size == self.chunk and self.per == self.m       # for a whole row, so that one buffer will do
        return pl.BlockSpec((None, size, 2 * self.width), at, pipeline_mode=pl.Buffered(1) if stays else None)


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


def forward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, turns: jax.Array | None, *numbers: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What the values come to, as queries lie, and f32[b h 1 s], the logarithm (of base 2) of the sum of exponentials.

    `turns` f32[b t 2k] holds what numbers of a head are multiplied by, cosines, and then what those half a head away are, sines with
    signs; None where there is nothing to rotate.
    """
    b, s, h = q.shape[0], q.shape[plan.along], plan.heads(q)
    r, chunks, together = h // plan.heads(k), plan.m // plan.per, plan.together

    def near(b: int, i: int, c: int, first: jax.Array, last: jax.Array, _) -> int:
        """A chunk that is not needed is not fetched: the index is that of the nearest one that is."""
        at = b * plan.n + i
        return jnp.clip(c, jax.lax.div(first[at], plan.per), jax.lax.div(jnp.maximum(last[at] - 1, 0), plan.per))

    mine = plan.spec(plan.block, lambda b, h, i, c, *_: (b, h, i))
    keys = plan.spec(plan.chunk, lambda b, h, i, c, _, *ends: (b, jax.lax.div(h, r), near(b, i, c, *ends)))
    line = pl.BlockSpec((1, 1, plan.block), lambda b, h, i, c, *_: (b, 0, i))
    key_line = pl.BlockSpec((1, 1, plan.chunk), lambda b, h, i, c, _, *ends: (b, 0, near(b, i, c, *ends)))
    turn = [] if turns is None else [
        plan.turns(plan.block, lambda b, h, i, c, *_: (b, i, 0)),
        plan.turns(plan.chunk, lambda b, h, i, c, _, *ends: (b, near(b, i, c, *ends), 0))]
    scratch = [((together, 1, plan.block), jnp.float32), ((together, 1, plan.block), jnp.float32), ((plan.lanes, plan.block), jnp.float32),
               ((together, plan.block, plan.lanes), q.dtype), *([((plan.chunk, plan.lanes), k.dtype)] if turn else [])]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4, grid=(b, h // together, plan.n, chunks), in_specs=[mine, keys, keys, line, line, key_line, key_line, *turn],
        out_specs=[mine, pl.BlockSpec((1, together, 1, plan.block), lambda b, h, i, c, *_: (b, h, 0, i))],
        scratch_shapes=[pltpu.VMEM(*one) for one in scratch])
    return pl.pallas_call(
        partial(_forward_kernel, plan, bool(turn)), grid_spec=grid, interpret=plan.interpret, name="flash_fwd",
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, 1, s), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary" if turn else "parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=_cost(2, plan, q, k, v),
    )(*_table(plan, numbers), q, k, v, *numbers, *([] if turns is None else [turns, turns]))


def _forward_kernel(plan: Plan, turned: bool, words, first, last, place, q, k, v, *refs) -> None:
    numbers, refs = refs[:4], refs[4:]
    turns, (out, lse, largest, total, sums, query, *key) = (refs[:2], refs[2:]) if turned else ((None, None), refs)
    key = key[0] if turned else k
    b, i, c = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(c == 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, LEAST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)
        for e in range(plan.together):
            _pass(1, plan.block, q, query.at[e], turns[0], scale=plan.scale * LOG2E, own=plan.own(e))

    if turned:
        # Once for all blocks of queries, unless they see chunks by turns.
        @pl.when((i == 0) | (plan.m > plan.per))
        def _() -> None:
            _pass(plan.per, plan.key_block, k, key, turns[1])

    def pair(here: pl.Slice, mask: jax.Array | None) -> None:
        values = v[here].T
        for e in range(plan.together):
            mine = plan.rows(e)
            scores = jax.lax.dot_general(key[here], query[e], NT, preferred_element_type=jnp.float32)
            if mask is not None:
                scores = jnp.where(mask, scores, NEVER)
            old = largest[e]
            new = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
            weights, fade = jnp.exp2(scores - new), jnp.exp2(old - new)
            largest[e] = new
            total[e] = total[e] * fade + jnp.sum(weights, axis=0, keepdims=True)
            sums[mine] = sums[mine] * fade + jax.lax.dot_general(values[mine], weights.astype(v.dtype), NN, preferred_element_type=jnp.float32)

    _each_pair(plan, (b, i, c), (words, first, last, place), numbers, pair)

    @pl.when(c == pl.num_programs(3) - 1)
    def _() -> None:
        for e in range(plan.together):
            whole = jnp.where(total[e] > 0, total[e], 1.0)
            sums[plan.rows(e)] = sums[plan.rows(e)] / whole
            lse[0, e] = largest[e] + jnp.log2(whole)
        out[...] = sums[...].T.astype(out.dtype)


def _turned(x: jax.Array, turns: jax.Array, way: int = 1) -> jax.Array:
    """f32[s k] rotated by f32[s 2k], see `turns`; way -1: back."""
    width = x.shape[1]
    swapped = pltpu.roll(x, width // 2, 1) * turns[:, width:]
    return x * turns[:, :width] + (swapped if way == 1 else -swapped)


def _pass(blocks: int, block: int, x, out, turns, *, scale: float = 1.0, way: int = 1, own: Callable = lambda y: y) -> None:
    """Blocks of positions of a head from x to `out`: rotated, where there are turns, and scaled; those of others left out."""
    def one(j: jax.Array, _: None) -> None:
        here = pl.ds(pl.multiple_of(j * block, block), block)
        y = own(x[here].astype(jnp.float32))
        out[here] = ((y if turns is None else _turned(y, turns[here], way)) * scale).astype(out.dtype)

    jax.lax.fori_loop(0, blocks, one, None)


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


def backward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, turns: jax.Array | None, *others: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values, as these lie."""
    numbers, (out, d_out, lse) = others[:4], others[4:]
    table, chunks = _table(plan, numbers), plan.m // plan.per
    if chunks == 1:
        return _backward_chunk(plan, q.dtype, table, jnp.int32(0), q, k, v, numbers, out, d_out, lse, turns, turns)

    def step(total: jax.Array, c: jax.Array) -> tuple:
        part = lambda x, axis: None if x is None else jax.lax.dynamic_slice_in_dim(x, c * plan.chunk, plan.chunk, axis=axis)
        keys, lines = (part(x, plan.along) for x in (k, v)), (*numbers[:2], part(numbers[2], 2), part(numbers[3], 2))
        d_q, d_k, d_v = _backward_chunk(plan, jnp.float32, table, c, q, *keys, lines, out, d_out, lse, turns, part(turns, 1))
        return total + d_q, (d_k, d_v)

    d_q, (d_k, d_v) = jax.lax.scan(step, jnp.zeros(q.shape, jnp.float32), jnp.arange(chunks))
    join = lambda x: rearrange(x, "c b t k -> b (c t) k" if plan.merged else "c b g t k -> b g (c t) k")
    return d_q.astype(q.dtype), join(d_k), join(d_v)


def _backward_chunk(
    plan: Plan, dtype, table: tuple, c: jax.Array, q, k, v, numbers, out, d_out, lse, turns, key_turns,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries as far as they come from chunk c of keys, whose gradients are complete."""
    b, g, together = q.shape[0], plan.heads(k), plan.together
    r = plan.heads(q) // g
    mine = plan.spec(plan.block, lambda b, g, r_, i, *_: (b, g * r + r_, i))
    keys = plan.spec(plan.chunk, lambda b, g, r_, i, *_: (b, g, 0))
    line = pl.BlockSpec((1, 1, plan.block), lambda b, g, r_, i, *_: (b, 0, i))
    key_line = pl.BlockSpec((1, 1, plan.chunk), lambda b, g, r_, i, *_: (b, 0, 0))
    head_line = pl.BlockSpec((1, together, 1, plan.block), lambda b, g, r_, i, *_: (b, g * r + r_, 0, i))
    turn = [] if turns is None else [plan.turns(plan.block, lambda b, g, r_, i, *_: (b, i, 0)),
                                     plan.turns(plan.chunk, lambda b, g, r_, i, *_: (b, 0, 0))]
    scratch = [((together, plan.block, plan.lanes), jnp.float32), *[((plan.chunk, plan.lanes), jnp.float32)] * 2,
               *[((together, plan.block, plan.lanes), q.dtype)] * (1 + (together > 1)), *([((plan.chunk, plan.lanes), k.dtype)] if turn else [])]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5, grid=(b, g // together, r, plan.n),
        in_specs=[mine, keys, keys, line, line, key_line, key_line, mine, mine, head_line, *turn], out_specs=[mine, keys, keys],
        scratch_shapes=[pltpu.VMEM(*one) for one in scratch])
    return pl.pallas_call(
        partial(_backward_kernel, plan, bool(turn)), grid_spec=grid, interpret=plan.interpret, name="flash_bwd",
        out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=_cost(5, plan, q, k, v),
    )(*table, c.reshape(1), q, k, v, *numbers, out, d_out, lse, *([] if turns is None else [turns, key_turns]))


def _backward_kernel(plan: Plan, turned: bool, words, first, last, place, c, q, k, v, *refs) -> None:
    numbers, (out, d_out, lse), refs = refs[:4], refs[4:7], refs[7:]
    turns, (d_q, d_k, d_v, q_sum, k_sum, v_sum, query, *more) = (refs[:2], refs[2:]) if turned else ((None, None), refs)
    # Heads that go together were rotated before: there are rotated keys, or the gradients of each of those heads alone, or neither.
    key, grads, several = more[0] if turned else k, more[0] if plan.together > 1 else None, range(plan.together)
    b, r, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    q_sum[...] = jnp.zeros_like(q_sum)

    @pl.when((r == 0) & (i == 0))
    def _() -> None:
        def clear(j: jax.Array, _: None) -> None:
            here = pl.ds(pl.multiple_of(j * plan.key_block, plan.key_block), plan.key_block)
            k_sum[here] = v_sum[here] = jnp.zeros((plan.key_block, plan.lanes), jnp.float32)

        jax.lax.fori_loop(0, plan.per, clear, None)
        if turned:
            _pass(plan.per, plan.key_block, k, key, turns[1])

    for e in several:
        _pass(1, plan.block, q, query.at[e], turns[0], scale=plan.scale * LOG2E, own=plan.own(e))
        if grads is not None:
            _pass(1, plan.block, d_out, grads.at[e], None, own=plan.own(e))
    products = (out[...].astype(jnp.float32) * d_out[...].astype(jnp.float32)).T
    both = [jnp.sum(products[plan.rows(e)], axis=0, keepdims=True) for e in several]

    def pair(here: pl.Slice, mask: jax.Array | None) -> None:
        product = lambda a, b, how: jax.lax.dot_general(a, b, how, preferred_element_type=jnp.float32)
        for e in several:
            d_sums = d_out[...] if grads is None else grads[e]
            scores = product(key[here], query[e], NT)
            if mask is not None:
                scores = jnp.where(mask, scores, NEVER)
            weights = jnp.exp2(scores - lse[0, e])
            v_sum[here] += product(weights.astype(d_out.dtype), d_sums, NN)
            d_scores = (weights * (product(v[here], d_sums, NT) - both[e])).astype(q.dtype)
            k_sum[here] += product(d_scores, query[e], NN)
            q_sum[e] += product(d_scores, key[here], TN)

    _each_pair(plan, (b, i, c[0]), (words, first, last, place), numbers, pair)
    if plan.together > 1:
        q_sum[0] = sum(plan.own(e)(q_sum[e]) for e in several)
    _pass(1, plan.block, q_sum.at[0], d_q, turns[0], scale=plan.scale, way=-1)

    @pl.when((r == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
    def _() -> None:
        _pass(plan.per, plan.key_block, k_sum, d_k, turns[1], scale=1 / LOG2E, way=-1)
        _pass(plan.per, plan.key_block, v_sum, d_v, None)


def _cost(products: int, plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> pl.CostEstimate:
    pairs = round(q.size // plan.width * k.shape[plan.along] * plan.share)
    moved = sum(x.size * x.dtype.itemsize for x in (q, k, v)) + q.size * q.dtype.itemsize
    return pl.CostEstimate(flops=2 * products * pairs * plan.width, transcendentals=pairs, bytes_accessed=moved)
