"""Memory of a step without compiling it: what is alive when, in the traced program at the sizes of one chip.

Chains of operations on single numbers are taken to be fused into what reads them, so that only these values are in memory:
what products, kernels, sums over an axis, gathers and loops give and take, what collectives give, and weights while they are
gathered.  A value is there from the operation that makes it to the last that reads it, or reads what was fused from it.
Where the compiler's order is another than the program's, or what it joins is more than a chain, a rule below says so; each was
read from the buffer assignments of several programs, and holds for no recipe or layer by name.
"""

import math
from collections.abc import Iterator, Mapping

import jax

from mllm_jax import compiler
from mllm_jax.plan.program import Program
from mllm_jax.plan.traced import SAME, Axes, Body, Op, Reader, Value, axes_of, base, in_tiles
from mllm_jax.types import record

ALONE = {"dot_general", "conv_general_dilated", "pallas_call", "gather", "scatter-add", "scatter", "sort", "top_k", "cumsum", "random_bits",
         "all_gather", "reduce_scatter", "psum", "all_to_all", "ppermute", "scan", "while", "cond", "approx_top_k", "cumlogsumexp", "cumprod"}
SUMS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"}
LOOPS = ("scan", "while", "cond")
CODE = 64 << 20                         # bytes of a program
PACKED = 1.02                           # of what is alive, with the gaps between: 0.3 to 7 % in the programs of benchmarks/plan_memory.py
LARGE = 1 << 20                         # bytes from which on values are looked at one by one


