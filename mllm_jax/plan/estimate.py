"""How long a compiled TPU program takes: its schedule, replayed on the units of one chip.

    matmul fusions      the cycles that the compiler itself expects (it is right about these)
    everything else     the roofline of memory and vector unit, and an overhead for each operation
    collectives         plan/network.py, on the links, while the core works on what the schedule has between start and done
    loops               trip count x body
    splash attention    cycles of its blocks, from the kernel's bundle schedule

What is charged at a `done` is the wait alone.  Against the published MFU of MaxText's programs this is right to some
15 %, probably pessimistic.  Trip counts that depend on data are an assumption, which is noted.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mllm_jax.chips import Chip
from mllm_jax.plan.hlo import COLLECTIVES, HBM, HOST, Array, Hlo, Instruction, arrays, closing
from mllm_jax.plan.network import Cost, Network, inside
from mllm_jax.plan.work import FREE, Work, attention, matmul

ERROR = 0.15                            # of a step's time, either way: see the docstring
HBM_EFFICIENCY = 0.90                   # of the memory's rate; 0.95 where nothing but the sum of all transfers is known
OVERHEAD = 1e-6                         # s of an operation
SCALAR = 2e-7                           # s of one on a few numbers
COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start", "async-start", "call-start")
SPARSE_CORE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\S*call-(start|update)$")
KINDS = {"matmul": "compute", "pallas": "compute", "vector": "compute", "memory": "HBM", "layout": "HBM", "wait dma": "HBM",
         "wait ici": "ICI", "wait dcn": "DCN", "wait host": "host", "scalar": "compute"}


@dataclass
class Traffic:
    """Collectives of one kind along the same axes: of a chip, in a step."""

    bytes: float = 0.0
    busy: float = 0.0                   # s of the links
    exposed: float = 0.0                # of them, s in which nothing else was done
    count: float = 0.0
    dcn: bool = False


@dataclass
class Spent:
    seconds: float = 0.0
    count: float = 0.0
    flops: float = 0.0
    source: str = ""


@dataclass
class Estimate:
    """Of one step on one chip."""

    seconds: float = 0.0
    doubt: float = 0.0                  # s more, if the compiler is right about operations other than matmuls too
    flops: float = 0.0
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0             # between the chip and its host
    traffic: dict[tuple[str, tuple[str, ...]], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    spent: dict[tuple[str, str], Spent] = field(default_factory=lambda: defaultdict(Spent))     # (kind, operation)
    notes: Counter = field(default_factory=Counter)

    @property
    def low(self) -> float:
        return self.seconds * (1 - ERROR)

    @property
    def high(self) -> float:
        return max(self.seconds * (1 + ERROR), self.seconds + self.doubt)

    def by_kind(self) -> dict[str, float]:
        """Seconds by what the core did or waited for, the most first."""
        total: Counter[str] = Counter()
        for (kind, _), spent in self.spent.items():
            total[kind] += spent.seconds
        return dict(total.most_common())

    def by_unit(self) -> dict[str, float]:
        """Seconds by what sets them: compute, HBM, ICI, DCN or the link to the host."""
        total: Counter[str] = Counter()
        for kind, seconds in self.by_kind().items():
            total[KINDS[kind]] += seconds
        return dict(total.most_common())


class Replay:
    """One step of a program.

    `turns` is the trip count of loops whose own depends on data, `frames` {patches of a packed row: those of a frame}, which see no others.
    """

    def __init__(self, hlo: Hlo, chip: Chip, network: Network, turns: int = 1, frames: Mapping[int, int] = {}):
        self.hlo, self.chip, self.network, self.turns, self.frames = hlo, chip, network, turns, frames
        self.work, self.out, self.doubted = Work(hlo), Estimate(), 0.0
        self.out.seconds = self.run(hlo.entry, 1.0)

    def run(self, name: str, times: float) -> float:
        """Seconds of one turn of a computation, which runs so many times in a step."""
        turn = _Turn(self, name, times)
        for i in self.hlo.body(name):
            turn.take(i)
        seconds = max(turn.now, turn.hbm / (self.chip.hbm_rate * 0.95))
        self.out.hbm_bytes += turn.hbm * times
        if seconds > turn.now:
            self.out.spent["wait dma", "sum of transfers"].seconds += (seconds - turn.now) * times
        return seconds

    def trips(self, loop: Instruction) -> int:
        known = self.hlo.trips(loop)
        if known is not None:
            return known
        self.out.notes[f"a loop whose length depends on data was taken to run {self.turns} time{'s' * (self.turns != 1)}"] += 1
        return self.turns

    def seconds_of(self, name: str, i: Instruction) -> tuple[float, float, str, float]:
        """(seconds, operations, kind, bytes of HBM) of an instruction that is none of the others."""
        chip = self.chip
        if i.op in FREE:
            return 0.0, 0.0, "scalar", 0.0
        if kernel := _kernel(self.hlo, name, i):
            seconds, flops, moved = pallas(self, *kernel)
            return seconds + OVERHEAD, flops, "pallas", moved
        if i.op == "custom-call":
            return 0.0, 0.0, "scalar", 0.0
        flops = self.work.flops(name, i)
        if max((a.elems for a in i.arrays), default=0) <= 128 and not flops:
            return SCALAR, 0.0, "scalar", 0.0
        moved, _, vector = self.work.traffic(name, i)
        memory = moved / (chip.hbm_rate * HBM_EFFICIENCY)
        # 1,024 lanes, four operations in a bundle of which half are found.
        alu = vector / (1024 * 2.0 * chip.cores) / chip.clock
        roof = max(memory, alu) + OVERHEAD
        cycles = int(i.attr(r'"window_config":\{[^}]*?"estimated_cycles":"(\d+)"') or 0)
        if flops:
            trusted = cycles and ("COST_MODEL_TYPE_CLASSIC" in i.attrs or "COST_MODEL_TYPE_ML" in i.attrs)
            peak = chip.quantized.get(self.work.numbers(name, i), chip.peak)
            taken = max(cycles / chip.clock, memory) if trusted else max(matmul(chip, flops, self.work.results(name, i), peak), roof)
            return taken, flops, "matmul", moved
        self.doubted = max(0.0, cycles / chip.clock - roof)
        kind = "layout" if i.op in ("copy", "transpose", "reshape") else "vector" if alu > memory else "memory"
        return roof, 0.0, kind, moved


class _Turn:
    """One turn of one computation: the core's clock, when each other unit is free, and what is under way."""

    def __init__(self, replay: Replay, name: str, times: float):
        self.replay, self.name, self.times = replay, name, times
        self.hlo, self.out, self.chip = replay.hlo, replay.out, replay.chip
        self.now = self.hbm = 0.0
        self.free = dict.fromkeys(("ici", "dcn", "dma", "host"), 0.0)
        self.pending: dict[str, tuple[str, float, Traffic | None]] = {}     # instruction -> (unit, when it is done, ...)
        self.offloaded: dict[str, Instruction | None] = {}                  # start -> its collective, on the sparse core

    def take(self, i: Instruction) -> None:
        if not (self._start(i) or self._copy(i) or self._done(i) or self._collective(i) or self._control(i)):
            self.replay.doubted = 0.0
            seconds, flops, kind, moved = self.replay.seconds_of(self.name, i)
            self.now += seconds
            self.hbm += moved
            self.out.flops += flops * self.times
            self.out.doubt += self.replay.doubted * self.times
            self._spend(kind, i.name, seconds, flops, i.source)

    def _spend(self, kind: str, what: str, seconds: float, flops: float = 0.0, source: str = "") -> None:
        if seconds:
            row = self.out.spent[kind, what]
            row.seconds, row.count, row.flops = row.seconds + seconds * self.times, row.count + self.times, row.flops + flops * self.times
            row.source = source or row.source

    def _send(self, cost: Cost) -> tuple[str, float, Traffic]:
        """Puts a collective on its wires, behind what is there; (unit, when it is done, its row)."""
        unit = "dcn" if cost.dcn else "ici"
        self.free[unit] = max(self.now, self.free[unit]) + cost.seconds
        row = self.out.traffic[cost.kind, cost.axes]
        row.bytes, row.busy = row.bytes + cost.bytes * self.times, row.busy + cost.seconds * self.times
        row.count, row.dcn = row.count + self.times, cost.dcn
        return unit, self.free[unit], row

    def _wait(self, unit: str, until: float, row: Traffic | None, what: str) -> None:
        seconds = max(0.0, until - self.now)
        self.now += seconds
        if row is not None:
            row.exposed += seconds * self.times
        self._spend(f"wait {unit}", what, seconds)

    def _start(self, i: Instruction) -> bool:
        """A collective that goes on beside the core."""
        if i.op == "fusion" and i.name.startswith("async-collective-start"):
            found = inside(self.hlo, i)
        elif i.op == "async-start" or i.op == "send":
            found = inside(self.hlo, i) if i.op == "async-start" else i
        elif match := SPARSE_CORE.match(i.name) if i.op.startswith(("custom-call", "async")) else None:
            if match[2] == "start":
                self.offloaded[i.name] = inside(self.hlo, i)
            # The start waits where an update follows, which is what the schedule moves.
            updated = match[2] == "start" and self.hlo.get(self.name, i.name[:-5] + "update") is not None
            start = i.name if match[2] == "start" else next((o for o in i.operands if o in self.offloaded), None)
            if not updated and start and (found := self.offloaded.get(start)):
                self.pending[i.name] = self._send(self.replay.network.cost(found))
            return True
        else:
            found = i if i.op.endswith("-start") and i.collective else None
        if found is None:
            return False
        cost = self.replay.network.between(found) if found.op == "send" else self.replay.network.cost(found)
        if cost is not None:
            self.pending[i.name] = self._send(cost)
        return True

    def _copy(self, i: Instruction) -> bool:
        """A transfer beside the core, to or from the memory of chip or host."""
        if i.op not in COPIES:
            return False
        given, body = self.hlo.inputs(self.name, i), self.hlo.body(i.calls) if i.op == "async-start" else []
        if body:
            root = next(j for j in body if j.root)
            spaces, size = {a.space for a in (*given, *root.arrays)}, min(root.bytes, sum(a.bytes for a in given) or math.inf)
            if root.op == "dynamic-update-slice":
                size = self.hlo.operand(i.calls, root, 1).bytes
        elif i.shape.startswith("(("):              # ((operands ...), output, context)
            end = closing(i.shape, 1) + 1
            ins, outs = arrays(i.shape[1:end]), arrays(i.shape[end:])
            moved = ins[1] if i.op == "dynamic-update-slice-start" else outs[0]
            spaces, size = {ins[0].space, moved.space}, moved.bytes
        elif i.arrays:
            spaces, size = {a.space for a in i.arrays[:2]}, i.arrays[0].bytes
        else:
            return True
        unit, rate = ("host", self.chip.host_rate) if HOST in spaces else ("dma", self.chip.hbm_rate * HBM_EFFICIENCY)
        self.free[unit] = max(self.now, self.free[unit]) + size / rate
        self.pending[i.name] = (unit, self.free[unit], None)
        if unit == "host":
            self.out.host_bytes += size * self.times
        elif HBM in spaces:
            self.hbm += size
        return True

    def _done(self, i: Instruction) -> bool:
        """The end of what was started; the core waits."""
        fused = i.name.startswith("async-collective-done")
        if not (i.op.endswith("-done") or fused):
            return i.op == "recv"                   # which has its time with the send
        start = next((s for o in i.operands if (s := self._started(o))), None)
        if start is None and fused and (named := i.name.replace("done", "start")) in self.pending:
            start = named
        if start is not None:
            self._wait(*self.pending.pop(start), i.name)
        return True

    def _started(self, name: str | None) -> str | None:
        """The start that a value came from, through the fusions that go on with it in between."""
        for _ in range(64):
            if name is None or name in self.pending:
                return name
            i = self.hlo.get(self.name, name)
            name = i.operands[0] if i and i.operands and i.op in ("get-tuple-element", "fusion", "bitcast", "async-update") else None
        return None

    def _collective(self, i: Instruction) -> bool:
        """A collective that the core waits for."""
        if i.op in COLLECTIVES:
            self._wait(*self._send(self.replay.network.cost(i)), f"{i.op} {i.shape.strip('(').partition('{')[0]}")
            return True
        found = inside(self.hlo, i) if i.op == "fusion" and "async_collective" not in (i.calls or "") else None
        if found is None:
            return False
        cost = self.replay.network.cost(found, by=i)
        if cost.kind == "all-reduce":               # of which the fusion keeps a part: a reduce-scatter by another name
            cost = Cost(kind="reduce-scatter", axes=cost.axes, bytes=cost.bytes / 2, seconds=cost.seconds / 2)
        self._wait(*self._send(cost), f"{cost.kind} {i.shape.strip('(').partition('{')[0]}")
        return True

    def _control(self, i: Instruction) -> bool:
        if i.op == "while":
            trips = self.replay.trips(i)
            self.now += trips * self.replay.run(i.attr(r"body=%?([\w.\-<>]+)"), self.times * trips)
        elif i.op == "conditional":
            # Each branch is taken to run as often as the others; the clock takes the longest.
            self.now += max((self.replay.run(b, self.times / len(i.called)) for b in i.called), default=0.0)
            self.out.notes["of branches the longest was taken"] += 1
        elif i.op == "call":
            self.now += self.replay.run(i.called[0], self.times)
        else:
            return False
        return True


