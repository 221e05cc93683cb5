"""Time of a step without compiling it: its products, what moves through memory and over links, each at its rate.

Good enough to put layouts in an order; the compiler's schedule (estimate.py) decides between the first of them.
"""

import math
from collections.abc import Mapping

from mllm_jax.nn.remat import NAMES
from mllm_jax.plan.analytic import Live
from mllm_jax.plan.network import DCN_LATENCY, Network
from mllm_jax.plan.topology import Chip
from mllm_jax.plan.traced import Op, Value, base, flat
from mllm_jax.plan.work import attention, matmul
from mllm_jax.types import record

MEMORY = 0.8                            # of its peak


@record
class Roof:
    """Seconds of a step, of each kind."""

    compute: float = 0.0                # products and kernels
    memory: float = 0.0                 # all else, by the bytes it moves
    gathers: float = 0.0                # of weights, over links
    sums: float = 0.0                   # of gradients, and of what is split along a contracted axis
    dcn: float = 0.0

    @property
    def seconds(self) -> float:
        """Weights are gathered beside the products; half of what is summed is waited for."""
        return max(self.compute + self.memory, self.gathers) + 0.5 * self.sums + 0.3 * self.dcn

    def __add__(self, other: "Roof") -> "Roof":
        return Roof(**{k: v + getattr(other, k) for k, v in vars(self).items()})

    def __mul__(self, factor: float) -> "Roof":
        return Roof(**{k: v * factor for k, v in vars(self).items()})


class Clock:
    """Costs on one kind of chip."""

    def __init__(self, chip: Chip, network: Network):
        self.chip, self.network = chip, network

    def body(self, live: Live) -> Roof:
        out, gathered = Roof(), set()
        for at, (op, kind) in enumerate(zip(live.body.ops, live.kinds)):
            if at in live.loops:
                turns = [self.body(inner) for inner in live.loops[at]]
                out += max(turns, key=lambda r: r.seconds, default=Roof()) * op.times
                continue
            if kind in ("alone", "sum") or any(v in live.made for v in op.outputs):
                out += self.op(op, live)
            for v in op.inputs:
                if op.name == "dot_general" and v.gathered and live.rep(v) not in gathered:
                    gathered.add(live.rep(v))
                    out += self.exchange(whole(v), [a for a in flat(v.axes) if base(a) != "tensor"], "gathers")
        return out

    def op(self, op: Op, live: Live) -> Roof:
        chip = self.chip
        if op.name == "pallas_call":
            return Roof(compute=self.kernel(op))
        moved = sum(v.bytes for v in op.outputs if v in live.made) + sum(r.bytes for r in {r for v in op.inputs for r in live.roots(v)})
        if op.name in ("gather", "scatter-add"):        # of a table only the rows that are asked for
            moved = 3 * min(sum(v.bytes for v in op.outputs), max(v.bytes for v in op.inputs[1:]))
        if op.name == "dot_general":
            seconds = max(matmul(chip, flops(op), math.prod(op.outputs[0].local)), moved / chip.hbm_rate / MEMORY)
            return Roof(compute=seconds) + self.summed(op)
        if op.name in ("psum", "reduce_scatter", "all_gather", "all_to_all"):
            axes = op.params.get("axes") or op.params["axis_name"]
            size = max(v.bytes for v in (*op.inputs, *op.outputs))
            return self.exchange(size * (2 if op.name == "psum" else 1), axes, "gathers" if op.name.startswith("all") else "sums")
        return Roof(memory=moved / chip.hbm_rate / MEMORY)

    def kernel(self, op: Op) -> float:
        chip, cost, name = self.chip, op.params.get("cost_estimate"), str(op.params.get("name"))
        if cost is None:
            return 0.0
        if "flash" in name and cost.transcendentals:
            return attention(chip, cost.flops, cost.transcendentals, backward="bwd" in name)[0]
        return cost.flops / chip.peak / 0.6

    def summed(self, op: Op) -> Roof:
        """Of a product along an axis that is split: what every chip has is a part of the sum."""
        (lc, rc), _ = op.params["dimension_numbers"]
        left, right = op.inputs[:2]
        axes = {base(a) for x, y in zip(lc, rc) for a in left.axes[x] if a in right.axes[y]}
        axes |= {base(a) for x, y in zip(lc, rc) for a in (*left.axes[x], *right.axes[y]) if base(a) == "tensor"}
        return self.exchange(2 * op.outputs[0].bytes, sorted(axes), "sums") if axes else Roof()

    def exchange(self, size: float, axes: object, kind: str) -> Roof:
        """So many bytes, gathered or summed along mesh axes."""
        axes = [a for a in map(base, [axes] if isinstance(axes, str) else axes) if self.network.mesh.get(a, 1) > 1]
        if not axes:
            return Roof()
        n, rate = self.network.along(axes)
        slices = self.network.slices if "data" in axes else 1
        across = Roof(dcn=size / n * (slices - 1) / slices / self.chip.dcn + DCN_LATENCY) if slices > 1 else Roof()
        return across + (Roof(**{kind: size * (n - 1) / n / rate}) if n > 1 else Roof())


def whole(v: Value) -> float:
    """Bytes of a value when it is gathered, but along the axis of heads and hidden units."""
    return v.bytes * math.prod(v.sizes[a] for a in flat(v.axes) if base(a) != "tensor")


def flops(op: Op) -> float:
    """Operations of a product on one chip."""
    (lc, rc), _ = op.params["dimension_numbers"]
    left, right = op.inputs[:2]
    inner = math.prod(max(left.local[x], right.local[y]) for x, y in zip(lc, rc))
    return 2.0 * math.prod(op.outputs[0].local) * inner


def kept(live: Live, clock: Clock, times: float = 1.0) -> Mapping[str, tuple[float, float]]:
    """{name: (bytes of all layers, seconds of making them again)} of what a policy may keep, of a step that keeps nothing."""
    out = dict.fromkeys(NAMES, (0.0, 0.0))
    for at, op in enumerate(live.body.ops):
        for inner in live.loops.get(at, []):
            for name, (size, seconds) in kept(inner, clock, times * op.times).items():
                out[name] = out[name][0] + size, out[name][1] + seconds
        if op.name == "name" and op.again and op.params["name"] in out and times > 1:
            name, made = op.params["name"], [live.body.ops[live.by[r]] for r in live.roots(op.inputs[0]) if r in live.by]
            seconds = sum(clock.op(one, live).compute for one in made if one.name in ("dot_general", "pallas_call"))
            # Of several results of a kernel the largest stands for all.
            small = op.outputs[0].width == 4 and name == "attention"
            out[name] = out[name][0] + op.outputs[0].bytes * times, out[name][1] + (0.0 if small else seconds * times)
    return out