class Live:
    """What one body has in memory beside what it is given."""

    def __init__(self, body: Body, top: bool = False, within: bool = False):
        self.body, self.top, self.within = body, top, within
        self.same: dict[Value, Value] = {}
        self.by: dict[Value, int] = {}
        self.given = {v: k for k, v in enumerate(body.inputs)}
        self.slices = set(body.inputs[body.constant + body.carried:]) if not top and body.carried + body.constant else set()
        self.made: set[Value] = set()
        self._roots: dict[Value, frozenset[Value]] = {}
        self.inner: dict[int, float] = {}
        self.loops: dict[int, list[Live]] = {}
        self._find_made()
        self._measure()

    def rep(self, v: Value) -> Value:
        while v in self.same:
            v = self.same[v]
        return v

    def _kind(self, op: Op) -> str:
        if op.name in ("enter", "leave"):
            return "same" if op.params["same"] else "alone"
        if op.name == "sharding_constraint":
            return "same" if op.inputs[0].bytes == op.outputs[0].bytes else "alone"
        if op.name == "dynamic_update_slice":
            return "same"
        if op.name in SAME:
            return "same"
        if op.name in ALONE:
            return "alone"
        if op.name in SUMS:
            return "sum"
        split = lambda v: any(v.axes)
        ins = [v for v in op.inputs if v.shape == op.outputs[0].shape]
        if op.name == "convert_element_type" and ins and split(op.outputs[0]) and not split(ins[0]) and ins[0] not in self.given:
            return "alone"              # summed over chips
        return "loop"

    def _find_made(self) -> None:
        self.kinds = []
        for at, op in enumerate(self.body.ops):
            kind = self._kind(op)
            self.kinds.append(kind)
            for v in op.outputs:
                self.by[v] = at
            if kind == "same":
                for a, b in zip(op.inputs, op.outputs):
                    self.same[b] = a
            if op.name == "optimization_barrier" or kind == "alone":
                narrow, constant = cast(op), range(op.bodies[0].constant if op.name in LOOPS and op.bodies else 0)
                for k, v in enumerate(op.inputs):
                    if k not in narrow and not (k in constant and self._one_number(v)):
                        self._make(self.rep(v))
            if kind in ("alone", "sum"):
                self.made.update(op.outputs)
        if not self.top:
            for v in self.body.outputs[:self.body.carried]:
                r = self.rep(v)
                if r not in self.given and not any(x in self.given for x in self.roots(r)):
                    self._make(r)
            self._roots.clear()

    def _make(self, v: Value) -> None:
        if v not in self.given or v in self.slices:
            self.made.add(v)

    def _one_number(self, v: Value) -> bool:
        """Whether all of it is one number: a loop makes that itself."""
        v = self.rep(v)
        while v in self.by and self.body.ops[self.by[v]].name in ("broadcast_in_dim", "convert_element_type"):
            v = self.rep(self.body.ops[self.by[v]].inputs[0])
        return math.prod(v.shape) == 1

    def roots(self, v: Value) -> frozenset[Value]:
        """The values in memory that this one is, or is fused from."""
        v = self.rep(v)
        if v not in self._roots:
            if v in self.made or v in self.given or v not in self.by:
                self._roots[v] = frozenset([v])
            else:
                self._roots[v] = frozenset().union(*(self.roots(x) for x in self.body.ops[self.by[v]].inputs))
        return self._roots[v]

    def _measure(self) -> None:
        ops = self.body.ops
        first: dict[object, int] = {}
        last: dict[object, int] = {}
        size: dict[object, float] = {}
        outs = self.outs = {self.rep(v) for v in self.body.outputs}
        for at, (op, kind) in enumerate(zip(ops, self.kinds)):
            runs = kind in ("alone", "sum") or any(v in self.made or v in outs for v in op.outputs)
            if runs:
                for v in op.inputs:
                    for r in self.roots(v):
                        last[r] = at
                        if r in self.slices and r in self.made:
                            first.setdefault(r, at)
            for v in op.inputs:
                if v.gathered and op.name == "dot_general":
                    key = ("gathered", self.rep(v))
                    first.setdefault(key, at)
                    last[key] = at
                    size[key] = gathered(v)
            for v in op.outputs:
                if v in self.made:
                    first[v], last[v] = at, at
                    size[v] = v.bytes
            for k, width in cast(op).items():
                v = op.inputs[k]
                key = ("cast", self.rep(v))
                first.setdefault(key, at)
                last[key], size[key] = at, v.bytes * width / v.width
            if op.name in LOOPS:
                self._loop(at, op, last, size)
        if not self.within:
            self._last_things(last)
        self._together(first, last, size)
        for r in list(last):
            if isinstance(r, Value) and r in self.slices and r in self.made:
                size[r] = r.bytes
        # What is given on stays; what a loop stacks, or takes the place of an argument, has its place outside.
        on = set(self.body.outputs if self.top else self.body.outputs[:self.body.carried])
        for v in on:
            if self.rep(v) in self.made:
                for r in self.roots(v) & size.keys():
                    last[r] = len(ops) - 1
        change = [0.0] * (len(ops) + 1)
        for key, bytes_ in size.items():
            if key in first:
                change[first[key]] += bytes_
                change[last[key] + 1] -= bytes_
        level, self.level = 0.0, []
        for at in range(len(ops)):
            level += change[at]
            self.level.append(level + self.inner.get(at, 0.0))
        self.at = max(range(len(ops)), key=self.level.__getitem__, default=0)
        self.peak = self.level[self.at] if ops else 0.0
        self.alive = sorted(((size[k], k) for k in size if k in first and first[k] <= self.at <= last[k]), key=lambda x: -x[0])

    def _last_things(self, last: dict) -> None:
        """Chips that run collectives apart do what no loop waits for after the last loop: the other loops, and weights' gradients."""
        loops = [k for k, op in enumerate(self.body.ops) if op.name == "scan" and op.bodies[0].carried]
        for at, op in enumerate(self.body.ops[:loops[-1]] if len(loops) > 1 else ()):
            if at in loops:
                late = not any(self._needs(w, v) for k in loops if k > at for w in self.body.ops[k].inputs for v in op.outputs)
            else:
                late = op.name == "dot_general" and sums_rows(op) or op.name == "conv_general_dilated" and rows_end(op)
            if late:
                for r in {r for v in op.inputs for r in self.roots(v)} & last.keys():
                    last[r] = max(last[r], loops[-1])

    def _together(self, first: dict, last: dict, size: dict) -> None:
        """Chains of one shape that read the same values are one operation, which gives all of their results at once.

        It may be the end of a product, whose result is then never in memory.  Results take the place of what is read for the last
        time, but not those of a product that a collective is run within.
        """
        for at, group in self._groups(first, size):
            sources = {r for v in group for r in self._sources(v)}
            for v in group:
                first[v], last[v] = at, max(last[v], at, self._put_off(v, at, len(group)))
            for r in sources & last.keys():
                last[r] = max(last[r], at)
            ending = [r for r in sources if last.get(r) == at and r in self.by and size.get(r) and r not in self.outs]
            ends = [r for r in ending if self._op(r).name == "dot_general" and r.local == group[0].local]
            if ends:
                product = max(ends, key=lambda r: self.by[r])
                ending.remove(product)
                size[product] = 0.0
                for v in self._op(product).inputs:
                    for r in (*self.roots(v), ("gathered", self.rep(v)), ("cast", self.rep(v))):
                        if r in last:
                            last[r] = max(last[r], at)
            if not (ends and self._carries(self._op(product))):
                room = [size[v] for v in group]
                for r in ending:
                    if size[r] in room:
                        room.remove(size[r])
                        last[r] = at - 1

    def _put_off(self, v: Value, at: int, of: int) -> int:
        """Until when a value is kept for gradients of weights: chips that run collectives apart compute those after the last kernel.

        That is so, in the schedules that were looked at, for what nothing else reads, and in layers without a gate for all.
        """
        if self.within:
            return at
        readers = [op for op in self.body.ops[self.by[v] + 1:] if op.name == "dot_general" and any(v in self.roots(x) for x in op.inputs)]
        for_weights = [sums_rows(op) for op in readers]
        if not (any(for_weights) if of == 2 else for_weights and all(for_weights)):
            return at
        return max((k for k, op in enumerate(self.body.ops) if op.name == "pallas_call"), default=at)

    def _carries(self, product: Op) -> bool:
        """Whether weights are gathered within it: other chips' parts of them come in meanwhile, unless they are thinner than a tile."""
        thick = lambda v: all(n >= 8 for n, part in zip(v.local, v.axes) if part)
        return self.within and any(v.gathered and thick(v) for v in product.inputs)

    def _groups(self, first: dict, size: dict) -> Iterator[tuple[int, list[Value]]]:
        """(the last of their operations, values)"""
        found: dict[tuple, list[tuple[int, Value]]] = {}
        for v in first:
            if isinstance(v, Value) and v in self.by and self.kinds[self.by[v]] == "loop" and size.get(v, 0.0) >= LARGE:
                found.setdefault(v.local, []).append((self.by[v], v))
        for same in found.values():
            same.sort(key=lambda x: x[0])
            while same:
                (at, v), group, rest = same[0], [same[0][1]], []
                for later, w in same[1:]:
                    if any(self._sources(x) & self._sources(w) for x in group) and not any(self._needs(w, x) for x in group):
                        group.append(w)
                        at = later
                    else:
                        rest.append((later, w))
                yield at, group
                same = rest

    def _op(self, v: Value) -> Op:
        return self.body.ops[self.by[v]]

    def _needs(self, w: Value, v: Value) -> bool:
        """Whether w is computed from v."""
        todo, seen = [w], set()
        while todo:
            one = self.rep(todo.pop())
            if one is v:
                return True
            if one not in seen and self.by.get(one, -1) > self.by[v]:
                seen.add(one)
                todo += self.body.ops[self.by[one]].inputs
        return False

    def _sources(self, v: Value) -> frozenset[Value]:
        """What the chain that makes this value reads."""
        large = lambda r: r.bytes >= LARGE
        return frozenset(filter(large, frozenset().union(*(self.roots(x) for x in self.body.ops[self.by[v]].inputs))))

    def _loop(self, at: int, op: Op, last: dict, size: dict) -> None:
        inner = [Live(b, within=self.within) for b in op.bodies]
        self.inner[at] = max((x.peak for x in inner), default=0.0)
        self.loops[at] = inner
        body = op.bodies[0]
        for k, v in enumerate(op.outputs[:body.carried]):
            start = self.rep(op.inputs[body.constant + k])
            if start in size and start.bytes == v.bytes and start not in self.given and self._dies(start, at):
                last[start] = at - 1

    def _dies(self, v: Value, at: int) -> bool:
        """Whether nothing reads it after this operation."""
        return not any(self.rep(x) is v for op in self.body.ops[at + 1:] for x in op.inputs)


