"""The replay of a schedule against times worked out by hand."""

import pytest

from mllm_jax.chips import CHIPS
from mllm_jax.plan.estimate import HBM_EFFICIENCY, OVERHEAD, Replay
from mllm_jax.plan.hlo import Hlo
from mllm_jax.plan.memory import alive
from mllm_jax.plan.network import EFFICIENCY, HOP, Network
from mllm_jax.plan.work import SHORT, Work

V5E = CHIPS["v5e"]
NET = Network(V5E, [(x, 0, 0, 0) for x in range(4)], {"fsdp": 4})
BIG = "f32[2048,2048]{1,0}"
SIZE = 4 * 2048 * 2048
CYCLES = '"window_config":{"estimated_cycles":"1500000","cost_model_type":"COST_MODEL_TYPE_CLASSIC"}'     # a millisecond
MATMUL = """%product (a: f32[2048,2048], b: f32[2048,2048]) -> f32[2048,2048] {
  %a = f32[2048,2048]{1,0} parameter(0)
  %b = f32[2048,2048]{1,0} parameter(1)
  ROOT %dot = f32[2048,2048]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
GATHER = 4 * SIZE / 4 * 3 / 4 / (V5E.link * EFFICIENCY) + 4 * HOP


def replay(body: str, others: str = MATMUL, turns: int = 1):
    hlo = Hlo(f"HloModule m, is_scheduled=true\n\n{others}\nENTRY %main (x: {BIG[:14]}) -> {BIG[:14]} {{\n  %x = {BIG} parameter(0)\n{body}}}\n")
    return Replay(hlo, V5E, NET, turns).out


def product(name: str, x: str = "x", root: bool = False) -> str:
    return f"  {'ROOT ' * root}%{name} = {BIG} fusion(%{x}, %{x}), kind=kOutput, calls=%product, backend_config={{{CYCLES}}}\n"


def test_a_product_takes_the_cycles_that_the_compiler_expects():
    out = replay(product("y", root=True))
    assert (out.seconds, out.flops) == (pytest.approx(1e-3), 2 * 2048**3)
    assert out.by_unit() == {"compute": pytest.approx(1e-3)}


@pytest.mark.parametrize(("bits", "rate", "terms"), [
    ("f32", V5E.peak, 4096), ("s8", V5E.quantized["int8"], 4096), ("f32", V5E.peak, SHORT), ("f32", V5E.peak, SHORT // 4)])
def test_a_product_of_which_nothing_is_expected_takes_a_part_of_the_peak_of_its_numbers(bits, rate, terms):
    """And its results some time too: as much as the sums where these have few terms, and no more each where they have fewer."""
    big, wide = f"{bits}[{terms},4096]{{1,0}}", "f32[4096,4096]{1,0}"
    ends = "lhs_contracting_dims={0}, rhs_contracting_dims={0}"
    out = Replay(Hlo(f"HloModule m, is_scheduled=true\n\nENTRY %main (x: {big[:-5]}) -> {wide[:-5]} {{\n  %x = {big} parameter(0)\n"
                     f"  ROOT %y = {wide} dot(%x, %x), {ends}\n}}\n"), V5E, NET).out
    sums, results = 2 * terms * 4096**2 / rate / V5E.products, {4096: (SHORT / 4096) ** 2, SHORT: 1, SHORT // 4: 4}[terms]
    assert (out.seconds, out.flops) == (pytest.approx(sums * (1 + results)), 2 * terms * 4096**2)


def test_what_is_no_product_takes_its_bytes():
    out = replay(f"  ROOT %y = {BIG} add(%x, %x)\n")
    assert out.seconds == pytest.approx(3 * SIZE / (V5E.hbm_rate * HBM_EFFICIENCY) + OVERHEAD)
    assert list(out.by_unit()) == ["HBM"]


def test_a_layer_of_what_all_keep_is_what_a_fusion_reads_and_writes_also_through_one_inside_it():
    """XLA nests the slice of a stack in the product that reads it: not the stack of eight layers is moved, but one."""
    stack, one = "f32[8,256,256]{2,1,0}", "f32[1,256,256]{2,1,0}"
    take = f"""%take (s: {stack[:-7]}, k: s32[]) -> {one[:-7]} {{
  %s = {stack} parameter(0)
  %k = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = {one} dynamic-slice(%s, %k, %z, %z), dynamic_slice_sizes={{1,256,256}}
}}
"""
    put = f"""%put (s: {stack[:-7]}, x: {one[:-7]}, k: s32[]) -> {stack[:-7]} {{
  %s = {stack} parameter(0)
  %x = {one} parameter(1)
  %k = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %u = {stack} dynamic-update-slice(%s, %x, %k, %z, %z)
}}
"""
    outer = f"""%outer (s: {stack[:-7]}, t: {stack[:-7]}, k: s32[]) -> {stack[:-7]} {{
  %s = {stack} parameter(0)
  %t = {stack} parameter(1)
  %k = s32[] parameter(2)
  %layer = {one} fusion(%s, %k), kind=kLoop, calls=%take
  %twice = {one} add(%layer, %layer)
  ROOT %out = {stack} fusion(%t, %twice, %k), kind=kLoop, calls=%put
}}
"""
    main = f"ENTRY %main (x: {stack[:-7]}) -> {stack[:-7]} {{\n  %x = {stack} parameter(0)\n  %k = s32[] constant(3)\n"
    call = f"  ROOT %y = {stack} fusion(%x, %x, %k), kind=kLoop, calls=%outer\n}}\n"
    hlo = Hlo("\n".join(["HloModule m, is_scheduled=true\n", take, put, outer, main + call]))
    # The layer that is read, the one that is written, and the word that says which.
    assert Work(hlo).fused("outer")[0] == pytest.approx(2 * 256 * 256 * 4, abs=8)


def test_a_gather_costs_what_the_products_beside_it_leave():
    start = f"  %s = (f32[512,2048]{{1,0}}, {BIG}) all-gather-start(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}\n"
    done = f"  ROOT %d = {BIG} all-gather-done(%s)\n"
    alone, beside = replay(start + done), replay(start + product("y") + done)
    assert alone.seconds == pytest.approx(GATHER)
    row = alone.traffic["all-gather", ("fsdp",)]
    assert (row.bytes, row.busy, row.exposed) == (SIZE * 3 / 4, pytest.approx(GATHER), pytest.approx(GATHER))
    assert beside.seconds == pytest.approx(max(1e-3, GATHER)) and GATHER < 1e-3
    assert beside.traffic["all-gather", ("fsdp",)].exposed == 0


def test_wires_are_used_by_one_collective_after_the_other():
    start = "".join(f"  %s{k} = (f32[512,2048]{{1,0}}, {BIG}) all-gather-start(%x), replica_groups={{{{0,1,2,3}}}}\n" for k in (1, 2))
    out = replay(start + f"  %d1 = {BIG} all-gather-done(%s1)\n  ROOT %d2 = {BIG} all-gather-done(%s2)\n")
    assert out.seconds == pytest.approx(2 * GATHER)


LOOP = MATMUL + """
%body (p: (s32[], f32[2048,2048])) -> (s32[], f32[2048,2048]) {
  %p = (s32[], f32[2048,2048]{1,0}) parameter(0)
  %x = f32[2048,2048]{1,0} get-tuple-element(%p), index=1
  %k = s32[] get-tuple-element(%p), index=0
  %y = f32[2048,2048]{1,0} fusion(%x, %x), kind=kOutput, calls=%product, backend_config={CYCLES}
  ROOT %t = (s32[], f32[2048,2048]{1,0}) tuple(%k, %y)
}

