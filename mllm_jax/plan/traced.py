"""A traced program as operations on values of one chip: calls written out, and along which mesh axes each value is split.

Sharding goes forward from the arguments, as the partitioner's does: an operation keeps the axes of its operands' dimensions,
a product drops what it contracts and what the other operand's rows already use (that operand is gathered).  What has the
shape of a parameter outside the loops over layers, such as its gradient, lies as the parameter does.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

Axes = tuple[tuple[str, ...], ...]      # of each dimension

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr",
         "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_lin": "jaxpr"}


@dataclass(eq=False)
class Value:
    shape: tuple[int, ...]              # of all chips, or inside shard_map of one
    width: float                        # bytes of a number
    axes: Axes
    sizes: Mapping[str, int]            # of the mesh
    gathered: bool = False              # a product takes it whole along axes that its other operand's rows use
    rows: bool = False                  # a kernel or a sum into rows of a table takes it row by row, in tiles of its last dimensions
    minor: int | None = None            # the dimension that lies along a tile's 128 numbers, where a kernel settles it
    apart: tuple[int, ...] = ()         # dimensions that number matrices of a product: they are not in tiles
    name: str = ""                      # under which a layer keeps it (nn/remat.py)

    @property
    def local(self) -> tuple[int, ...]:
        return tuple(-(-n // math.prod(self.sizes[a] for a in part)) for n, part in zip(self.shape, self.axes))

    @property
    def bytes(self) -> float:
        """On each chip."""
        return in_tiles(self.local, self.width, self.apart, self.rows, self.minor)


@dataclass(eq=False)
class Op:
    name: str
    inputs: list[Value]
    outputs: list[Value]
    params: Mapping[str, Any]
    bodies: list["Body"] = field(default_factory=list)
    times: int = 1                      # turns of its body
    again: bool = False                 # for the backward pass: a gradient, or what is computed again


@dataclass(eq=False)
class Body:
    inputs: list[Value]
    outputs: list[Value]
    ops: list[Op]
    carried: int = 0                    # its first inputs after `constant` ones, and its first outputs, are those of the next turn
    constant: int = 0


class Reader:
    """Of one program; `shapes` are the axes of its parameters by shape, `rows` those of the rows of its batch."""

    def __init__(self, sizes: Mapping[str, int], shapes: Mapping[tuple[int, ...], Axes], rows: tuple[str, ...] = (), turns: int = 1):
        self.sizes, self.shapes, self.rows, self.turns = dict(sizes), shapes, rows, turns
        self.stacked = {shape[1:] for shape in shapes}
        self.again = False

    def read(self, jaxpr: Any, axes: Sequence[Axes]) -> Body:
        ins = [self.value(v.aval, a) for v, a in zip(jaxpr.jaxpr.invars, axes, strict=True)]
        ops: list[Op] = []
        outs = self.inline(jaxpr.jaxpr, ins, ops, True)
        _backward(ops)
        return Body(inputs=ins, outputs=outs, ops=ops)

    def value(self, aval: Any, axes: Axes = ()) -> Value:
        shape = tuple(getattr(aval, "shape", ()))
        dtype = getattr(aval, "dtype", None)
        width = 4.0 if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.dtype(dtype).itemsize
        return Value(shape=shape, width=width, axes=tuple(axes) or ((),) * len(shape), sizes=self.sizes)

    def inline(self, jaxpr: Any, ins: Sequence[Value], ops: list[Op], outside: bool) -> list[Value]:
        """Adds the operations to the list and gives the results; `outside` of loops over layers."""
        env = dict(zip(jaxpr.invars, ins, strict=True)) | {v: self.value(v.aval) for v in jaxpr.constvars}
        get = lambda v: self.value(v.aval) if isinstance(v, Literal) else env[v]
        for eqn in jaxpr.eqns:
            given, name = [get(v) for v in eqn.invars], eqn.primitive.name
            if name in CALLS and CALLS[name] in eqn.params:
                inner, before = eqn.params[CALLS[name]], self.again
                self.again |= bool(eqn.params.get("differentiated"))
                outs = self.inline(getattr(inner, "jaxpr", inner), given, ops, outside)
                self.again = before
            elif name == "shard_map":
                outs = self._mapped(eqn, given, ops)
            elif name in ("scan", "while", "cond"):
                op = getattr(self, f"_{name}")(eqn, given, outside)
                ops.append(op)
                outs = op.outputs
            else:
                outs = self._simple(eqn, given, outside)
                ops.append(Op(name, given, outs, eqn.params, again=self.again))
            env.update((v, out) for v, out in zip(eqn.outvars, outs, strict=True))
        return [get(v) for v in jaxpr.outvars]

    def _simple(self, eqn: Any, given: list[Value], outside: bool) -> list[Value]:
        outs, everything = [], given
        for k, var in enumerate(eqn.outvars):
            value = self.value(var.aval)
            given = everything[k:k + 1] if eqn.primitive.name == "optimization_barrier" else everything
            value.axes = RULES.get(eqn.primitive.name, _alike)(eqn.params, given, value)
            if outside and eqn.primitive.name == "broadcast_in_dim":
                self._for_rows(eqn.params, given[0], value)
            if outside and eqn.primitive.name not in ("dot_general", "scatter-add", "conv_general_dilated"):
                self._as_parameter(value)
            value.rows = eqn.primitive.name in ("pallas_call", "scatter-add")
            if eqn.primitive.name in ("add", "add_any", "psum", "reduce_scatter"):
                value.rows = any(v.rows for v in given)
            value.name = eqn.params["name"] if eqn.primitive.name == "name" else given[0].name if eqn.primitive.name in SAME else ""
            if eqn.primitive.name in SAME and value.shape == given[0].shape and len(value.shape) > 2:
                value.rows, value.minor = given[0].rows, given[0].minor
            outs.append(value)
        if eqn.primitive.name == "pallas_call":
            for one in everything:
                one.rows = True
        if eqn.primitive.name == "dot_general":
            _gather(eqn.params, everything)
            _apart(eqn.params, everything, outs[0])
        return outs

    def _for_rows(self, params: Mapping, one: Value, many: Value) -> None:
        """Of a parameter that every row takes, each chip makes copies for its own rows."""
        if one.shape and any(one.axes) and 0 not in params["broadcast_dimensions"]:
            if many.shape[0] % math.prod(self.sizes[a] for a in self.rows) == 0:
                many.axes = (self.rows, *((),) * (len(many.shape) - 1))

    def _as_parameter(self, value: Value) -> None:
        """Splits it as the parameter of its shape, where that is split more."""
        axes = self.shapes.get(value.shape, ())
        if len(flat(axes)) > len(flat(value.axes)):
            value.axes = axes

    def _mapped(self, eqn: Any, given: list[Value], ops: list[Op]) -> list[Value]:
        inner, mesh = eqn.params["jaxpr"], eqn.params["mesh"]
        self.sizes.update(mesh.shape)
        split = lambda spec, rank: axes_of(spec, rank, self.sizes)
        ins = [self.value(v.aval) for v in inner.invars]
        for spec, outer, one in zip(eqn.params["in_specs"], given, ins, strict=True):
            ops.append(Op("enter", [outer], [one], {"same": set(flat(split(spec, len(outer.shape)))) == set(flat(outer.axes))}))
            outer.axes = outer.axes if any(outer.axes) else split(spec, len(outer.shape))
        results = self.inline(inner, ins, ops, False)
        for outer, one in zip(given, ins):
            outer.rows |= one.rows and outer.local == one.shape
        outs = []
        for spec, var, one in zip(eqn.params["out_specs"], eqn.outvars, results, strict=True):
            out = self.value(var.aval, split(spec, len(var.aval.shape)))
            out.rows, out.name = one.rows, one.name
            ops.append(Op("leave", [one], [out], {"same": True}))
            outs.append(out)
        return outs

    def _scan(self, eqn: Any, given: list[Value], outside: bool) -> Op:
        p = eqn.params
        consts, carried, n = p["num_consts"], p["num_carry"], p["length"]
        inner = p["jaxpr"].jaxpr
        # A loop over layers takes their stacked parameters.
        layers = outside and any(len(v.shape) > 2 and v.shape[1:] in self.stacked for v in given[consts + carried:])
        start = [v.axes for v in given[:consts + carried]] + [v.axes[1:] for v in given[consts + carried:]]
        for _ in range(2):              # a carry that begins unsplit may come back split
            ins, ops = [self.value(v.aval, a) for v, a in zip(inner.invars, start, strict=True)], []
            outs = self.inline(inner, ins, ops, outside and not layers)
            after = [v.axes for v in outs[:carried]]
            if after == start[consts:consts + carried]:
                break
            start[consts:consts + carried] = [a if any(a) else b for a, b in zip(after, start[consts:consts + carried])]
        _backward(ops)
        for v, a in zip(given[consts:consts + carried], start[consts:consts + carried]):
            v.axes = v.axes if any(v.axes) else a
        for v, one in zip(given[consts:], outs[:carried]):
            v.rows |= one.rows
        body = Body(inputs=ins, outputs=outs, ops=ops, carried=carried, constant=consts)
        results = []
        for k, (var, inside) in enumerate(zip(eqn.outvars, outs, strict=True)):
            value = self.value(var.aval, inside.axes if k < carried else ((), *inside.axes))
            if outside:
                self._as_parameter(value)
            value.name, value.rows = inside.name, inside.rows
            value.minor = None if inside.minor is None else inside.minor + (k >= carried)
            results.append(value)
        return Op("scan", given, results, p, [body], n)

    def _while(self, eqn: Any, given: list[Value], outside: bool) -> Op:
        p = eqn.params
        skip, consts = p["cond_nconsts"], p["body_nconsts"]
        inner = p["body_jaxpr"].jaxpr
        ins, ops = [self.value(v.aval, g.axes) for v, g in zip(inner.invars, given[skip:], strict=True)], []
        outs = self.inline(inner, ins, ops, outside)
        body = Body(inputs=ins, outputs=outs, ops=ops, carried=len(outs), constant=consts)
        results = [self.value(v.aval, o.axes) for v, o in zip(eqn.outvars, outs, strict=True)]
        return Op("while", given[skip:], results, p, [body], self.turns)

    def _cond(self, eqn: Any, given: list[Value], outside: bool) -> Op:
        bodies = []
        for branch in eqn.params["branches"]:
            ins, ops = [self.value(v.aval, g.axes) for v, g in zip(branch.jaxpr.invars, given[1:], strict=True)], []
            bodies.append(Body(inputs=ins, outputs=self.inline(branch.jaxpr, ins, ops, outside), ops=ops))
        best = [max((b.outputs[k].axes for b in bodies), key=lambda a: sum(map(len, a))) for k in range(len(eqn.outvars))]
        return Op("cond", given[1:], [self.value(v.aval, a) for v, a in zip(eqn.outvars, best, strict=True)], {}, bodies)


@functools.cache
def in_tiles(dims: tuple[int, ...], width: float, apart: tuple[int, ...] = (), rows: bool = False, minor: int | None = None) -> float:
    """Bytes of an array: two of its dimensions lie in tiles of 8 x 128 numbers (of bytes 32 x 128), those that waste least.

    They are none of those that are apart; with `rows` they are the last two, as kernels take them; `minor` is the one of 128.
    """
    free = [d for d in range(len(dims)) if d not in apart]
    if len(free) < 2:
        return math.prod(dims) * width
    low = 32 if width == 1 else 8
    across = lambda n: -(-n // 128) * 128
    down = lambda n: -(-n // low) * low if n > 4 else 1 << max(n - 1, 0).bit_length()
    pairs = [(len(dims) - 1, len(dims) - 2)] if rows else [p for p in itertools.permutations(free, 2) if minor in (None, p[0])]
    return min(math.prod(across(n) if d == a else down(n) if d == b else n for d, n in enumerate(dims)) for a, b in pairs) * width


def axes_of(spec: Sequence, rank: int, sizes: Mapping[str, int]) -> Axes:
    """Of a PartitionSpec; mesh axes of one device split nothing."""
    each = lambda part: () if part is None else (part,) if isinstance(part, str) else part
    split = [tuple(a for a in each(part) if sizes[a] > 1) for part in (*spec, *(None,) * (rank - len(spec)))]
    # Both parts of an axis that was cut (sharding.cut_axes) are that axis.
    both = lambda part: tuple(dict.fromkeys(base(a) for a in part)) if {f"{base(a)}.out" for a in part} <= {*part} else part
    return tuple(part and both(part) for part in split)


def flat(axes: Axes) -> list[str]:
    return [a for part in axes for a in part]


def base(name: str) -> str:
    """"fsdp" of "fsdp.in", a part of that axis (sharding.cut_axes)."""
    return name.partition(".")[0]


def _unused(part: tuple[str, ...], used: set[str]) -> tuple[str, ...]:
    return tuple(a for a in part if base(a) not in used)


def _joined(rank: int, candidates: Callable[[int], list[tuple[str, ...]]]) -> Axes:
    """For each dimension the first candidate that is split, along axes that no earlier dimension uses."""
    out, used = [], set()
    for d in range(rank):
        part = next((p for c in candidates(d) if (p := _unused(c, used))), ())
        used |= {base(a) for a in part}
        out.append(part)
    return tuple(out)


def _alike(_: Mapping, given: list[Value], out: Value) -> Axes:
    """As the operands' dimensions of the same size at the same place."""
    rank = len(out.shape)
    return _joined(rank, lambda d: [v.axes[d] for v in given if len(v.shape) == rank and v.shape[d] == out.shape[d]])