def _kernel(hlo: Hlo, name: str, i: Instruction) -> tuple[str, Instruction] | None:
    """(computation, instruction) of the Pallas kernel that this is; XLA fuses one with the update of an array that what it gives goes into."""
    if i.op == "fusion":
        return next(filter(None, (_kernel(hlo, i.calls, j) for j in hlo.body(i.calls))), None)
    return (name, i) if i.op == "custom-call" and "tpu_custom_call" in i.attrs else None


def pallas(replay: Replay, name: str, i: Instruction) -> tuple[float, float, float]:
    """(seconds, operations, bytes of HBM) of a kernel of ours or of jax."""
    chip, given = replay.chip, replay.hlo.inputs(name, i)
    moved = sum(a.bytes for a in (*given, *i.arrays) if a.space == HBM)
    memory = moved / (chip.hbm_rate * HBM_EFFICIENCY)
    big = [a for a in given if len(a.dims) >= 3 and a.dtype in ("bf16", "f32", "f16") and a.dims[-1] >= 16 and a.dims[-2] >= 128]
    said = {key: float(n) for key, n in re.findall(r'(flops|transcendentals)\\?"?:\s*\\?"?(\d+)', i.attr(r"cost_estimate(.*?\})") or "")}
    if ("flash_fwd" in i.name or "flash_bwd" in i.name) and said.get("transcendentals"):
        # nn/flash.py counts the pairs that are looked at, each with one exponential.
        seconds, width = attention(chip, said["flops"], said["transcendentals"], backward="flash_bwd" in i.name)
        part = _frames(replay, big, width, said["transcendentals"])
        replay.out.notes["attention was taken to need all pairs that are not ahead" if part == 1 else
                         "attention of packed patches was taken to need those of their own frame, and the blocks that it begins and ends in"] += 1
        return max(part * seconds, memory), part * said["flops"], moved
    if ("splash" in i.name or "flash" in i.name) and len(big) > 1:
        seconds, flops = splash(chip, i, big[0].dims, big[1].dims, causal=any(a.dtype == "s8" for a in given))
        replay.out.notes["splash attention was costed by its blocks, of which half are left out where it is causal"] += 1
        return max(seconds, memory), flops, moved
    if "flops" in said:
        return max(said["flops"] / chip.peak / 0.6, memory), said["flops"], moved
    replay.out.notes["a kernel without a cost was taken to be bound by memory: " + re.sub(r"[.\d]+$", "", i.name)] += 1
    return memory, 0.0, moved


