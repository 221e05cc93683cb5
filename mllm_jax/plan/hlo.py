"""Optimised HLO as values: computations of instructions, shapes with their bytes in memory, trip counts, replica groups.

Reads what `Compiled.as_text()` prints.  For TPUs the text is scheduled: instructions stand in the order in which they run.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8, "s16": 16, "u16": 16, "f16": 16,
        "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")
HBM, HOST = 0, 5                        # memory spaces; all others are on the chip's core

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^{}]*)\})?")
_NAME = r"([\w.\-<>]+)"


@dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]
    space: int
    bytes: int                          # in memory: with the padding of its tiles
    elems: int


@functools.lru_cache(1 << 16)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, of a tuple one after another."""
    out = []
    for kind, sizes, layout in _ARRAY.findall(shape):
        if kind not in BITS:
            continue
        dims = tuple(int(d) for d in sizes.split(",") if d)
        padded, order = list(dims), [int(x) for x in re.match(r"[0-9,]*", layout).group().split(",") if x]
        if (tile := re.search(r"T\((\d+),(\d+)\)", layout)) and len(order) >= 2:
            for axis, size in ((order[0], int(tile[2])), (order[1], int(tile[1]))):
                padded[axis] = -(-dims[axis] // size) * size
        space = re.search(r"S\((\d+)\)", layout)
        out.append(Array(kind, dims, int(space[1]) if space else HBM, math.prod(padded) * BITS[kind] // 8, math.prod(dims)))
    return tuple(out)


@dataclass(eq=False)
class Instruction:
    name: str
    op: str
    shape: str
    operands: list[str]
    inside: str                         # of the parentheses
    attrs: str                          # behind them
    root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    def attr(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attrs)
        return found[1] if found else None

    @functools.cached_property
    def calls(self) -> str | None:
        return self.attr(rf"calls=%?{_NAME}")

    @functools.cached_property
    def called(self) -> list[str]:
        """Every computation that it names."""
        lists = re.findall(r"(?:called_computations|branch_computations)=\{([^}]*)\}", self.attrs)
        single = re.findall(rf"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?{_NAME}", self.attrs)
        return single + [name for each in lists for name in re.findall(rf"%?{_NAME}", each)]

    @property
    def collective(self) -> str | None:
        """The kind of collective that this starts or is, or None."""
        kind = self.op.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def source(self) -> str:
        """The jax operations that it came from."""
        return self.attr(r'op_name="([^"]*)"') or ""


class Hlo:
    """A module."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._parse(text)
        self._by_name = {c: {i.name: i for i in body} for c, body in self.computations.items()}

    def get(self, computation: str, name: str) -> Instruction | None:
        return self._by_name[computation].get(name)

    def operand(self, computation: str, i: Instruction, number: int) -> Array | None:
        """The first array of an operand."""
        j = self.get(computation, i.operands[number]) if number < len(i.operands) else None
        return j.arrays[0] if j is not None and j.arrays else None

    def inputs(self, computation: str, i: Instruction) -> list[Array]:
        return [a for name in i.operands if (j := self.get(computation, name)) for a in j.arrays]

    def body(self, computation: str | None) -> list[Instruction]:
        return self.computations.get(computation or "", [])

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs, or None where that depends on data."""
        if known := re.search(r"known_trip_count[^0-9]*(\d+)", loop.attrs):
            return int(known[1])
        # Otherwise it is the constant that a counter from zero is compared with; a comparison of two counters has none.
        def constants(computation: str | None) -> Iterator[int]:
            for i in self.body(computation):
                if i.op == "constant" and (number := re.fullmatch(r"\s*(-?\d+)\s*", i.inside)):
                    yield int(number[1])
                elif i.op == "fusion":
                    yield from constants(i.calls)
        found = list(constants(loop.attr(rf"condition=%?{_NAME}")))
        return max(1, *found) if found else None

    def _parse(self, text: str) -> None:
        current, pending = None, None
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{") and (head := re.match(rf"(ENTRY )?%?{_NAME} \(", line)):
                current = head[2]
                self.computations[current] = []
                self.entry = current if head[1] else self.entry
            elif current is None:
                continue
            elif line.startswith("}") and (pending is None or pending.count("{") == pending.count("}")):
                self._add(current, pending)
                current = pending = None
            elif re.match(rf"  (ROOT )?%?{_NAME} = ", line):
                self._add(current, pending)
                pending = line
            elif pending is not None:               # a long instruction goes on
                pending += " " + line

    def _add(self, computation: str, text: str | None) -> None:
        if text is None:
            return
        head = re.match(rf"\s*(ROOT )?%?{_NAME} = ", text)
        rest = text[head.end():]
        end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
        shape, rest = rest[:end], rest[end:].lstrip()
        left = rest.index("(")
        right = closing(rest, left)
        inside = rest[left + 1:right]
        self.computations[computation].append(Instruction(
            head[2], rest[:left], shape, re.findall(rf"%{_NAME}", inside), inside, rest[right + 1:], bool(head[1])))


def closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opens at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if depth == 0:
            return i
    return len(text) - 1


@functools.cache
def elements(shape: str) -> tuple[str, ...]:
    """The shapes of a tuple's elements; of an array itself."""
    if not shape.startswith("("):
        return (shape,)
    out, depth, start = [], 0, 1
    for k, c in enumerate(shape):
        depth += (c in "({[") - (c in ")}]")
        if depth == (1 if c == "," else 0) and c in ",)" and k > start:
            out.append(shape[start:k].strip())
            start = k + 1
    return tuple(out)


def replica_groups(i: Instruction, devices: int) -> np.ndarray:
    """int[groups members]: the devices that a collective joins, in the order of the program's device assignment.

    Written out ({{0,1},{2,3}}), as an iota list ([2,2]<=[4]) or by the axes of a mesh; none means all devices.
    """
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", i.attrs):
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])]
        pieces: list[int] = []          # the mesh again, with axes of which only a part is used split into three
        used: list[int] = []
        parts = {name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", mesh[2])}
        named = re.findall(r"'([^']+)'", mesh[2])
        for name, size in axes:
            if name in parts:
                before, part = parts[name]
                used.append(len(pieces) + 1)
                pieces += [before, part, size // before // part]
            else:
                if name in named:
                    used.append(len(pieces))
                pieces.append(size)
        ids = np.arange(math.prod(pieces)).reshape(pieces)
        rest = [k for k in range(len(pieces)) if k not in used]
        return ids.transpose(*rest, *used).reshape(-1, math.prod(pieces[k] for k in used))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attrs):
        shape, sizes, order = ([int(x) for x in text.split(",")] if text else None for text in iota.groups())
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order or range(len(sizes))).reshape(shape)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", i.attrs):
        return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.arange(devices)[None]


def permuted(i: Instruction) -> np.ndarray:
    """int[pairs 2]: source and target of a collective-permute."""
    text = i.attr(r"source_target_pairs=\{(.*?\})\}") or ""
    return np.array([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text)]).reshape(-1, 2)
