"""What a compiler tells of a program: the sizes of its buffers, and the optimised HLO, also where `as_text` fails.

jaxlib 0.10.2 does not read an `async-update` with several operands, which libtpu 0.0.51 writes where collectives run on
the sparse core, nor an `async-done` of what the turn of a loop before has started.  The module is inside the serialised
executable: it is found there, all operands but the first are left out of the former, the latter becomes a `copy-done`,
and it is printed.  Fields of the messages by number: xla/service/hlo.proto.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import jax
from jaxlib import _hlo

from mllm_jax.plan.hlo import HBM, HOST
from mllm_jax.types import record

RIEGELI = bytes.fromhex("83af70d10d884a3f")         # of a file's first block; every 64 KiB one of these headers follows
BLOCK, HEADER = 1 << 16, 24
COMPUTATIONS, INSTRUCTIONS, OPCODE, ID, OPERANDS, CALLED = 3, 2, 2, 35, 36, 38
STARTED = (b"async-start", b"async-update")

Field = tuple[int, int, int | tuple[int, int] | None, int, int]     # number, wire type, value or its place, start, end


@record
class Sizes:
    """Bytes of a chip, as the compiler's buffers take them: with the padding of tiles."""

    arguments: int
    temporaries: int
    outputs: int                        # also those in the place of an argument
    shared: int                         # of the outputs, those
    code: int = 0
    host: int = 0                       # in the memory of the host

    @classmethod
    def of(cls, executable: jax.stages.Compiled) -> "Sizes":
        s = executable.memory_analysis()
        host = s.host_argument_size_in_bytes + s.host_temp_size_in_bytes + s.host_output_size_in_bytes - s.host_alias_size_in_bytes
        return cls(arguments=s.argument_size_in_bytes, temporaries=s.temp_size_in_bytes, outputs=s.output_size_in_bytes,
                   shared=s.alias_size_in_bytes, code=s.generated_code_size_in_bytes, host=host)

    @classmethod
    def of_dump(cls, text: str) -> "Sizes":
        """Of the buffer assignment that XLA dumps."""
        total: Counter[str] = Counter()
        for size, color, rest in re.findall(r"^allocation \d+: size (\d+),(?: color (\d+),)?([^\n]*)", text, re.M):
            if (space := int(color or HBM)) in (HBM, HOST):
                given, taken = " parameter " in rest, "maybe-live-out" in rest
                kinds = ["arguments"] * given + ["outputs"] * taken + ["shared"] * (given and taken) + ["temporaries"] * ("preallocated-temp" in rest)
                total.update({"host" if space == HOST else kind: int(size) for kind in kinds})
        return cls(**{k: total[k] for k in ("arguments", "temporaries", "outputs", "shared", "host")})


def hlo_text(executable: jax.stages.Compiled) -> str:
    device = next(iter(jax.tree.leaves(executable.input_shardings)[0].device_set))
    # What others have is not asked for: the failure is a page on stderr.
    if device.platform != "tpu" or "lite" in device.device_kind and "v5" in device.device_kind:
        try:
            return executable.as_text()
        except jax.errors.JaxRuntimeError:
            if device.platform != "tpu":
                raise
    data = _joined(executable._executable.xla_executable.serialize())
    for name in sorted(set(re.findall(rb"jit_[A-Za-z0-9_]+", data)), key=len):
        if found := _module(data, name):
            start, size = found
            return _hlo.HloModule.from_serialized_hlo_module_proto(_mended(data, start, start + size, 0)).to_string()
    raise RuntimeError("the serialised executable holds no module; this version of libtpu is not known here")


def _joined(data: bytes) -> bytes:
    """Without the headers of blocks, so that messages are in one piece."""
    start = data.find(RIEGELI)
    return data if start < 0 else data[:start] + b"".join(data[k + HEADER:k + BLOCK] for k in range(start, len(data), BLOCK))


def _module(data: bytes, name: bytes) -> tuple[int, int] | None:
    """(start, size) of the largest message that begins with this name and has computations."""
    key, best = b"\x0a" + _number(len(name)) + name, None
    at = data.find(key)
    while at >= 0:
        for back in range(1, 6):        # the size of the message stands before it, in so many bytes
            try:
                size, end = _varint(data, at - back)
                if end != at or size < 1000 or at + size > len(data):
                    continue
                numbers = {number for number, *_ in _fields(data, at, at + size)}
            except (ValueError, IndexError):
                continue
            if {INSTRUCTIONS, COMPUTATIONS} <= numbers and (best is None or size > best[1]):
                best = at, size
        at = data.find(key, at + 1)
    return best


def _mended(data: bytes, start: int, end: int, level: int) -> bytes:
    out, parts = bytearray(), list(_fields(data, start, end))
    opcodes = dict(_named(data, *value) for number, _, value, *_ in parts if number == INSTRUCTIONS) if level else {}
    for number, wire, value, begin, stop in parts:
        if wire == 2 and number == (COMPUTATIONS, INSTRUCTIONS)[level]:
            inner = _mended(data, *value, 1) if level == 0 else _instruction(data, *value, opcodes)
            out += _message(number, inner)
        else:
            out += data[begin:stop]
    return bytes(out)


def _named(data: bytes, start: int, end: int) -> tuple[int, bytes]:
    """(id, opcode) of an instruction."""
    found = {number: value for number, _, value, *_ in _fields(data, start, end) if number in (OPCODE, ID)}
    return found.get(ID, 0), data[slice(*found[OPCODE])] if OPCODE in found else b""


def _instruction(data: bytes, start: int, end: int, opcodes: Mapping[int, bytes]) -> bytes:
    if _named(data, start, end)[1] not in (b"async-update", b"async-done"):
        return data[start:end]
    fields = list(_fields(data, start, end))
    first = next(_varint(data, value[0])[0] if wire == 2 else value for number, wire, value, *_ in fields if number == OPERANDS)
    known, out, seen = opcodes.get(first) in STARTED, bytearray(), False
    for number, _, _, begin, stop in fields:
        if number == OPERANDS:
            out += b"" if seen else _message(OPERANDS, _number(first))
            seen = True
        elif known or number not in (OPCODE, CALLED):
            out += data[begin:stop]
        elif number == OPCODE:
            out += _message(OPCODE, b"copy-done")
    return bytes(out)


def _message(number: int, content: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(content)) + content


def _fields(data: bytes, at: int, end: int) -> Iterator[Field]:
    """Raises ValueError or IndexError where there is no message."""
    while at < end:
        begin = at
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            raise ValueError("not a message")
        value: int | tuple[int, int] | None = None
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = (at, at + size), at + size
        else:
            at += 8 if wire == 1 else 4
        if at > end:
            raise ValueError("not a message")
        yield number, wire, value, begin, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
    raise ValueError("not a number")


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
