"""What fills the memory of a chip: arguments by kind, exactly, and temporaries by kind, as far as the schedule tells.

The compiler says how large all temporaries are together.  Which of them are gradients, and which are activations that
the forward pass keeps for the backward one, is read from the schedule: the values that are alive where most bytes are.
"""

import math
from collections import Counter
from collections.abc import Iterable

import jax
import numpy as np

from mllm_jax.plan.hlo import HBM, Hlo, Instruction, arrays, elements
from mllm_jax.plan.program import Compiled, Program
from mllm_jax.types import record

# Of these the result is (a part of) the first operand, or its operands side by side.
SAME = ("bitcast", "while", "opt-barrier", "add-dependency", "copy-done", "async-done", "async-update", "all-gather-done", "all-reduce-done",
        "collective-permute-done", "dynamic-update-slice", "optimization-barrier")


@record
class Memory:
    """Bytes of one chip."""

    parameters: int                     # trained and frozen
    optimizer: int                      # state of the optimizer, and the moving average
    batch: int
    gradients: int                      # of the temporaries at their most
    activations: int                    # kept from the forward pass for the backward pass
    temporaries: int                    # all others
    outputs: int                        # that do not take the place of an argument
    code: int
    host: int                           # in the memory of the host

    @property
    def total(self) -> int:
        return self.arguments + self.gradients + self.activations + self.temporaries + self.outputs + self.code

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer + self.batch

    def by_kind(self) -> dict[str, int]:
        return {k: v for k, v in vars(self).items() if k != "host"}


def shard_bytes(tree: object) -> int:
    """Bytes of one device's shards of arrays or of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jax.numpy.dtype(x.dtype).itemsize if x.ndim else 4 for x in jax.tree.leaves(tree))


def memory(compiled: Compiled) -> Memory:
    """Of a program that fits."""
    program, sizes = compiled.program, compiled.sizes
    state = program.state
    parameters, optimizer = shard_bytes((state.params, state.frozen)), shard_bytes((state.opt_state, state.ema, state.step))
    batch = sizes.arguments - parameters - optimizer        # as the compiler keeps it, with the padding of tiles
    found = classed(alive(compiled.hlo), program)
    known = sum(found.values())
    scale = min(1.0, sizes.temporaries / known) if known else 0.0
    gradients, activations = (round(scale * found[k]) for k in ("gradients", "activations"))
    return Memory(parameters=parameters, optimizer=optimizer, batch=max(0, batch), gradients=gradients, activations=activations,
                  temporaries=sizes.temporaries - gradients - activations, code=sizes.code, host=sizes.host, outputs=sizes.outputs - sizes.shared)


def classed(live: Iterable[tuple[int, Instruction]], program: Program) -> Counter:
    """{"gradients", "activations", "temporaries"}: bytes."""
    shapes = {tuple(sorted(x.sharding.shard_shape(x.shape))) for x in program.state.params.values() if x.ndim > 1}
    out: Counter[str] = Counter()
    for size, i in live:
        source, same = i.source, any(tuple(sorted(d for d in a.dims)) in shapes for a in i.arrays)
        if same and ("transpose(" in source or not source):
            out["gradients"] += size
        elif "jvp(" in source and "transpose(" not in source:
            out["activations"] += size
        else:
            out["temporaries"] += size
    return out


def alive(hlo: Hlo) -> list[tuple[int, Instruction]]:
    """(bytes, instruction that made it) of the temporaries of a scheduled module where they are most."""
    return _most(hlo, hlo.entry)[1]


def _most(hlo: Hlo, name: str) -> tuple[int, list[tuple[int, Instruction]]]:
    """The most bytes that are alive at once in a computation, beside its parameters and results, and what they are.

    A value is a list of buffers, one for each array of its shape; None for those that are not temporaries in HBM.
    """
    body = hlo.body(name)
    values: dict[str, list[int | None]] = {}
    made: list[tuple[int, Instruction]] = []        # buffer -> (bytes, by whom)
    first, last = [], []
    within: dict[int, tuple[int, list]] = {}
    for at, i in enumerate(body):
        count = len(arrays(i.shape))
        given = [b for o in i.operands for b in values.get(o, [])]
        for buffer in given:
            if buffer is not None:
                last[buffer] = at
        if i.op == "parameter" or i.op == "constant":
            values[i.name] = [None] * count
        elif i.op == "tuple":
            values[i.name] = given
        elif i.op == "get-tuple-element":
            values[i.name] = _element(hlo, name, i, values)
        elif i.op in SAME and len(given) >= count:
            values[i.name] = given[:count]
        elif i.op == "fusion" and (k := _in_place(hlo, i)) is not None and count == 1:
            values[i.name] = values.get(i.operands[k], [None])[:1]
        else:
            values[i.name] = []
            for a in arrays(i.shape):
                if a.space != HBM or a.elems <= 128:
                    values[i.name].append(None)
                    continue
                values[i.name].append(len(made))
                made.append((a.bytes, i))
                first.append(at)
                last.append(at)
        if i.op in ("while", "call", "conditional"):
            inner = [_most(hlo, c) for c in i.called]
            within[at] = max(inner, key=lambda x: x[0], default=(0, []))
    root = next((i for i in body if i.root), None)
    results = set(values.get(root.name, [])) if root else set()
    change = np.zeros(len(body) + 1, np.int64)
    for b, (size, _) in enumerate(made):
        if b not in results:
            change[first[b]] += size
            change[last[b] + 1] -= size
    level = np.cumsum(change[:-1])
    for at, (size, _) in within.items():
        level[at] += size
    if not len(level):
        return 0, []
    top = int(np.argmax(level))
    live = [one for b, one in enumerate(made) if b not in results and first[b] <= top <= last[b]]
    return int(level[top]), live + within.get(top, (0, []))[1]


def _element(hlo: Hlo, name: str, i: Instruction, values: dict[str, list[int | None]]) -> list[int | None]:
    of = hlo.get(name, i.operands[0])
    parts, index = elements(of.shape) if of else (), int(i.attr(r"index=(\d+)") or 0)
    start = sum(len(arrays(s)) for s in parts[:index])
    count = len(arrays(i.shape))
    found = values.get(i.operands[0], [])[start:start + count]
    return found + [None] * (count - len(found))


def _in_place(hlo: Hlo, fusion: Instruction) -> int | None:
    """The operand that a fusion updates where it is, or None."""
    body = {i.name: i for i in hlo.body(fusion.calls)}
    i = next((i for i in body.values() if i.root), None)
    while i is not None and i.op in ("bitcast", "dynamic-update-slice"):
        i = body.get(i.operands[0])
    return int(i.inside) if i is not None and i.op == "parameter" and i.inside.isdigit() else None
