"""What instructions of HLO do: operations of matmuls, bytes to and from memory, operations of the vector unit."""

import functools
import math
import re
from collections import defaultdict

from mllm_jax.chips import Chip
from mllm_jax.plan.hlo import COLLECTIVES, HBM, HOST, Array, Hlo, Instruction

FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "replica-id", "after-all", "opt-barrier",
        "add-dependency", "domain"}
# Operations of the vector unit for each element, where it is more than one; and what takes none.
SLOW = {"exponential": 2, "exponential-minus-one": 3, "log": 3, "log-plus-one": 4, "tanh": 4, "logistic": 4, "rsqrt": 2, "sqrt": 3,
        "power": 8, "cosine": 20, "sine": 20, "erf": 12, "divide": 4, "cbrt": 6, "atan2": 12}
MOVES = FREE | {"broadcast", "reshape", "slice", "dynamic-slice", "iota", "transpose", "copy", "concatenate", "pad", "fusion",
                "dynamic-update-slice", "custom-call", "convolution", "dot", "gather", "scatter", "while", "conditional", "call"}

# Terms of sums for which a matmul takes twice as long as its operations do, since each result goes through the vector unit: of the
# products of SigLIP and CLIP, by the cycles that the compiler expects.
SHORT = 480


class Work:
    """Answers about the instructions of one module, each found once."""

    def __init__(self, hlo: Hlo):
        self.hlo = hlo
        self._products: dict[str, list[tuple[str, Instruction]]] = {}
        self._traffic: dict[tuple[str, str], tuple[float, float, float]] = {}
        self._by: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}

    def products(self, computation: str, i: Instruction) -> list[tuple[str, Instruction]]:
        """The dots and convolutions that it is, or that are inside of a fusion or a call, each with its computation; loops are not entered."""
        if i.op in ("dot", "convolution"):
            return [(computation, i)]
        if i.op not in ("fusion", "call"):
            return []
        name = i.calls or i.called[0]
        if name not in self._products:
            self._products[name] = [product for j in self.hlo.body(name) for product in self.products(name, j)]
        return self._products[name]

    def flops(self, computation: str, i: Instruction) -> float:
        """Floating point operations of its products."""
        return sum((self._convolution if product.op == "convolution" else self._dot)(name, product)
                   for name, product in self.products(computation, i))

    def results(self, computation: str, i: Instruction) -> int:
        """Numbers that its products give."""
        return sum(product.arrays[0].elems for _, product in self.products(computation, i))

    def numbers(self, computation: str, i: Instruction) -> str:
        """Of what kind the eight bits are that its products read: "int8", "fp8"; "" where all are wider."""
        read = (self.hlo.operand(name, product, 0) for name, product in self.products(computation, i))
        return next(("int8" if x.dtype == "s8" else "fp8" for x in read if x and (x.dtype == "s8" or x.dtype.startswith("f8"))), "")

    def _dot(self, computation: str, i: Instruction) -> float:
        left, axes = self.hlo.operand(computation, i, 0), i.attr(r"lhs_contracting_dims=\{([0-9,]*)\}") or ""
        return 2.0 * i.arrays[0].elems * math.prod(left.dims[int(d)] for d in axes.split(",") if d) if left else 0.0

    def _convolution(self, computation: str, i: Instruction) -> float:
        """TPUs write every dot as one; only pairs of a window and a place that are not padding count."""
        left, right = (self.hlo.operand(computation, i, k) for k in (0, 1))
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attrs)
        if left is None or right is None or labels is None:
            return 0.0
        ins, kernel, outs = labels.groups()
        out, n = i.arrays[0], sum(c.isdigit() for c in outs)
        window = dict(re.findall(r"(\w+)=([\-\dx_]+)", i.attr(r"window=\{([^}]*)\}") or ""))
        each = lambda key, default: window[key].split("x") if key in window else [default] * n
        size, stride, dilate, spread = ([int(x) for x in each(k, "1")] for k in ("size", "stride", "lhs_dilate", "rhs_dilate"))
        pad = [int(x.split("_")[0]) for x in each("pad", "0_0")]
        places = math.prod(
            _valid(left.dims[ins.index(str(k))], out.dims[outs.index(str(k))], size[k], stride[k], dilate[k], spread[k], pad[k])
            for k in range(n))
        groups = int(i.attr(r"batch_group_count=(\d+)") or 1)
        return 2.0 * out.dims[outs.index("b")] * out.dims[outs.index("f")] * right.dims[kernel.index("i")] * places / groups

    def traffic(self, computation: str, i: Instruction) -> tuple[float, float, float]:
        """(bytes of HBM, bytes of the host's memory, operations of the vector unit)."""
        if i.op == "fusion":
            aliased = ""
            if "async_collective" in (i.calls or ""):
                aliased = ",".join(re.findall(r"\{(\d*)\}: \(\d+", i.attr(r"output_to_operand_aliasing=\{(.*?\)\s*)\}") or ""))
            return self.fused(i.calls, aliased)
        touched, outs = self.hlo.inputs(computation, i), list(i.arrays)
        if i.op in ("dynamic-slice", "slice", "gather"):
            touched = []
        if i.op == "dynamic-update-slice":
            update = self.hlo.get(computation, i.operands[1])
            touched = outs = list(update.arrays) if update else []
        vector = 0 if i.op in MOVES else SLOW.get(i.op, 1) * (i.arrays[0].elems if i.arrays else 0)
        return (sum(a.bytes for a in (*touched, *outs) if a.space == HBM), sum(a.bytes for a in (*touched, *outs) if a.space == HOST), vector)

    def fused(self, name: str, aliased: str = "") -> tuple[float, float, float]:
        """The same of a fused computation: slices and updates in place count what they touch.

        `aliased` numbers outputs that are inputs, by commas.
        """
        if (name, aliased) not in self._traffic:
            self._traffic[name, aliased] = self._fused(name, set(aliased.split(",")))
        return self._traffic[name, aliased]

    def _fused(self, name: str, aliased: set[str]) -> tuple[float, float, float]:
        body, total = self.hlo.body(name), {HBM: 0.0, HOST: 0.0}

        def add(a: Array, part: float = 1.0) -> None:
            if a.space in total:
                total[a.space] += a.bytes * part

        def write(name: str, i: Instruction | None, depth: int = 0) -> None:
            if i is None or depth > 6 or i.op == "parameter" or "AsyncCollective" in i.attrs:
                return
            if i.op == "tuple":
                for k, operand in enumerate(i.operands):
                    if str(k) not in aliased:
                        write(name, self.hlo.get(name, operand), depth + 1)
            elif i.op in ("bitcast", "reshape") and (j := self.hlo.get(name, i.operands[0])) and j.op in ("dynamic-update-slice", "fusion"):
                write(name, j, depth + 1)
            elif i.op == "fusion" and not i.shape.startswith("("):
                write(i.calls, next((j for j in self.hlo.body(i.calls) if j.root), None), depth + 1)
            elif i.op == "dynamic-update-slice" and (update := self.hlo.get(name, i.operands[1])):
                for a, b in zip(i.arrays, update.arrays):
                    add(Array(a.dtype, b.dims, a.space, b.bytes, b.elems))
            else:
                for a in i.arrays:
                    add(a)

        vector = 0.0
        for i in body:
            if i.op == "parameter":
                elements = self._read(name, i.name)
                for a in i.arrays:
                    add(a, min(1.0, elements / max(a.elems, 1)))
            elif i.op in ("reduce", "reduce-window"):
                first = self.hlo.operand(name, i, 0)
                vector += first.elems if first else 0
            elif i.op == "fusion":
                vector += self.fused(i.calls)[2]
            elif i.op not in MOVES and i.op not in COLLECTIVES and i.arrays:
                vector += SLOW.get(i.op, 1) * i.arrays[0].elems
        write(name, next((i for i in body if i.root), None))
        return total[HBM], total[HOST], vector

    def _read(self, name: str, parameter: str) -> float:
        """Elements of a parameter of a fused computation that are read; infinitely many stand for all.

        A layer's part of what all layers keep is often taken in a fusion inside the one of the product that reads it.
        """
        users = self._users(name)
        elements, todo = 0.0, list(users[parameter])
        while todo:
            user, k = todo.pop()
            if user.op in ("bitcast", "reshape"):
                todo += users[user.name]
            elif user.op in ("dynamic-slice", "slice", "gather") and k == 0:
                elements += sum(a.elems for a in user.arrays)
            elif user.op == "dynamic-update-slice" and k == 0:
                continue
            elif user.collective or user.op in ("tuple", "get-tuple-element") or "AsyncCollective" in user.attrs:
                continue
            elif user.op == "fusion":
                inner = next(i for i in self.hlo.body(user.calls) if i.op == "parameter" and i.inside == str(k))
                elements += self._read(user.calls, inner.name)
            else:
                return math.inf
        return elements

    def _users(self, name: str) -> dict[str, list[tuple[Instruction, int]]]:
        """Of each value of a computation, who reads it, and as which operand."""
        if name not in self._by:
            users = self._by[name] = defaultdict(list)
            for i in self.hlo.body(name):
                for k, operand in enumerate(i.operands):
                    users[operand].append((i, k))
        return self._by[name]