def fixed(live: Live, known: Mapping[tuple[int, ...], Axes]) -> float:
    """Of the most that is alive, bytes that do not grow with the rows: gradients and weights, of all layers or one."""
    shapes = {*known, *(shape[1:] for shape in known)}
    here = sum(size for size, key in live.alive if not isinstance(key, Value) or key.shape in shapes)
    return here + max((fixed(inner, known) for inner in live.loops.get(live.at, [])), default=0.0)


def sums_rows(op: Op) -> bool:
    """Whether a product is a weight's gradient: a sum along what the rows are split by."""
    (lc, rc), _ = op.params["dimension_numbers"]
    return any(op.inputs[0].axes[x] and op.inputs[0].axes[x] == op.inputs[1].axes[y] for x, y in zip(lc, rc))


def rows_end(op: Op) -> bool:
    """Whether a convolution is a weight's gradient."""
    return any(map(any, (v.axes for v in op.inputs))) and not any(op.outputs[0].axes)


def gathered(v: Value) -> float:
    """Bytes of a weight that is whole but along the axis of heads and hidden units."""
    parts = [math.prod(v.sizes[a] for a in part if base(a) != "tensor") for part in v.axes]
    # Parts that end within a tile lie beside one another only where they are in none: then a number of 16 bits takes the room of 32.
    thin = len(v.shape) == 2 and v.width == 2 and any(n % 8 and k > 1 for n, k in zip(v.local, parts))
    return math.prod(v.local) * math.prod(parts) * (4 if thin else v.width)