def _broadcast(params: Mapping, given: list[Value], out: Value) -> Axes:
    where = {d: k for k, d in enumerate(params["broadcast_dimensions"])}
    fits = lambda d: d in where and given[0].shape[where[d]] == out.shape[d]
    return tuple(given[0].axes[where[d]] if fits(d) else () for d in range(len(out.shape)))


def _reshape(_: Mapping, given: list[Value], out: Value) -> Axes:
    """Of dimensions that are merged, or of which one is cut, the first keeps the axes."""
    [left, *_], axes = given, [()] * len(out.shape)
    i = j = 0
    while i < len(left.shape) and j < len(out.shape):
        a, b, first, to = left.shape[i], out.shape[j], i, j
        while a != b and i < len(left.shape) and j < len(out.shape):
            if a < b:
                i += 1
                a *= left.shape[i] if i < len(left.shape) else b
            else:
                j += 1
                b *= out.shape[j] if j < len(out.shape) else a
        group = [left.axes[k] for k in range(first, min(i + 1, len(left.shape)))]
        part = next((p for p in group if p), ())
        sizes = math.prod(left.sizes[x] for x in part)
        k = next((k for k in range(to, min(j + 1, len(out.shape))) if out.shape[k] % sizes == 0), None)
        if part and k is not None:
            axes[k] = part
        i, j = i + 1, j + 1
    return tuple(axes)


