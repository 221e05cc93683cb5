"""Webdataset tars (LAION, DataComp, img2dataset): files `KEY.jpg KEY.txt KEY.json` side by side in shards.

Shards are indexed once and then read at random by position, which costs as little as reading in order. The
index of a large shard is kept beside it (`NAME.members.npz`). Keys are grouped inside a shard, so a key that
occurs again in the next shard is another sample.
"""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.data.adapters import parse
from mllm_jax.data.errors import BadExample
from mllm_jax.data.sources.files import files, locate
from mllm_jax.types import Example

KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"), "image"),
    **dict.fromkeys(("mp4", "webm", "mkv"), "video"),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg"), "audio"),
}
UNUSED = ("key", "status", "error_message", "caption", "text", "exif", "images", "videos", "audios")
REMEMBER = 1 << 24                      # bytes of a shard from which its index is kept beside it

# Of one shard: keys S[n]; starts i64[n+1] of their members in: extensions S[m], places i64[m 2] (position, size).
Index = dict[str, np.ndarray]


class WebDataset:
    """Samples of tar shards as Examples with captions, or with turns where the JSON member holds a conversation.

    `path` is a file, a folder of tars, or a pattern such as `{00000..00127}.tar` or `*.tar`.  Options: `text`, the
    member that is the caption ("txt", or "json.FIELD"; default: txt, then json.caption); `key`, where a name is
    split into key and extension: at its "last" dot (so keys may hold dots) or, as webdataset does, at its "first";
    `similarity` and `most`, see `adapters.parse`.
    """

    def __init__(
        self, path: Path, *, name: str, text: str | None = None, key: str = "last", similarity: float = 0.0, most: int | None = None,
    ):
        if key not in ("last", "first"):
            raise ConfigError(f"key={key!r}: a name is split at its 'last' or its 'first' dot")
        self.shards, self.name, self.text, self.key = files(path, ".tar"), name, text, key
        self.chosen = {"similarity": similarity, "most": most}
        self._load()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Example:
        shard, row = locate(index, self.ends, self.name)
        samples = self.samples[shard]
        id = f"{self.name}/{self._shard_name(shard)}/{samples['keys'][row].decode()}"
        members = {}
        with open(self.shards[shard], "rb") as file:
            for member in range(samples["starts"][row], samples["starts"][row + 1]):
                position, size = samples["places"][member]
                file.seek(position)
                members[samples["extensions"][member].decode()] = file.read(size)
        return self._example(id, members)

    def _shard_name(self, shard: int) -> str:
        folder = os.path.commonpath([self.shards[0].parent, self.shards[-1].parent, self.shards[shard].parent])
        return str(self.shards[shard].relative_to(folder).with_suffix(""))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("shards", "name", "text", "key", "chosen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def _load(self) -> None:
        self.samples = [_index(shard, self.key) for shard in self.shards]
        self.ends = np.cumsum([len(samples["keys"]) for samples in self.samples])

    def _example(self, id: str, members: dict[str, bytes]) -> Example:
        try:
            raw = json.loads(members.get("json", b"{}"))
        except ValueError as error:
            raise BadExample(id, "malformed", f"its .json member is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise BadExample(id, "malformed", f"its .json member must be a map; it is a {type(raw).__name__}")
        if raw.get("status", "success") != "success":
            raise BadExample(id, "missing_file", f"it was not downloaded: status {raw['status']!r}")
        record = {k: v for k, v in raw.items() if k not in UNUSED}
        for extension, data in members.items():
            if (kind := KINDS.get(extension.rpartition(".")[2])) is not None:
                record.setdefault(f"{kind}s", []).append(data)
        if not any(kind in record for kind in ("images", "videos", "audios", "conversations", "messages", "text_list")):
            raise BadExample(id, "missing_file", f"no image, video or audio among its members: {', '.join(members)}")
        record["caption"] = self._caption(id, members, raw)
        if "cls" in members:
            record["answers"] = [members["cls"].decode().strip()]
        return parse(record, id=id, source=self.name, **self.chosen)

    def _caption(self, id: str, members: dict[str, bytes], raw: dict) -> str | None:
        for choice in (self.text,) if self.text else ("txt", "json.caption", "json.text"):
            if choice.startswith("json."):
                value = raw.get(choice.removeprefix("json."))
            else:
                value = members.get(choice, b"").decode("utf-8", "replace")
            if value and str(value).strip():
                return str(value).strip()
        if self.text:
            found = f"members: {', '.join(members)}; fields: {', '.join(raw)}"
            raise BadExample(id, "no_text", f"it has no {self.text}; {found}")
        return None


def _index(shard: Path, key: str) -> Index:
    """The samples of a shard in its order, read once from its headers."""
    stat, beside = shard.stat(), shard.with_name(shard.name + ".members.npz")
    stamp = np.array([stat.st_size, stat.st_mtime_ns, key == "first"])
    if stat.st_size >= REMEMBER:
        try:
            kept = dict(np.load(beside))
            if (kept["stamp"] == stamp).all():
                return kept
        except (OSError, ValueError, KeyError):
            pass
    keys, starts, extensions, places = [], [], [], []
    seen: dict[str, int] = {}
    last = None
    for name, place in _members(shard):
        base, extension = _split(name, key)
        if not keys or base != last or extension in extensions[starts[-1] :]:
            seen[base] = seen.get(base, 0) + 1
            keys.append(base if seen[base] == 1 else f"{base}#{seen[base]}")
            starts.append(len(places))
        last = base
        extensions.append(extension)
        places.append(place)
    index = {
        "stamp": stamp,
        "keys": np.array([k.encode() for k in keys]),
        "starts": np.array([*starts, len(places)]),
        "extensions": np.array([e.encode() for e in extensions]),
        "places": np.array(places, np.int64).reshape(-1, 2),
    }
    if stat.st_size >= REMEMBER:
        try:                            # a folder that may not be written to costs time, not correctness
            partial = beside.with_suffix(".partial.npz")
            np.savez(partial, **index)
            partial.replace(beside)
        except OSError:
            pass
    return index


def _members(shard: Path) -> list[tuple[str, tuple[int, int]]]:
    found = []
    try:
        with tarfile.open(shard, "r:") as tar:
            found = [(m.name, (m.offset_data, m.size)) for m in tar if m.isfile() and "." in Path(m.name).name]
    except tarfile.TarError as error:
        raise ConfigError(f"{shard} is no tar, or breaks off: {error}; fetch it again, or remove it") from error
    if found and sum(found[-1][1]) > (size := shard.stat().st_size):
        raise ConfigError(f"{shard} breaks off inside {found[-1][0]!r} at byte {size}; fetch it again, or remove it")
    return found


def _split(name: str, key: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    base, _, extension = file.partition(".") if key == "first" else file.rpartition(".")
    return folder + slash + base, extension.lower()
