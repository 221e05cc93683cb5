"""Examples as bytes: the record of our own ArrayRecord files, with encoded media inside.

    write_array_record("scenes.array_record", examples)
    open_source("array_record:scenes.array_record")[17]

A record is a msgpack map of the fields that differ from their defaults, with the schema's version under "v".
Files are written with one record per chunk (`group_size:1`): with sixteen, random access reads thirty times slower.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
from array_record.python.array_record_module import ArrayRecordWriter

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample
from mllm_jax.types import Blob, Example, Part, Turn

SCHEMA = 1
_TURNS, _TEXTS = ("turns", "chosen", "rejected"), ("captions", "answers")


def pack_example(example: Example) -> bytes:
    """The record of an example; `unpack_example` gives back an equal one.

    Raises:
      BadExample: `extra` holds what is neither None, a number, text, bytes, a list nor a dict.
    """
    out: dict[str, Any] = {"v": SCHEMA, "id": example.id}
    out |= {name: [_pack_turn(turn) for turn in getattr(example, name)] for name in _TURNS if getattr(example, name)}
    out |= {name: list(getattr(example, name)) for name in _TEXTS if getattr(example, name)}
    out |= {name: value for name in ("kind", "source", "extra") if (value := getattr(example, name))}
    if example.media:
        out["media"] = [[blob.kind, blob.data, blob.path] for blob in example.media]
    try:
        return msgpack.packb(out, strict_types=True)        # strict: a tuple would come back as a list
    except (TypeError, ValueError, OverflowError) as error:
        raise BadExample(example.id, "malformed", f"extra={example.extra!r:.80} cannot be stored: {error}") from error


def unpack_example(data: bytes) -> Example:
    """The example of a record; raises ConfigError if it is not one, or of a later schema."""
    try:
        raw = msgpack.unpackb(data, strict_map_key=False)
        version = raw.pop("v")
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.exceptions.UnpackException) as error:
        raise ConfigError(f"{len(data)} bytes that begin with {data[:8]!r} are not a record of mllm_jax") from error
    if version > SCHEMA:
        raise ConfigError(f"the record has schema {version}, this version reads up to {SCHEMA}; upgrade mllm-jax")
    turns = {name: tuple(_unpack_turn(turn) for turn in raw.pop(name, ())) for name in _TURNS}
    texts = {name: tuple(raw.pop(name, ())) for name in _TEXTS}
    media = tuple(Blob(kind=kind, data=blob, path=path) for kind, blob, path in raw.pop("media", ()))
    return Example(media=media, **turns, **texts, **raw)


def read_blob(blob: Blob, limit: int = -1) -> bytes:
    """The bytes of an encoded medium, from memory or from its file, of which `limit` stops early.

    Raises:
      BadExample: its file is not there or cannot be read.
    """
    if blob.data is not None:
        return blob.data
    try:
        with open(blob.path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise BadExample("", "missing_file", f"{blob.path}: {error.strerror}") from error


def embed(example: Example) -> Example:
    """The example with the bytes of its media inside, independent of other files."""
    try:
        media = tuple(replace(blob, data=read_blob(blob), path=None) for blob in example.media)
    except BadExample as error:
        raise error.of(example.id) from error
    return replace(example, media=media)


def write_array_record(path: str | Path, examples: Iterable[Example]) -> int:
    """Writes examples with their media into one file and returns their number; the file appears when it is complete."""
    partial, count = Path(f"{path}.partial"), 0
    writer = ArrayRecordWriter(str(partial), "group_size:1,snappy")
    try:
        for example in examples:
            writer.write(pack_example(embed(example)))
            count += 1
    finally:
        writer.close()
    partial.replace(path)
    return count


def _pack_turn(turn: Turn) -> list:
    return [turn.role, turn.weight, [[part.kind, part.text, part.media] for part in turn.parts]]


def _unpack_turn(raw: list) -> Turn:
    role, weight, parts = raw
    return Turn(role=role, weight=weight, parts=tuple(Part(kind=k, text=t, media=m) for k, t, m in parts))
