"""Attention over rows whose positions are split over devices, along the axis "context" of the mesh.

Two ways, of which the first is taken where it can be; s positions on c devices, h heads of queries and g of keys:

    heads   positions are exchanged for heads before attention, and back after it (all-to-all, arXiv:2309.14509): a device
            has whole rows of h / c heads.  Nothing is as large as a row of all heads, and all devices have as much to do,
            whoever sees whom.  c must divide h; where it does not divide g, keys are repeated.
    keys    keys and values are gathered, 2 g s numbers (Llama 3, arXiv:2407.21783, section 3.3.2); the gradients of both are
            summed back.  The kernel for TPU leaves out what nobody sees, so that with it the queries are dealt out anew: of
            2 c pieces of a row a device gets one from the front and its counterpart from the back (`Pieces`).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import constrain, current, current_mesh, mesh_axes, spec, use
from mllm_jax.types import record

Core = Callable[..., jax.Array]         # (q, k, v, visibility) -> f[b s h k]
WHOLE, SPLIT = "batch row row_heads head_dim", "batch seq {} head_dim"


def axes_of(name: str, size: int) -> tuple[str, ...]:
    """The axes of the mesh that split so many of what has this name."""
    mesh = current_mesh()
    part = None if mesh is None else spec((name,), (size,), current().rules, mesh)[0]
    return mesh_axes(part)


def way(q: jax.Array, k: jax.Array, visibility: Visibility | None) -> str | None:
    """How queries f[b s h k] come together with keys f[b t g k]: by "heads", by "keys", or None where rows are whole.

    Without visibility items are attended to, each of which lies on one device.
    """
    along = axes_of("seq", q.shape[1])
    if visibility is None or parts_of(along) == 1 or q.shape[1] % (2 * parts_of(along)):
        return None
    return "heads" if set(along) <= set(axes_of("row_heads", q.shape[2])) else "keys"


def parts_of(axes: tuple[str, ...]) -> int:
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[a] for a in axes)


def by_heads(core: Core, q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """f[b s h k], f[b t g k], f[b t g k] -> f[b s h k], where `core` has whole rows of some heads."""
    k, v = (repeated(x, q.shape[2], "row_heads") for x in (k, v))
    # Said on both sides of the exchange: the partitioner would otherwise make whole rows from the layer's input on.
    exchanged = (constrain(constrain(x, SPLIT.format(name)), WHOLE) for x, name in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads")))
    return constrain(constrain(core(*exchanged, visibility), WHOLE), SPLIT.format("heads"))


def repeated(x: jax.Array, h: int, name: str) -> jax.Array:
    """Keys f[b t g k] with copies of heads as far as h heads of queries, split as `name` is, lie on more devices than there are."""
    g, parts = x.shape[2], parts_of(axes_of(name, h))
    return jnp.repeat(x, math.lcm(g, parts) // g, axis=2) if g % parts and h % math.lcm(g, parts) == 0 else x


def pieces(q: jax.Array, k: jax.Array, visibility: Visibility | None, heads: str) -> "Pieces | None":
    """How such queries are dealt out, for a kernel whose blocks have sizes of their own; None where rows or heads are whole."""
    if heads != "heads" or way(q, k, visibility) != "keys":
        return None
    axes = axes_of("seq", q.shape[1])
    return Pieces(axis=axes, parts=parts_of(axes), length=q.shape[1] // (2 * parts_of(axes)))


@record
class Pieces:
    """A row of 2 * parts pieces: device j has pieces 2 j and 2 j + 1, and works on j and its counterpart 2 parts - 1 - j.

    Under causal attention all devices then have as much to do.  Of the two pieces one has an even number, and comes first.
    """

    axis: str | tuple[str, ...]
    parts: int
    length: int                         # positions of a piece

    def numbers(self) -> jax.Array:
        """i32[2]: the pieces that this device works on."""
        j = jax.lax.axis_index(self.axis)
        pair = jnp.stack([j, 2 * self.parts - 1 - j])
        return jnp.where(j % 2 == 0, pair, pair[::-1])

    def deal(self, x: jax.Array, axis: int) -> jax.Array:
        """The pieces that this device has -> those that it works on."""
        return self._move(x, axis, lambda has, works: (has, works))

    def back(self, x: jax.Array, axis: int) -> jax.Array:
        return self._move(x, axis, lambda has, works: (works, has))

    def cut(self, x: jax.Array, axis: int) -> jax.Array:
        """Of an array of whole rows, whose pieces may have been filled up, those that this device works on."""
        size = x.shape[axis] // (2 * self.parts)
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, n * size, size, axis) for n in self.numbers()], axis)

    def _move(self, x: jax.Array, axis: int, way: Callable[[int, int], tuple[int, int]]) -> jax.Array:
        ends = [[(n // 2, min(n, 2 * self.parts - 1 - n)) for n in range(first, 2 * self.parts, 2)] for first in (0, 1)]
        halves = jnp.split(x, 2, axis)
        return jnp.concatenate([jax.lax.ppermute(half, self.axis, [way(*end) for end in each])
                                for half, each in zip(halves, ends)], axis)


def by_keys(core: Core, q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """The same with gathered keys; `core` has a part of the queries, and knows where in the row they stand."""
    mesh, rules = current_mesh(), current().rules
    rows, seq, heads = spec(("batch", "seq", "heads"), q.shape[:3], rules, mesh)
    heads = heads if k.shape[2] % parts_of(axes_of("heads", q.shape[2])) == 0 else None
    mine, all_ = PartitionSpec(rows, seq), PartitionSpec(rows)
    sees = replace(visibility, segments=mine, order=mine, key_segments=all_, key_order=all_, start=PartitionSpec())
    queries, keys = PartitionSpec(rows, seq, heads), PartitionSpec(rows, None, heads)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
        start = visibility.start + jax.lax.axis_index(seq) * q.shape[1]
        with use(current()):            # one device, which is all that `core` shall know
            return core(q, k, v, replace(visibility, start=start))

    return jax.shard_map(local, mesh=mesh, in_specs=(queries, keys, keys, sees), out_specs=queries, check_vma=False)(q, k, v, visibility)