def _frames(replay: Replay, big: Sequence[Array], width: float, pairs: float) -> float:
    """The part of the pairs of blocks that a kernel looks at where all might see all, but rows are packed with frames."""
    if not replay.frames:
        return 1.0
    queries, keys = math.prod(big[0].dims) / width, big[1].dims[-2]
    row = max(keys, big[0].dims[-2])                # of which the backward kernel may have a chunk of the keys
    frame = next((frame for n, frame in replay.frames.items() if n <= row < 2 * n), None)
    return 1.0 if frame is None or pairs < queries * keys else min(1.0, (frame + 2 * 512) / row)


def splash(chip: Chip, i: Instruction, q: tuple[int, ...], k: tuple[int, ...], *, causal: bool) -> tuple[float, float]:
    """(seconds, operations) of a splash kernel with queries [... s d] and keys [... t d]; causal kernels have masks of int8."""
    sizes = {key: int(n) for key, n in re.findall(r'\\?"(block_\w+)\\?": (\d+)', i.attrs)}
    heads, (s, width), t = math.prod(q[:-2]), q[-2:], k[-2]
    backward = "dkv" in i.name or "dq" in i.name
    suffix = "_dkv" if backward else ""
    bq, bk = min(sizes.get(f"block_q{suffix}") or 512, s), min(sizes.get(f"block_kv{suffix}") or 512, t)
    rows, columns = -(-s // bq), -(-t // bk)
    live = sum(min(columns, -(-((r + 1) * bq) // bk)) for r in range(rows)) if causal else rows * columns
    forward, step, row, back, back_step = chip.splash
    scale, wide = bq * bk / 512**2, max(width, 128) / 128
    if backward:
        matmuls = 5 if "dkv" in i.name else 3       # dkv makes dq too, unless it has a kernel of its own
        cycles = live * back * (1.0 if "dkv" in i.name else 0.6) * scale * wide + rows * columns * back_step
    else:
        matmuls, cycles = 2, live * forward * scale * wide + rows * columns * step + rows * row * bq / 512 * wide
    return heads * cycles / chip.clock / chip.cores, 2.0 * matmuls * heads * live * bq * bk * width
