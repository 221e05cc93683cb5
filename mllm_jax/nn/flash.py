"""Attention on TPU by a kernel that holds no scores: forward and backward, for whatever a `Visibility` says.

FlashAttention (arXiv:2205.14135) in Pallas.  Masks are made from segments and order inside, block by block, so that
causal, prefix, bidirectional spans, windows and packed examples are one program and no [s t] array exists.  A code for
each pair of blocks, from the smallest and largest numbers of both, says whether it is left out, needs its mask, or is
seen whole; blocks before the first and after the last needed one cost nothing.

Heads whose numbers fill whole lanes (a multiple of 128) are read where the projections leave them, as [b s (h k)], and rotated
inside: between the products of a layer nothing is then copied, and queries and keys that are kept are not yet rotated.  Narrow ones
that fill lanes together, such as two of 64, are read so too, and rotated before.

Under a mesh every device runs the kernels (nn/flash_kernel.py) on its own rows and heads.

Nothing here has run on a TPU yet: values and gradients come from the interpreter, and libtpu compiles it for v4, v5e, v5p and v6e
(benchmarks/flash_cycles.py).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from mllm_jax.nn import context
from mllm_jax.nn.flash_kernel import LANES, Numbers, Plan, backward, forward
from mllm_jax.nn.position import Rotation
from mllm_jax.nn.remat import keep
from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import current, current_mesh, fast_memory, spec

BLOCKS = (512, 384, 256, 128)           # positions
ONE = 768                               # where all see all, so many are one block: images of 576 to 729 patches
NARROW = 32                             # numbers of a head that may share lanes
CHUNK = 1 << 20                         # bytes of keys that stay in fast memory, less what queries of more than 128 lanes take;
ROOMY = 32 << 20                        # twice as many, and what rotates them, if it has more bytes than that

# What goes into the two passes and comes out, a letter for each array: queries, keys, turns, lines of one number a query, numbers of rows.
FORWARD, BACKWARD = ("qkktnnnn", "ql"), ("qkktnnnnqql", "qkk")


def attend_flash(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility | None, *, scale: float, window: int | None = None,
    rotation: Rotation | None = None, heads: str = "heads", interpret: bool = False,
) -> jax.Array:
    """f[b s h k], f[b t g k], f[b t g k] -> f[b s h k]; a query that sees nothing gives 0.  Without visibility all see all.

    Queries and keys turn by the `rotation` first.  `heads` is what the mesh splits heads as.
    """
    (b, s, h, width), t = q.shape, k.shape[1]
    one, axes = (ONE, ("item", heads)) if visibility is None else (0, ("batch", heads))
    if visibility is None:
        ones = lambda n: jnp.ones((b, n), jnp.int32)
        visibility, window = Visibility(segments=ones(s), order=ones(s), key_segments=ones(t), key_order=ones(t)), None
    pieces = context.pieces(q, k, visibility, heads)
    together, roomy = _together(q, k, heads), fast_memory() > ROOMY
    merged = width * together % LANES == 0
    if rotation is not None and not (merged and together == 1 and roomy and pieces is None and s == t and 2 * rotation.cos.shape[-1] == width):
        q, k, rotation = rotation(q), rotation(k), None
    block, key_block = block_of(s if pieces is None else pieces.length, one), block_of(t, one)
    lanes, number = -(-width * together // LANES) * LANES, k.dtype.itemsize
    # Queries, what they come to and the gradients of both take some twice what as many keys do, each time that they are there.
    room = 2 * CHUNK if roomy else CHUNK - 2 * number * block * (lanes * together - LANES)
    most = max(1, room // (lanes * number * key_block))
    chunks = -(-(blocks := -(-t // key_block)) // most)
    per = -(-blocks // chunks)
    plan = Plan(block=block, key_block=key_block, n=-(-s // block) if pieces is None else 2 * -(-pieces.length // block), m=per * chunks,
                per=per, width=width, merged=merged, together=together, scale=scale, window=window, causal=visibility.causal, axes=axes,
                pieces=pieces, keys=t, interpret=interpret)

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
    turns = None if rotation is None else fill(jnp.concatenate([rotation.cos, rotation.cos, -rotation.sin, rotation.sin], -1), plan.chunk)
    k, v = (context.repeated(x, h, heads) for x in (k, v))
    # Merged before they are filled: what was reshaped last is then what the projection gave.
    enter, leave = ("b s h k -> b s (h k)", "b s (h k) -> b s h k") if merged else ("b s h k -> b h s k", "b h s k -> b s h k")
    first = (lambda x: rearrange(x, enter)) if merged else (lambda x: x)
    q, k, v = whole(first(q)), *(first(x) if pieces is not None else fill(first(x), plan.chunk) for x in (k, v))
    if not merged:
        q, k, v = (rearrange(x, enter) for x in (q, k, v))
    out = _flash(q, k, v, turns, tuple(x[:, None] for x in numbers), plan)
    return rearrange(cut(out), leave, k=width) if merged else cut(rearrange(out, leave))


def _together(q: jax.Array, k: jax.Array, heads: str) -> int:
    """How many heads of f[b s h k] fill whole lanes, where each has keys of its own and a device has all of those; otherwise 1."""
    h, width = q.shape[2:]
    two = LANES // width if width >= NARROW and LANES % width == 0 else 1
    return two if k.shape[2] == h and h // context.parts_of(context.axes_of(heads, h)) % two == 0 else 1


def block_of(n: int, one: int = 0) -> int:
    """The size of blocks for n positions: large ones are faster, and those that fill their last one waste less; up to `one`
    positions are one block."""
    return -(-n // 128) * 128 if n <= one else min(BLOCKS, key=lambda block: -(-n // block) * (block + 64))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, turns: jax.Array | None, numbers: Numbers, plan: Plan) -> jax.Array:
    """f[b h s k], f[b g t k], f[b g t k] -> f[b h s k], or with heads merged f[b s (h k)], f[b t (g k)], f[b t (g k)] -> f[b s (h k)]."""
    return _on_mesh(forward, plan, (q, k, v, turns, *numbers), FORWARD)[0]


def _flash_forward(q: jax.Array, k: jax.Array, v: jax.Array, turns: jax.Array | None, numbers: Numbers, plan: Plan) -> tuple:
    out, lse = (keep(x, "attention") for x in _on_mesh(forward, plan, (q, k, v, turns, *numbers), FORWARD))
    return out, (q, k, v, turns, numbers, out, lse)


def _flash_backward(plan: Plan, kept: tuple, d_out: jax.Array) -> tuple:
    q, k, v, turns, numbers, out, lse = kept
    return *_on_mesh(backward, plan, (q, k, v, turns, *numbers, out, d_out, lse), BACKWARD), None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _on_mesh(f: Callable, plan: Plan, args: tuple, kinds: tuple[str, str]) -> tuple:
    """f(plan, *args) on each device's rows, heads and positions; `kinds` says what goes in and what comes out, see FORWARD."""
    mesh, (q, k) = current_mesh(), args[:2]
    if mesh is None or mesh.size == 1:
        return f(plan, *args)
    rows, heads = spec(plan.axes, (q.shape[0], plan.heads(q)), current().rules, mesh)
    heads = heads if plan.heads(k) % context.parts_of(context.axes_of(plan.axes[1], plan.heads(q))) == 0 else None
    along = None if plan.pieces is None else plan.pieces.axis
    keys = along if plan.pieces is not None and k.shape[plan.along] % plan.pieces.parts == 0 else None
    of_heads = lambda along: PartitionSpec(rows, along, heads) if plan.merged else PartitionSpec(rows, heads, along)
    by = {"q": of_heads(along), "k": of_heads(keys), "l": PartitionSpec(rows, heads, None, along), "n": PartitionSpec(rows),
          "t": PartitionSpec(rows)}
    ins, outs = (tuple(by[kind] for kind in word) for word in kinds)
    f = partial(f, plan) if plan.pieces is None else partial(_of_pieces, f, plan, kinds, keys is not None)
    # The kernel does not say how what it writes varies over devices.
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)(*args)


