"""Rows of a table by number, where the table lies split over the chips and none may hold all of it.

Parameters lie split along their width over the axes that also split the rows of a batch ("fsdp", "expert").  Gathering a table
would cost 1.3 GB on every chip for Gemma 3's vocabulary, and its gradient, in float32, twice that and an all-reduce.  Here the
chips are divided in two ways: neighbours gather the part of the table that they hold together, all tokens of it, and `g` chips
that hold different parts tell each other their token numbers.  Each finds its part of the rows of all g, and sends each of them
its own: an all-to-all of as many bytes as the result has.  The gradient goes the same way back, and is added up in float32.

What a chip holds of the table falls with g, and how many rows it looks for grows, which is slow on a TPU where rows are short.
So g is the least that keeps a part and its gradient within TABLE_BYTES.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mllm_jax.sharding import constrain, current, current_mesh, cut_axes, cut_spec, mesh_axes, spec

TABLE_BYTES = 256 << 20                 # of a part of the table in the compute dtype, and its gradient in float32
Axes = tuple[str, ...]


def lookup(table: jax.Array, index: jax.Array, axis: str, dtype: jnp.dtype | None = None) -> jax.Array:
    """Rows i32[b s] of a table f[n d] whose first axis has this name -> [b s d], of this dtype or the table's.

    Numbers outside the table are an error that is not found here.
    """
    dtype = jnp.dtype(dtype or table.dtype)
    split = plan(table, index, axis, dtype)
    if split is None:
        # The width is gathered first: from a table split both ways the partitioner would replicate every row it finds.
        rows = jnp.take(constrain(table, f"{axis} embed_act"), index, axis=0).astype(dtype)
    else:
        rows = _lookup(split, table.shape, dtype, table, index)
    return constrain(rows, "batch seq embed_act")


class Split(NamedTuple):
    """How one lookup is divided; everything is known when the program is traced."""

    mesh: Mesh
    tokens: P                           # of the axes of the index
    numbers: Axes                       # the mesh axes that split the rows of the table
    width: Axes                         # and its width: apart x near
    apart: Axes                         # the chips that exchange rows, g of them
    near: Axes                          # those that gather the table
    g: int

    @property
    def table(self) -> P:
        return P(self.numbers or None, self.width)

    @property
    def others(self) -> Axes:
        """Axes over which tokens differ and the table is the same."""
        return tuple(a for entry in self.tokens for a in mesh_axes(entry) if a not in self.width)


def plan(table: jax.Array, index: jax.Array, axis: str, dtype: jnp.dtype) -> Split | None:
    """The division for f[n d] and i32[b s]; None where the table is not split among rows of the batch."""
    mesh, rules = current_mesh(), current().rules
    if mesh is None or mesh.size == 1 or index.ndim != 2:
        return None
    tokens = spec(("batch", "seq"), index.shape, rules, mesh)
    numbers, width = map(mesh_axes, spec((axis, "embed"), table.shape, rules, mesh))
    used = [a for entry in tokens for a in mesh_axes(entry)]
    size = lambda axes: math.prod(mesh.shape[a] for a in axes)
    if size(width) == 1 or not set(width) <= set(used) or set(numbers) & set(used):
        return None
    held = math.prod(table.shape) // size(numbers) * (dtype.itemsize + 4)
    ways = [g for g in range(1, size(width) + 1) if size(width) % g == 0 and cut_axes(mesh, width, size(width) // g)]
    g = next((g for g in ways if held <= g * TABLE_BYTES), ways[-1])
    cut, apart, near = cut_axes(mesh, width, size(width) // g)
    return Split(mesh=cut, tokens=cut_spec(tokens, width), numbers=numbers, width=mesh_axes(*cut_spec(P(width), width)), apart=apart,
                 near=near, g=g)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _lookup(split: Split, shape: tuple[int, int], dtype: jnp.dtype, table, index):
    def local(part, index):
        if math.prod(split.mesh.shape[a] for a in split.near) > 1:
            part = jax.lax.all_gather(part.astype(dtype), split.near, axis=1, tiled=True)
        numbers, here = _wanted(split, index, len(part))
        rows = jnp.where(here[:, None], jnp.take(part, numbers, axis=0, mode="clip").astype(dtype), 0)
        rows = jax.lax.psum(rows, split.numbers) if split.numbers else rows
        rows = jax.lax.all_to_all(rows, split.apart, 0, 1, tiled=True) if split.g > 1 else rows
        return rows.reshape(*index.shape, -1)

    return _run(split, local, (split.table, split.tokens), P(*split.tokens, None))(table, index)


def _forward(split, shape, dtype, table, index):
    return _lookup(split, shape, dtype, table, index), index


def _backward(split, shape, dtype, index, grad):
    n = shape[0] // math.prod(split.mesh.shape[a] for a in split.numbers)

    def local(index, grad):
        grad = grad.reshape(-1, shape[1])
        grad = jax.lax.all_to_all(grad, split.apart, 1, 0, tiled=True) if split.g > 1 else grad
        numbers, here = _wanted(split, index, n)
        part = jnp.zeros((n, grad.shape[1]), jnp.float32)
        part = part.at[jnp.where(here, numbers, n)].add(grad.astype(jnp.float32), mode="drop")
        part = jax.lax.psum_scatter(part, split.near, scatter_dimension=1, tiled=True)
        return jax.lax.psum(part, split.others) if split.others else part

    part = _run(split, local, (split.tokens, P(*split.tokens, None)), split.table)(index, grad)
    return part, np.zeros(index.shape, jax.dtypes.float0)


_lookup.defvjp(_forward, _backward)


def _run(split: Split, local, into: tuple, out: P):
    return jax.shard_map(local, mesh=split.mesh, in_specs=into, out_specs=out, check_vma=False)


def _wanted(split: Split, index: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The tokens of g chips as rows i32[g*t] of this chip's n, and whether they are among them."""
    index = index.reshape(-1)
    index = jax.lax.all_gather(index, split.apart, axis=0, tiled=True) if split.g > 1 else index
    numbers = index - n * (jax.lax.axis_index(split.numbers) if split.numbers else 0)
    return numbers, (numbers >= 0) & (numbers < n)