def program_flops(hlo: Hlo, turns: int = 1) -> float:
    """Operations of all matmuls of a module on one device; a body counts as often as it runs, of branches the longest.

    `turns` is the trip count of loops whose own depends on data.
    """
    work = Work(hlo)

    def total(name: str) -> float:
        found = 0.0
        for i in hlo.body(name):
            if i.op == "while":
                found += total(i.attr(r"body=%?([\w.\-<>]+)")) * (hlo.trips(i) or turns)
            elif i.op == "conditional":
                found += max(map(total, i.called), default=0.0)
            elif i.op == "call":
                found += total(i.called[0])
            elif not i.op.endswith("-done"):
                found += sum(map(total, i.called)) if i.op.endswith("-start") else work.flops(name, i)
        return found

    return total(hlo.entry)


def matmul(chip: Chip, flops: float, results: float, peak: float | None = None) -> float:
    """Seconds of a matmul for which the compiler gives no cycles; `peak` is that of its numbers, if it is not that for bfloat16."""
    short = SHORT / max(flops / 2 / max(results, 1), 1)
    # A result takes no longer where even fewer terms are summed.
    return flops / (peak or chip.peak) / chip.products * (1 + min(short, short**2))


def attention(chip: Chip, flops: float, pairs: float, *, backward: bool) -> tuple[float, float]:
    """(seconds, numbers of a head) of a kernel of nn/flash_kernel.py, by what it says of itself: operations, and pairs that it looks at."""
    width = flops / pairs / (10 if backward else 4)         # two products forward, five backward
    return pairs / 512**2 * chip.flash[backward] * max(width, 128) / 128 / chip.clock / chip.cores, width


@functools.lru_cache(None)
def _valid(left: int, out: int, size: int, stride: int, dilate: int, spread: int, pad: int) -> int:
    """Pairs of an output and a place of the window that meet an element which is there."""
    limit = (left - 1) * dilate + 1
    if dilate == 1 and spread == 1 and stride == 1 and pad == 0 and out + size - 1 <= left:
        return out * size
    return sum(1 for o in range(out) for k in range(size) if 0 <= (p := o * stride + k * spread - pad) < limit and p % dilate == 0)
