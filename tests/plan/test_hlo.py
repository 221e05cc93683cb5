"""The text of modules: shapes, tuples, trip counts, groups of devices, and operations against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib import _hlo

from mllm_jax.plan import executable
from mllm_jax.plan.executable import COMPUTATIONS, INSTRUCTIONS, OPERANDS, _instruction, hlo_text
from mllm_jax.plan.hlo import Hlo, Instruction, arrays, elements, replica_groups
from mllm_jax.plan.work import program_flops

A, B = jax.ShapeDtypeStruct((64, 32), "float32"), jax.ShapeDtypeStruct((32, 48), "float32")
ONE = 2 * 64 * 32 * 48


def scan(a, b):
    return jax.lax.scan(lambda x, _: (jnp.tanh((x @ b) @ b.T), None), a, None, length=7)[0]


def nested(a, b):
    inner = lambda x, _: (jnp.tanh((x @ b) @ b.T), None)
    return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None), a, None, length=5)[0]


def fused(a, b):
    return jnp.tanh(jnp.einsum("ij,jk->ki", a * 2, b) + 1)


def batched(a, b):
    return jnp.einsum("nij,jk->nik", jnp.stack([a, a, a]), b)


CASES = {"a product": (lambda a, b: a @ b, ONE), "a scan": (scan, 7 * 2 * ONE), "a scan in a scan": (nested, 5 * 3 * 2 * ONE),
         "a fusion": (fused, ONE), "a batch": (batched, 3 * ONE),
         "its gradient": (lambda a, b: jax.grad(lambda b: jnp.sum(jnp.tanh(a @ b)))(b), 2 * ONE)}


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_counted_by_hand(name):
    function, expected = CASES[name]
    assert program_flops(Hlo(jax.jit(function).lower(A, B).compile().as_text())) == expected


@pytest.mark.parametrize("chips", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_operations_of_a_tpu_program_are_too(tpu, chips):
    """Where every product is a convolution in a fusion, and weights are gathered by layers."""
    from mllm_jax.plan.topology import not_kept

    mesh = jax.sharding.Mesh(np.array(tpu(chips).devices), ("x",))
    put = lambda shape, *spec: jax.ShapeDtypeStruct(shape, "bfloat16", sharding=jax.sharding.NamedSharding(mesh, jax.P(*spec)))

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, w)[0]

    with not_kept():
        module = Hlo(hlo_text(jax.jit(layers).lower(put((1024, 256), "x"), put((6, 256, 256), None, "x")).compile()))
    assert program_flops(module) == 6 * 2 * (1024 // 4) * 256 * 256


def test_an_update_keeps_its_first_operand_alone():
    """An instruction as it is serialised: its opcode, three operands as they are packed, its name."""
    update, add = b"\x0a\x01u\x12\x0casync-update", b"\x0a\x01u\x12\x03add\xa2\x02\x02\x07\x09"
    three, one = update + b"\xa2\x02\x04\x07\xac\x02\x09", update + b"\xa2\x02\x01\x07"
    started = {7: b"async-start"}
    assert _instruction(three, 0, len(three), started) == one
    assert _instruction(add, 0, len(add), started) == add


def test_a_slice_that_the_turn_before_has_started_is_read():
    """As libtpu leaves slices of a kept stack on v6e: begun in one turn of a loop, ended in the next.  jaxlib reads no such module."""
    data = _hlo.hlo_module_from_text("""HloModule jit_m, is_scheduled=true

%part (p: f32[8,16]) -> f32[1,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %s = f32[1,16]{1,0} slice(%p), slice={[0:1], [0:16]}
}

ENTRY %main (x: f32[8,16], before: ((f32[8,16]), f32[1,16], u32[])) -> f32[1,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %before = ((f32[8,16]{1,0}), f32[1,16]{1,0}, u32[]) parameter(1)
  %start = ((f32[8,16]{1,0}), f32[1,16]{1,0}, u32[]) async-start(%x), calls=%part
  ROOT %done = f32[1,16]{1,0} async-done(%start)
}
""").as_serialized_hlo_module_proto()
    ids = {opcode: id for number, _, value, *_ in executable._fields(data, 0, len(data)) if number == COMPUTATIONS
           for part, _, at, *_ in executable._fields(data, *value) if part == INSTRUCTIONS for id, opcode in [executable._named(data, *at)]}
    read = lambda data: _hlo.HloModule.from_serialized_hlo_module_proto(data).to_string()
    assert read(executable._mended(data, 0, len(data), 0)) == read(data)
    operand = lambda opcode: executable._message(OPERANDS, executable._number(ids[opcode]))
    assert data.count(operand(b"async-start")) == 1
    later = data.replace(operand(b"async-start"), operand(b"parameter"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="IsAsynchronous"):
        read(later)
    assert "ROOT %done = f32[1,16]{1,0} copy-done(%" in read(executable._mended(later, 0, len(later), 0))


def test_a_loop_that_depends_on_data_runs_as_often_as_is_said():
    def loop(a, b, n):
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh((x @ b) @ b.T), a)

    module = Hlo(jax.jit(loop).lower(A, B, jax.ShapeDtypeStruct((), "int32")).compile().as_text())
    assert [program_flops(module, n) for n in (1, 4)] == [2 * ONE, 8 * ONE]


def test_bytes_of_a_shape_are_those_with_the_padding_of_its_tiles():
    plain, tiled, on_chip = arrays("(f32[3,5]{1,0}, bf16[100,130]{1,0:T(8,128)(2,1)}, f32[16]{0:T(128)S(1)})")
    assert (plain.bytes, plain.elems, plain.space) == (60, 15, 0)
    assert (tiled.bytes, tiled.dims) == (104 * 256 * 2, (100, 130))
    assert on_chip.space == 1


def test_elements_of_a_tuple():
    assert elements("(f32[2,3]{1,0:T(8,128)}, (s32[], f32[4]), u32[])") == ("f32[2,3]{1,0:T(8,128)}", "(s32[], f32[4])", "u32[]")
    assert elements("f32[2,3]{1,0}") == ("f32[2,3]{1,0}",)


@pytest.mark.parametrize(("attrs", "groups"), [
    (", replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
    (", replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
    (", replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
    (", replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", [[0, 2], [1, 3]]),
    (", replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}", [[0, 1, 2, 3]]),
    (", replica_groups=mesh['a'=4] {'a':(1)2}, dimensions={0}", [[0, 2], [1, 3]]),
    (", replica_groups=mesh['a'=4] {'a':(2)2}, dimensions={0}", [[0, 1], [2, 3]]),
    (", replica_groups={}, dimensions={0}", [[0, 1, 2, 3]]),
])
def test_groups_of_devices_in_all_their_forms(attrs, groups):
    i = Instruction("g", "all-gather", "f32[4]", [], "", attrs, False)
    assert replica_groups(i, 4).tolist() == groups
