"""What collectives cost: bytes that a chip sends, seconds on the wires, and along which mesh axes.

Inside a slice, rings over every side of the torus that a group spans, both ways around where the side closes; but one ring
through all the group, where the compiler notes that it chose that for a reduction.  A permutation waits for the link that most
of its messages pass.  Between slices libtpu exchanges through the hosts: a collective over both is one inside each slice, and
`send` and `recv` of the share of each chip.  A program of several slices names the devices of one.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mllm_jax.chips import Chip
from mllm_jax.plan.hlo import Array, Hlo, Instruction, permuted, replica_groups
from mllm_jax.types import record

EFFICIENCY = 0.95                       # of a link, of what its figure says
HOP = 1e-6                              # s from chip to chip
DCN_LATENCY = 5e-5                      # s between slices
ACROSS = ("data",)                      # the mesh axis between slices (sharding.Layout)


@record
class Cost:
    """Of one collective, for the chip that has most to do."""

    kind: str                           # "all-gather", ...
    axes: tuple[str, ...]               # of the mesh, along which its members differ
    bytes: float                        # that a chip sends
    seconds: float
    dcn: bool = False                   # between slices


class Network:
    """Devices in the order of the program, where they are in the torus, and in the mesh.

    Args:
      coords: of each device (x, y, z, slice).
      mesh: {axis: size}; the devices are in its order.
    """

    def __init__(self, chip: Chip, coords: Sequence[tuple[int, ...]], mesh: Mapping[str, int]):
        self.chip, self.mesh = chip, dict(mesh)
        places, coords = np.array(np.unravel_index(np.arange(len(coords)), tuple(mesh.values()))).T, np.asarray(coords)
        self.slices = len(set(coords[:, 3]))
        here = coords[:, 3] == coords[0, 3]
        self.coords, self.places = coords[here], places[here]
        self.sides = [len(set(self.coords[:, d])) for d in range(3)]

    def axes(self, members: np.ndarray) -> tuple[str, ...]:
        """The mesh axes along which these devices differ."""
        return tuple(name for k, name in enumerate(self.mesh) if len(set(self.places[members, k])) > 1)

    def along(self, axes: Sequence[str]) -> tuple[int, float]:
        """(chips that exchange along these axes, bytes/s that each can send), in the slice and order of the first."""
        names = list(self.mesh)
        fixed = [k for k, name in enumerate(names) if name not in axes]
        members = np.flatnonzero((self.places[:, fixed] == self.places[0, fixed]).all(axis=1))
        return len(members), self._links(members)[0]

    def cost(self, i: Instruction, by: Instruction | None = None) -> Cost:
        """Of a collective instruction, or of the one that starts it, inside a slice; `by` is the fusion that it stands in."""
        if i.collective == "collective-permute":
            return self._permute(i)
        members = replica_groups(i, len(self.coords))[0]
        n, kind, size = len(members), i.collective, sum(a.bytes for a in results(i))
        whole = size * n if kind == "reduce-scatter" else size          # of the array that is gathered, reduced or scattered
        rounds = 2 if kind == "all-reduce" else 1
        rate, hops = self._links(members)
        if (by or i).attr(r'"strategy":"(\w+)"') == "StrategyRing" and n > 2:
            rate, hops = min(rate, EFFICIENCY * 2 * self.chip.link), n / 2
        sent = rounds * whole * (n - 1) / n
        seconds = sent / rate
        if "all-to-all" in kind:
            # A quarter of all crosses the middle of the longest side, each way.
            longest = max(len(set(self.coords[members, d])) for d in range(3))
            seconds = whole * longest / 8 / (self.chip.link * EFFICIENCY)
        return Cost(kind=kind, axes=self.axes(members), bytes=sent, seconds=seconds + HOP * hops * rounds)

    def between(self, i: Instruction) -> Cost | None:
        """Of a `send` to other slices; None if it goes elsewhere."""
        found = i.attr(r'_xla_megascale_transfer_type="(\w+)"')
        if found is None or self.slices == 1:
            return None
        k, size = self.slices, i.arrays[0].bytes
        sent = size * {"ALL_REDUCE": 2 * (k - 1) / k, "ALL_GATHER": k - 1, "REDUCE_SCATTER": (k - 1) / k}.get(found, 1)
        return Cost(kind=found.lower().replace("_", "-"), axes=ACROSS, bytes=sent, seconds=sent / self.chip.dcn + DCN_LATENCY, dcn=True)

    def _links(self, members: np.ndarray) -> tuple[float, float]:
        """(bytes/s that a chip can send to the others of its group, hops to the farthest)."""
        spans = []
        for d, side in enumerate(self.sides):
            at = sorted(set(self.coords[members, d]))
            if len(at) > 1:
                apart = int(min(np.diff(at)))       # groups that lie between one another share the links
                spans.append((len(at) * apart, apart, len(at) * apart == side and side % self.chip.wraps_at == 0))
        if not spans:
            return 4 * self.chip.link, 1
        rate = sum(self.chip.link * (2 if ring else 1) / apart for _, apart, ring in spans)
        return EFFICIENCY * rate, sum(n / 2 if ring else n for n, _, ring in spans)

    def _permute(self, i: Instruction) -> Cost:
        pairs, size = permuted(i), sum(a.bytes for a in results(i))
        if not len(pairs):
            return Cost(kind="collective-permute", axes=(), bytes=0.0, seconds=0.0)
        hops, busiest = self._routes(self.coords[pairs[:, 0], :3], self.coords[pairs[:, 1], :3])
        differ = (self.places[pairs[:, 0]] != self.places[pairs[:, 1]]).any(axis=0)
        axes = tuple(name for name, there in zip(self.mesh, differ, strict=True) if there)
        return Cost(kind="collective-permute", axes=axes, bytes=size, seconds=size * busiest / (self.chip.link * EFFICIENCY) + HOP * hops)

    def _routes(self, at: np.ndarray, to: np.ndarray) -> tuple[int, int]:
        """(the most hops of a message, the most messages on a link) from int[n 3] to int[n 3]: along one side of the torus after another,
        the shorter way around where a side closes, and either where both are as long."""
        at, hops, taken = at.copy(), np.zeros(len(at), int), []
        for d, side in enumerate(self.sides):
            way = to[:, d] - at[:, d]
            if side % self.chip.wraps_at == 0:
                way = (way + side // 2) % side - side // 2
                way[(2 * way == -side) & (at[:, d] % 2 == 0)] = side // 2
            for step in range(np.max(np.abs(way), initial=0)):
                going = np.abs(way) > step
                taken.append(np.column_stack([at[going], np.full(going.sum(), d), np.sign(way[going])]))
                at[going, d] = (at[going, d] + np.sign(way[going])) % side
            hops += np.abs(way)
        links = np.unique(np.concatenate(taken), axis=0, return_counts=True)[1] if taken else np.zeros(0, int)
        return max(1, int(np.max(hops))), max(1, int(np.max(links, initial=0)))


def results(i: Instruction) -> list[Array]:
    """The arrays that a collective gives; a start names its operands first, and counters last."""
    arrays = list(i.arrays)
    if not i.op.endswith("-start"):
        return arrays
    if i.op == "collective-permute-start":
        return arrays[1:2] if len(arrays) > 1 else arrays
    big = [a for a in arrays if a.elems > 1]
    return big if i.op == "all-reduce-start" else big[len(big) // 2:]


def inside(hlo: Hlo, i: Instruction, depth: int = 0) -> Instruction | None:
    """The collective that the computations of an instruction hold, or those that they call."""
    for name in i.called:
        for j in hlo.body(name):
            found = j if j.collective else inside(hlo, j, depth + 1) if j.called and depth < 6 else None
            if found is not None:
                return found
    return None