def _dropped(key: str) -> Callable:
    def rule(params: Mapping, given: list[Value], out: Value) -> Axes:
        gone = {d % len(given[0].shape) for d in params[key]}
        kept = tuple(a for d, a in enumerate(given[0].axes) if d not in gone)
        return kept if len(kept) == len(out.shape) else _alike(params, given, out)
    return rule


def _dot(params: Mapping, given: list[Value], _: Value) -> Axes:
    (lc, rc), (lb, rb) = params["dimension_numbers"]
    left, right = given[:2]
    out, used = [], set()
    batch = [left.axes[a] or right.axes[b] for a, b in zip(lb, rb)]
    free = [(left, [left.axes[d] for d in range(len(left.shape)) if d not in (*lc, *lb)]),
            (right, [right.axes[d] for d in range(len(right.shape)) if d not in (*rc, *rb)])]
    # Rows keep their axes; a matrix that is split along them is gathered.
    first = 0 if _rows(left) >= _rows(right) else 1
    contracted = {base(a) for x, y in zip(lc, rc) if left.axes[x] == right.axes[y] for a in left.axes[x]}
    used |= contracted | {base(a) for part in batch for a in part}
    parts: dict[int, list] = {}
    for side in (first, 1 - first):
        parts[side] = []
        for part in free[side][1]:
            part = _unused(part, used)
            used |= {base(a) for a in part}
            parts[side].append(part)
    out = [*batch, *parts[0], *parts[1]]
    return tuple(out)


