"""A source as ArrayRecord files of our own, and beside them a manifest that says what they must be.

    convert(open_source("llava:chat.json"), "llava:chat.json", Path("chat.array_record"), shards=4)

writes chat-00000-of-00004.array_record ... and chat.manifest.json.  Whoever reads the files later finds a shard that
was lost or cut off on the way before anything is trained.  Records keep their order: nothing here is random, and a
second conversion writes the same records.
"""

import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample
from mllm_jax.data.record import SCHEMA, embed, write_array_record
from mllm_jax.types import Example

SUFFIX = ".array_record"
PACKAGES = ("mllm_jax", "array_record", "msgpack")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


def convert(
    source: Sequence[Example], name: str, out: Path, *, shards: int = 1, limit: int | None = None, skip_bad: bool = False
) -> dict[str, Any]:
    """Writes the records of a source, with their media inside, and returns the manifest, which is written last.

    Args:
      name: of the source, for the manifest.
      out: the file; of several shards each has its number put into this name.
      limit: the first records only.
      skip_bad: leaves bad records out and counts them by reason, instead of stopping.

    Raises:
      BadExample: the first bad record, unless they are skipped.
      ConfigError: `out` does not end in .array_record, or there are fewer records than shards.
    """
    if out.suffix != SUFFIX:
        raise ConfigError(f"--out is {out}; write NAME{SUFFIX}, the name by which it is found again")
    count = min(len(source), len(source) if limit is None else limit)
    if not 1 <= shards <= count:
        raise ConfigError(f"{count} records cannot be written as {shards} shards; there is at least one record in each")
    out.parent.mkdir(parents=True, exist_ok=True)
    left_out: Counter[str] = Counter()
    written = []
    for k in range(shards):
        file = out if shards == 1 else out.with_name(f"{out.stem}-{k:05d}-of-{shards:05d}{SUFFIX}")
        part = range(count * k // shards, count * (k + 1) // shards)
        records = write_array_record(file, _examples(source, part, left_out if skip_bad else None))
        written.append({"file": file.name, "records": records, "bytes": file.stat().st_size})
    manifest = {
        "source": name, "limit": limit, "records": sum(shard["records"] for shard in written), "left_out": dict(left_out),
        "schema": SCHEMA, "versions": {p: importlib.metadata.version(p) for p in PACKAGES}, "shards": written}
    path = manifest_of(out)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.replace(path)
    return manifest


def manifest_of(file: Path) -> Path:
    """Where the manifest of a file, or of the shards that it is one of, is."""
    match = _SHARD.fullmatch(file.stem)
    return file.with_name(f"{match[1] if match else file.stem}.manifest.json")


def verify(files: Iterable[Path], *, whole: bool) -> None:
    """Checks that files are what their manifests say, and, if `whole`, that no other shard of theirs is lost.

    Files without a manifest pass, but for the numbers in their names.

    Raises:
      ConfigError: a shard is missing, has another size, or belongs to another conversion.
    """
    groups: dict[Path, list[Path]] = {}
    for file in files:
        groups.setdefault(manifest_of(file), []).append(file)
    for path, found in groups.items():
        listed = _listed(path)
        for file in found:
            if listed is not None and file.name not in listed:
                raise ConfigError(f"{file} is not in {path.name}: it is left from another conversion; delete it, or convert again")
            if listed is not None and file.stat().st_size != listed[file.name]:
                raise ConfigError(f"{file} has {file.stat().st_size:,} bytes; {path.name} says {listed[file.name]:,}; "
                                  "copy it again, or convert again")
        expected = sorted(_siblings(found) if listed is None else listed) if whole else []
        missing = [name for name in expected if not path.with_name(name).exists()]
        if missing:
            raise ConfigError(f"{path.with_name(missing[0])} is missing; {len(missing)} of {len(expected)} shards are: "
                              "copy them again, or convert again")


def _listed(path: Path) -> dict[str, int] | None:
    """File name -> bytes of a manifest; None if there is none."""
    try:
        return {shard["file"]: shard["bytes"] for shard in json.loads(path.read_text())["shards"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a manifest of data convert; delete it, or convert again") from error


def _siblings(found: list[Path]) -> set[str]:
    """The names of all shards that numbered ones speak of."""
    out = set()
    for match in filter(None, (_SHARD.fullmatch(file.stem) for file in found)):
        out |= {f"{match[1]}-{k:05d}-of-{match[3]}{SUFFIX}" for k in range(int(match[3]))}
    return out


def _examples(source: Sequence[Example], part: range, left_out: Counter | None) -> Iterator[Example]:
    for i in part:
        try:
            yield embed(source[i])
        except BadExample as error:
            if left_out is None:
                raise error.of(str(i)) from error
            left_out[error.reason] += 1
