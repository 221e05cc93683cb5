"""Bytes and seconds of collectives against hand counts on a torus, and the mesh axes that they go along."""

import pytest

from mllm_jax.chips import CHIPS
from mllm_jax.plan.hlo import Instruction
from mllm_jax.plan.network import DCN_LATENCY, EFFICIENCY, HOP, Network

V5E = CHIPS["v5e"]
TORUS = [(x, y, 0, 0) for x in range(16) for y in range(16)]
MIB = 1 << 20


def collective(op: str, shape: str, groups: str) -> Instruction:
    return Instruction("c", op, shape, [], "", f", replica_groups={groups}", False)


def test_a_gather_along_a_side_that_closes_goes_both_ways_around():
    network = Network(V5E, TORUS, {"data": 16, "fsdp": 16})
    cost = network.cost(collective("all-gather", "bf16[16,1024,512]{2,1,0}", "[16,16]<=[256]"))
    assert (cost.kind, cost.axes, cost.bytes) == ("all-gather", ("fsdp",), 16 * MIB * 15 / 16)
    assert cost.seconds == pytest.approx(cost.bytes / (2 * 45e9 * EFFICIENCY) + 8 * HOP)


def test_a_line_has_half_of_it_and_a_reduction_two_rounds():
    network = Network(V5E, [(x, y, 0, 0) for x in range(4) for y in range(8)], {"fsdp": 4, "tensor": 8})
    sum_ = network.cost(collective("all-reduce", "f32[1024,1024]{1,0}", "[4,8]<=[32]"))
    assert (sum_.axes, sum_.bytes) == (("tensor",), 2 * 4 * MIB * 7 / 8)
    assert sum_.seconds == pytest.approx(sum_.bytes / (45e9 * EFFICIENCY) + 2 * 8 * HOP)
    part = network.cost(collective("reduce-scatter", "f32[128,1024]{1,0}", "[4,8]<=[32]"))
    assert part.bytes == sum_.bytes / 2


def test_a_group_over_both_sides_has_all_four_links():
    network = Network(V5E, TORUS, {"data": 1, "fsdp": 256})
    cost = network.cost(collective("all-gather", "bf16[256,1024,128]{2,1,0}", "mesh['axis_0'=256] {'axis_0'}"))
    assert cost.axes == ("fsdp",)
    assert cost.seconds == pytest.approx(64 * MIB * 255 / 256 / (4 * 45e9 * EFFICIENCY) + 16 * HOP)


def test_a_reduction_that_the_compiler_sends_round_one_ring_has_its_two_links():
    """Of six, on a torus that closes at four chips; where the compiler says nothing, all."""
    cube = Network(CHIPS["v5p"], [(x, y, z, 0) for x in range(4) for y in range(4) for z in range(4)], {"fsdp": 64})
    scattered = collective("reduce-scatter", "bf16[64,4096]{1,0}", "[1,64]<=[64]")
    ring = Instruction("f", "fusion", scattered.shape, [], "", ', backend_config={"emitter":"E","strategy":"StrategyRing"}', False)
    assert cube.cost(scattered).seconds == pytest.approx(32 * MIB * 63 / 64 / (6 * 90e9 * EFFICIENCY) + 6 * HOP)
    assert cube.cost(scattered, by=ring).seconds == pytest.approx(32 * MIB * 63 / 64 / (2 * 90e9 * EFFICIENCY) + 32 * HOP)


def test_groups_that_lie_between_one_another_share_their_links():
    """A side of 16 as 4 x 4: four neighbours are a line; every fourth chip makes a ring, of which there are four on the same wires."""
    network = Network(V5E, [(x, 0, 0, 0) for x in range(16)], {"data": 4, "fsdp": 4})
    near = network.cost(collective("all-gather", "bf16[1024,512]{1,0}", "[4,4]<=[16]"))
    far = network.cost(collective("all-gather", "bf16[1024,512]{1,0}", "[4,4]<=[4,4]T(1,0)"))
    assert (near.axes, far.axes) == (("fsdp",), ("data",))
    assert near.seconds == pytest.approx(near.bytes / (45e9 * EFFICIENCY) + 4 * HOP)
    assert far.seconds == pytest.approx(far.bytes / (2 / 4 * 45e9 * EFFICIENCY) + 8 * HOP)