def _apart(params: Mapping, given: list[Value], out: Value) -> None:
    """Of many products of matrices with rows and columns."""
    (lc, rc), (lb, rb) = params["dimension_numbers"]
    rows = lambda v, *taken: math.prod(n for d, n in enumerate(v.local) if not any(d in t for t in taken))
    if len(lb) and min(rows(given[0], lc, lb), rows(given[1], rc, rb)) > 1:
        given[0].apart, given[1].apart, out.apart = tuple(lb), tuple(rb), tuple(range(len(lb)))


def _backward(ops: Sequence[Op]) -> None:
    """Splits what is made of nothing that is split, such as zeros and positions, as those that it meets."""
    made = {v for op in ops for v in op.outputs}
    for op in reversed(ops):
        _lies(op)
        out = op.outputs[0] if op.outputs else None
        if out is None or not any(out.axes) or op.name not in ("broadcast_in_dim", *SAME) and RULES.get(op.name, _alike) is not _alike:
            continue
        for v in op.inputs:
            if v not in made or any(v.axes):
                continue
            if op.name == "broadcast_in_dim":
                where = op.params["broadcast_dimensions"]
                v.axes = tuple(out.axes[d] if n == out.shape[d] else () for n, d in zip(v.shape, where))
            elif v.shape == out.shape:
                v.axes = out.axes