def cast(op: Op) -> dict[int, float]:
    """{operand: bytes of a number} of what a loop takes layer by layer and only in fewer bits: that is made once, before it."""
    if op.name != "scan":
        return {}
    [body], out = op.bodies, {}
    for k in range(body.constant + body.carried, len(body.inputs)):
        users = [one for one in body.ops if body.inputs[k] in one.inputs]
        if users and all(one.name == "convert_element_type" and one.outputs[0].width < body.inputs[k].width for one in users):
            out[k] = users[0].outputs[0].width
    return out


@record
class Needs:
    """Bytes of one chip, found without the compiler."""

    parameters: float                   # trained and frozen
    optimizer: float                    # and the moving average
    batch: float
    gradients: float                    # of the temporaries at their most, those that lie as parameters do
    activations: float                  # kept from the forward pass, by loops over layers
    temporaries: float                  # all others
    code: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def read(program: Program) -> Body:
    """The step, at the sizes of one chip."""
    mesh = program.mesh.shape
    of = lambda x: axes_of(x.sharding.spec, x.ndim, mesh)
    arguments = jax.tree.leaves((program.state, program.batch, _key(program)))
    rows = next((a[0] for a in map(of, jax.tree.leaves(program.batch)) if a), ())
    return Reader(mesh, parameter_axes(program), rows).read(program.traced.jaxpr, [of(x) for x in arguments])


def living(program: Program) -> Live:
    """Of the step; chips without cores for collectives run them within products."""
    return Live(read(program), top=True, within="sparsecore" not in compiler.sets(program.layout.flags, program.mesh.devices.flat[0]))


def parameter_axes(program: Program) -> dict[tuple[int, ...], Axes]:
    shapes = program.blueprint.shapes.values()
    return {x.shape: axes_of(x.sharding.spec, len(x.shape), program.mesh.shape) for x in shapes if len(x.shape) > 1}


def needs(program: Program, live: Live | None = None) -> Needs:
    """What the step takes; `live` if it is known already."""
    live, state = live or living(program), program.state
    known, kinds = parameter_axes(program), dict.fromkeys(("gradients", "activations"), 0.0)
    for size, key in live.alive:
        if isinstance(key, Value) and key in live.by:
            kind = "gradients" if key.shape in known else "activations" if live.body.ops[live.by[key]].name == "scan" else None
            if kind:
                kinds[kind] += size
    return Needs(parameters=argument_bytes((state.params, state.frozen)), optimizer=argument_bytes((state.opt_state, state.ema, state.step)),
                 batch=argument_bytes(program.batch), temporaries=PACKED * live.peak - sum(kinds.values()), code=CODE, **kinds)


def argument_bytes(tree: object) -> float:
    """Of a chip's shards of shapes with shardings, as the compiler keeps them."""
    return sum(in_tiles(x.sharding.shard_shape(x.shape), jax.numpy.dtype(x.dtype).itemsize if x.ndim else 4) for x in jax.tree.leaves(tree))


def _key(program: Program) -> jax.ShapeDtypeStruct:
    key = program.traced.jaxpr.in_avals[-1]
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=jax.sharding.NamedSharding(program.mesh, jax.sharding.PartitionSpec()))