%condition (p: (s32[], f32[2048,2048])) -> pred[] {
  %p = (s32[], f32[2048,2048]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%p), index=0
  %n = s32[] BOUND
  ROOT %lt = pred[] compare(%k, %n), direction=LT
}
""".replace("CYCLES", f"{{{CYCLES}}}")
WHILE = ("  %z = s32[] constant(0)\n  %t = (s32[], f32[2048,2048]{1,0}) tuple(%z, %x)\n"
         "  %w = (s32[], f32[2048,2048]{1,0}) while(%t), condition=%condition, body=%bodyKNOWN\n"
         "  ROOT %y = f32[2048,2048]{1,0} get-tuple-element(%w), index=1\n")


@pytest.mark.parametrize(("known", "bound", "turns", "times"), [
    (', backend_config={"known_trip_count":{"n":"7"}}', "constant(9)", 1, 7), ("", "constant(9)", 1, 9),
    ("", "get-tuple-element(%p), index=0", 3, 3)])
def test_a_loop_takes_its_turns(known, bound, turns, times):
    out = replay(WHILE.replace("KNOWN", known), LOOP.replace("BOUND", bound), turns)
    # Besides, a turn compares two numbers.
    assert out.seconds == pytest.approx(times * 1e-3, rel=1e-3)
    assert out.flops == times * 2 * 2048**3
    assert bool(out.notes) == (turns == 3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kernel", "products", "cycles"), [("flash_fwd", 2, 1452), ("transpose_jvp_flash_bwd__", 5, 2855)])
def test_attention_takes_cycles_for_each_pair_of_blocks(kernel, products, cycles, fused):
    """Of 32 heads with half of 2048 x 2048 pairs; also where XLA made one fusion of it and the update of what all layers keep."""
    pairs = 32 * 2048**2 // 2
    cost = f'"cost_estimate":{{"flops":"{2 * products * pairs * 128}","transcendentals":"{pairs}","bytes_accessed":"1"}}'
    shape = "bf16[1,32,2048,128]{3,2,1,0}"
    call = f'  ROOT %{kernel}.1 = {shape} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={{{cost}}}\n'
    if fused:
        inside = f"%kept (x: {BIG[:14]}) -> {shape[:-9]} {{\n  %x = {BIG} parameter(0)\n{call}}}\n"
        out = replay(f"  ROOT %{kernel}.2 = {shape} fusion(%x), kind=kCustom, calls=%kept\n", inside)
    else:
        out = replay(call)
    assert out.flops == 2 * products * pairs * 128
    assert out.seconds == pytest.approx(32 * 8 * cycles / V5E.clock + OVERHEAD)


@pytest.mark.parametrize(("chunk", "share", "part"), [(8192, 1.0, (576 + 1024) / 8192), (2048, 1.0, (576 + 1024) / 8192), (8192, 0.5, 1.0)])
def test_packed_patches_see_those_of_their_frame(chunk, share, part):
    """Of 8,192 patches in frames of 576: whole blocks of a frame's neighbourhood, of all keys or of a chunk; a causal kernel of that length
    is none of patches."""
    rows, keys, pairs = "bf16[1,16,8192,128]{3,2,1,0}", f"bf16[1,16,{chunk},128]{{3,2,1,0}}", 16 * 8192 * chunk * share
    cost = f'"cost_estimate":{{"flops":"{512 * pairs:.0f}","transcendentals":"{pairs:.0f}","bytes_accessed":"1"}}'
    text = (f"HloModule m, is_scheduled=true\n\nENTRY %main (x: {rows[:-10]}) -> {rows[:-10]} {{\n  %x = {rows} parameter(0)\n"
            f'  %y = {keys} constant(0)\n'
            f'  ROOT %flash_fwd.1 = {rows} custom-call(%x, %y), custom_call_target="tpu_custom_call", backend_config={{{cost}}}\n}}\n')
    out = Replay(Hlo(text), V5E, NET, frames={8192: 576}).out
    assert out.seconds == pytest.approx(part * pairs / 512**2 * V5E.flash[0] / V5E.clock + OVERHEAD)
    assert out.flops == pytest.approx(part * 512 * pairs, abs=512)


def test_error_bars_hold_the_estimate():
    out = replay(product("y", root=True))
    assert out.low == pytest.approx(0.85e-3) and out.high == pytest.approx(1.15e-3)


def test_alive_where_most_is_are_the_values_still_wanted():
    """Two sums of a first one: it and one of them are there at once, the result is not a temporary."""
    hlo = Hlo(f"HloModule m, is_scheduled=true\n\nENTRY %main (x: {BIG[:14]}) -> {BIG[:14]} {{\n  %x = {BIG} parameter(0)\n"
              f"  %a = {BIG} add(%x, %x)\n  %b = {BIG} add(%a, %x)\n  %c = {BIG} bitcast(%b)\n  %d = {BIG} add(%c, %a)\n"
              f"  ROOT %y = {BIG} add(%d, %x)\n}}\n")
    assert [(size, i.name) for size, i in alive(hlo)] == [(SIZE, "a"), (SIZE, "b"), (SIZE, "d")]