def _lies(op: Op) -> None:
    """What is made for a kernel lies as it takes it."""
    out = op.outputs[0] if op.outputs else None
    along = None if out is None or len(out.shape) < 3 else len(out.shape) - 1 if out.rows else out.minor
    if along is None or op.name not in ("transpose", "pad", "concatenate", *SAME) and RULES.get(op.name, _alike) is not _alike:
        return
    for v in op.inputs:
        if op.name == "transpose":
            v.minor = op.params["permutation"][along]
        elif len(v.shape) == len(out.shape) and v.shape[along] > 1:
            v.minor = along


def _rows(v: Value) -> float:
    """More for what is rather rows of the batch than a matrix: split by its first dimension, and of more dimensions."""
    return bool(v.axes and v.axes[0]) + len(v.shape) / 10


def _gather(params: Mapping, given: list[Value]) -> None:
    """Marks the operand that is gathered: it is split along an axis that the other one's rows are split by, and not contracted with it."""
    (lc, rc), (lb, rb) = params["dimension_numbers"]
    left, right = given[:2]
    first = left if _rows(left) >= _rows(right) else right
    other = right if first is left else left
    mine = dict(zip(rc, lc)) | dict(zip(rb, lb)) if other is right else dict(zip(lc, rc)) | dict(zip(lb, rb))
    taken = {base(a) for part in first.axes for a in part}
    for d, part in enumerate(other.axes):
        if part and {base(a) for a in part} & taken and not (d in mine and first.axes[mine[d]] == part):
            other.gathered = True


SAME = {"reshape", "squeeze", "expand_dims", "name", "copy", "stop_gradient", "reduce_precision", "sharding_constraint", "reshard",
        "optimization_barrier", "layout_constraint", "copy_p"}
RULES: dict[str, Callable[[Mapping, list[Value], Value], Axes]] = {
    "sharding_constraint": lambda p, given, out: axes_of(p["sharding"].spec, len(out.shape), out.sizes),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": lambda p, given, out: tuple(given[0].axes[d] for d in p["permutation"]),
    "squeeze": _dropped("dimensions"),
    "stack": lambda p, given, out: (*given[0].axes[:p["axis"]], (), *given[0].axes[p["axis"]:]),
    "dot_general": _dot,
    **{f"reduce_{k}": _dropped("axes") for k in ("sum", "max", "min", "prod", "and", "or")},
    "argmax": _dropped("axes"), "argmin": _dropped("axes"),
}