@pytest.mark.parametrize(("groups", "axes"), [
    ("[8,4]<=[8,4]", ("tensor",)), ("[8,4]<=[2,4,4]T(0,2,1)", ("fsdp",)), ("[16,2]<=[2,16]T(1,0)", ("data",)), ("[2,16]<=[32]", ("fsdp", "tensor")),
    ("[1,32]<=[32]", ("data", "fsdp", "tensor"))])
def test_the_axes_are_those_along_which_members_differ(groups, axes):
    network = Network(V5E, [(x, y, 0, 0) for x in range(4) for y in range(8)], {"data": 2, "fsdp": 4, "tensor": 4})
    assert network.cost(collective("all-gather", "f32[64,64]{1,0}", groups)).axes == axes


def test_a_permutation_takes_the_shorter_way_around():
    network = Network(V5E, TORUS, {"data": 16, "fsdp": 16})
    ring = ",".join(f"{{{k},{k - k % 16 + (k + 1) % 16}}}" for k in range(256))
    i = Instruction("c", "collective-permute", "f32[1024,1024]{1,0}", [], "", f", source_target_pairs={{{ring}}}", False)
    cost = network.cost(i)
    assert (cost.axes, cost.bytes) == (("fsdp",), 4 * MIB)
    assert cost.seconds == pytest.approx(4 * MIB / (45e9 * EFFICIENCY) + HOP)


@pytest.mark.parametrize(("chip", "sides", "ring", "load", "hops"), [
    ("v5e", (8, 8), lambda k: (k + 1) % 64, 1, 14),             # the end of each line goes back along it, against all others; the last one home
    ("v5e", (8, 1), lambda k: (k + 4) % 8, 4, 4),               # four cross the middle, each way
    ("v5e", (16, 1), lambda k: (k + 8) % 16, 4, 8),             # and one side of two, where the line closes: both ways are as long
    ("v5e", (4, 4), lambda k: k // 4 + k % 4 * 4, 3, 6),        # columns for lines: three of a line turn at its end
    ("v5e", (8, 1), lambda k: k, 1, 1)])
def test_a_permutation_waits_for_its_busiest_link(chip, sides, ring, load, hops):
    n = sides[0] * sides[1]
    network = Network(CHIPS[chip], [(k % sides[0], k // sides[0], 0, 0) for k in range(n)], {"fsdp": n})
    pairs = ",".join(f"{{{k},{ring(k)}}}" for k in range(n))
    i = Instruction("c", "collective-permute", "f32[1024,1024]{1,0}", [], "", f", source_target_pairs={{{pairs}}}", False)
    assert network.cost(i).seconds == pytest.approx(load * 4 * MIB / (45e9 * EFFICIENCY) + hops * HOP)


def test_between_slices_a_chip_sends_its_share():
    """A program of several slices names the devices of one; `send` says what goes to the others."""
    network = Network(V5E, [(x, y, 0, s) for s in range(4) for x in range(2) for y in range(2)], {"data": 4, "fsdp": 4})
    here = network.cost(collective("all-gather", "f32[1024,1024]{1,0}", "{{0,1,2,3}}"))
    assert here.axes == ("fsdp",)
    send = Instruction("s", "send", "(f32[512,512]{1,0}, u32[], token[])", [], "", ', _xla_megascale_transfer_type="ALL_REDUCE"', False)
    cost = network.between(send)
    assert (cost.kind, cost.axes, cost.dcn, cost.bytes) == ("all-reduce", ("data",), True, 2 * MIB * 3 / 4)
    assert cost.seconds == pytest.approx(cost.bytes / V5E.dcn + DCN_LATENCY)