def _of_pieces(f: Callable, plan: Plan, kinds: tuple[str, str], split: bool, *args: jax.Array) -> tuple:
    """The same on a device that has a part of the positions of a row, and, where they are split, of its keys."""
    pieces, at = plan.pieces, plan.along
    fill = lambda x: jnp.pad(x, [(0, plan.m * plan.key_block - n if axis == at else 0) for axis, n in enumerate(x.shape)])
    same = lambda x: x
    enter = {"q": lambda x: pieces.deal(x, at), "l": lambda x: pieces.deal(x, 3), "n": same, "t": same,
             "k": lambda x: fill(jax.lax.all_gather(x, pieces.axis, axis=at, tiled=True) if split else x)}
    home = lambda x: jax.lax.psum_scatter(x, pieces.axis, scatter_dimension=at, tiled=True) if split else jax.lax.psum(x, pieces.axis)
    leave = {"q": lambda x: pieces.back(x, at), "l": lambda x: pieces.back(x, 3),
             "k": lambda x: home(jax.lax.slice_in_dim(x, 0, plan.keys, axis=at))}
    args = [enter[kind](x) for kind, x in zip(kinds[0], args, strict=True)]
    args[4:6] = (pieces.cut(x, 2) for x in args[4:6])
    return tuple(leave[kind](x) for kind, x in zip(kinds[1], f(plan, *args), strict=True))
