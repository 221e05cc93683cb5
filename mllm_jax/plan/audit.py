"""What every chip holds the whole of, though the mesh could split it.

Of the state, what its sharding leaves whole along an axis that the layout's rules give to parameters.  Of activations,
what a collective makes whole along an axis of the batch, and what the program computes for all rows of the batch.
"""

import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from mllm_jax.plan.hlo import COLLECTIVES, HBM, Hlo, Instruction
from mllm_jax.plan.network import Network
from mllm_jax.plan.program import Program
from mllm_jax.sharding import BATCH_AXES, CONTEXT, splitting
from mllm_jax.types import record

PASSED = ("bitcast", "get-tuple-element", "reshape", "copy", "custom-call", "fusion", "all-gather")
LARGE = 1 << 20                         # bytes on each chip below which nothing is said


@record
class Replicated:
    """A tensor that every chip along these mesh axes holds."""

    what: str                           # "parameter", "optimizer" or "activation"
    name: str                           # its path, or the jax operations that it came from
    shape: str
    bytes: int                          # on each chip
    axes: tuple[str, ...]


def replicated(program: Program, hlo: Hlo | None, network: Network | None, large: int = LARGE) -> list[Replicated]:
    """All of them, the largest first; without a module those of the state alone."""
    found = list(of_state(program, large))
    if hlo is not None:
        found += of_activations(program, hlo, network, large)
    return sorted(found, key=lambda r: (-r.bytes, r.name))


def of_state(program: Program, large: int = LARGE) -> Iterator[Replicated]:
    """A leaf counts where some dimension of it that is not one of layers would divide over the axis."""
    mesh, state, blueprint = program.mesh, program.state, program.blueprint
    for what, tree in (("parameter", (state.params, state.frozen)), ("optimizer", (state.opt_state, state.ema))):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            local = leaf.sharding.shard_shape(leaf.shape)
            size = math.prod(local) * jax.numpy.dtype(leaf.dtype).itemsize
            used = {a for part in leaf.sharding.spec for a in ((part,) if isinstance(part, str) else part or ())}
            name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey) and k.key in blueprint.axes), "")
            layers = len(blueprint.shapes[name].shape) - len(blueprint.axes[name]) if name else 0
            whole = tuple(a for a in splitting(program.layout.rules, mesh) if a not in used and any(d % mesh.shape[a] == 0 for d in local[layers:]))
            if size >= large and whole:
                yield Replicated(what=what, name=name or jax.tree_util.keystr(path), bytes=size, axes=whole,
                                 shape=f"{leaf.dtype}[{','.join(map(str, local))}]")


def of_activations(program: Program, hlo: Hlo, network: Network, large: int = LARGE) -> list[Replicated]:
    """One entry for each operation of the source, of its largest array."""
    weights = _shapes_of_weights(program)
    rows, shards = program.stage.data.batch_size, math.prod(program.mesh.shape[a] for a in BATCH_AXES if a in program.mesh.shape)
    # A number that only the rows of the whole batch can be, and not the items of all rows of one chip.
    parts = {shards, shards * program.layout.microbatches}
    telling = shards > 1 and rows not in _numbers(program) and not parts & _of_a_row(program)
    worst: dict[tuple[str, tuple[str, ...]], Replicated] = {}
    for name, body in hlo.computations.items():
        users = {operand: i for i in reversed(body) for operand in i.operands}         # the first of each
        for i in body:
            axes = _gathered(i, network) or (_all_rows(i, rows, program) if telling else ())
            if not axes or name.startswith("fused") and not i.collective:
                continue
            # One that is written where it stands (shard_map) is meant.
            source = _source(i, users)
            if "/shard_map/" in source:
                continue
            for a in i.arrays:
                dims = tuple(d for d in a.dims if d > 1)
                if a.bytes < large or a.space != HBM or _is_weight(dims, weights):
                    continue
                one = Replicated(what="activation", name=source or i.name, bytes=a.bytes, axes=axes,
                                 shape=f"{a.dtype}[{','.join(map(str, a.dims))}]")
                key = one.name, axes
                if key not in worst or worst[key].bytes < one.bytes:
                    worst[key] = one
    return list(worst.values())


def _gathered(i: Instruction, network: Network) -> tuple[str, ...]:
    """The axes of the batch along which this gathers."""
    if i.collective != "all-gather":
        return ()
    return tuple(a for a in network.cost(i).axes if a in (*BATCH_AXES, CONTEXT))


def _source(i: Instruction, users: Mapping[str, Instruction], steps: int = 6) -> str:
    """Of the jax operation that this came from; where XLA wrote it anew, as between slices, of what its result is passed on by."""
    while not i.source and steps and (user := users.get(i.name)) and (user.op in PASSED or user.op.endswith(("-done", "-update"))):
        i, steps = user, steps - 1
    return i.source


def _all_rows(i: Instruction, rows: int, program: Program) -> tuple[str, ...]:
    """The axes of the batch, if this makes an array of all its rows; XLA's own copies of a part make none."""
    if i.op in ("parameter", "tuple", "get-tuple-element", "constant", "while", "bitcast") or i.op in COLLECTIVES or not i.source:
        return ()
    there = any(a.dims and a.dims[0] == rows for a in i.arrays)
    return tuple(a for a in BATCH_AXES if program.mesh.shape.get(a, 1) > 1) if there else ()


def _numbers(program: Program) -> set[int]:
    """Every size of a parameter, whole and of a shard, and of a row."""
    leaves = jax.tree.leaves((program.state.params, program.state.frozen))
    sizes = {d for x in leaves for d in (*x.shape, *x.sharding.shard_shape(x.shape))}
    return sizes | {program.spec.seq_len} | {n for room in program.spec.media.values() for n in (room.items, room.width, *room.grid)}


def _of_a_row(program: Program) -> set[int]:
    """What a row has so many of, and an array of several rows may have as one dimension with them."""
    of = lambda room: (room.items, room.num_tokens, math.prod(room.grid), room.items * room.num_tokens, room.items * math.prod(room.grid))
    return {program.spec.seq_len} | {n for room in program.spec.media.values() for n in of(room)}


def _shapes_of_weights(program: Program) -> set[tuple[int, ...]]:
    """Dimensions of parameters whole, of their shards along every part of the axes, and of shards side by side; of all layers and of one.

    Sorted, without ones.
    """
    out = set()
    sizes = {n for size in program.mesh.shape.values() for n in range(2, size + 1) if size % n == 0}      # an axis may be gathered in steps
    for x in jax.tree.leaves((program.state.params, program.state.frozen)):
        shard = x.sharding.shard_shape(x.shape)
        for shape, part in ((x.shape, shard), (x.shape[1:], shard[1:])):
            out |= {_plain(shape), _plain((math.prod(shape) // math.prod(part), *part)), *(_plain((n, *part)) for n in sizes)}
            for n in sizes:                         # still split along another axis, or that axis alone put together
                for k, d in enumerate(shape):
                    if d % n == 0:
                        out |= {_plain(each := (*shape[:k], d // n, *shape[k + 1:])), _plain((n, *each))}
    return out


def _is_weight(dims: tuple[int, ...], weights: set[tuple[int, ...]]) -> bool:
    """Also with the axes of a matrix as one, as heads and their width are where they are multiplied."""
    if _plain(dims) in weights:
        return True
    size = int(np.prod(dims, dtype=np.int64))
    return any(math.prod(w) == size and set(w) & set(dims) for w in weights if w)


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(d for d in shape if d > 1))
