"""JSON lists and JSON lines, with media beside them: LLaVA's files and chat messages.

Access is random without holding the file in memory: the places of the records are found once, in pieces, and
for large files kept beside the file (`NAME.offsets.npy`), so that later openings and worker processes start at once.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.data.adapters import parse
from mllm_jax.data.errors import BadExample
from mllm_jax.types import Example

CHUNK = 1 << 24
REMEMBER = 1 << 24                      # bytes of a file from which its offsets are kept beside it


class Json:
    """Records of a `.json` list or a `.jsonl` file as Examples.

    Options: `images`, the folder of relative media paths (default: the folder of the file); `placement`,
    `placeholders`, `similarity` and `most`, see `adapters.parse`.  Raises ConfigError on opening if the file is not a list of records.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        images: Path | None = None,
        placement: str = "keep",
        placeholders: str = "strict",
        similarity: float = 0.0,
        most: int | None = None,
    ):
        self.path, self.name, self.images = path, name, images or path.parent
        self.options = {"placement": placement, "placeholders": placeholders, "similarity": similarity, "most": most}
        self.places = Places(path)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        text = self.places[index]
        id = f"{self.name}/{index}"
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise BadExample(id, "malformed", f"{self.path.name}, record {index}: {error}") from error
        if isinstance(raw, dict) and raw.get("id") is not None:
            id = f"{id}/{raw['id']}"    # given ids are not always unique; LLaVA-1.5's are not
        return parse(raw, id=id, source=self.name, root=self.images, **self.options)


class Places:
    """The bytes of each record of a file; `places[i]`.  Pickles as a path."""

    def __init__(self, path: Path):
        self.path = path
        self.offsets = self._load()     # i64[n 2]: begin and end of each record

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        begin, end = self.offsets[index]
        with open(self.path, "rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def _load(self) -> np.ndarray:
        stat, beside = self.path.stat(), self.path.with_name(self.path.name + ".offsets.npy")
        stamp = np.array([[stat.st_size, stat.st_mtime_ns]])
        if stat.st_size < REMEMBER:
            return _scan(self.path)
        try:
            kept = np.load(beside, mmap_mode="r")
            if (kept[:1] == stamp).all():
                return kept[1:]
        except (OSError, ValueError):
            pass
        offsets = _scan(self.path)
        try:                            # a folder that may not be written to costs time, not correctness
            partial = beside.with_suffix(".partial.npy")
            np.save(partial, np.concatenate([stamp, offsets]))
            partial.replace(beside)
        except OSError:
            pass
        return offsets


def _scan(path: Path) -> np.ndarray:
    scan = _lines if path.suffix in (".jsonl", ".ndjson") else _elements
    return np.array(list(scan(path)), np.int64).reshape(-1, 2)


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """Lines that are not blank; a byte order mark and carriage returns are left outside."""
    with open(path, "rb") as file:
        begin = 0
        for line in file:
            end = begin + len(line)
            mark = 3 if begin == 0 and line.startswith(b"\xef\xbb\xbf") else 0
            if line[mark:].strip():
                yield begin + mark, begin + len(line.rstrip())
            begin = end


def _elements(path: Path) -> Iterator[tuple[int, int]]:
    """The elements of one JSON list, read in pieces: a list of a gigabyte costs the memory of one piece."""
    decoder = json.JSONDecoder()
    with open(path, "rb") as file:
        data, base, size = file.read(CHUNK), 0, CHUNK
        text = data.decode("utf-8-sig", "ignore")
        at = len(text) - len(text.lstrip())
        if text[at : at + 1] != "[":
            raise ConfigError(f"{path} must be a JSON list of records; it begins with {text[at : at + 20]!r}")
        # Positions are counted in characters of latin-1, that is in bytes: JSON's own signs are ASCII.
        text = data.decode("latin-1")
        at = text.index("[") + 1
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if text[at : at + 1] == "]":
                return
            try:
                _, end = decoder.raw_decode(text, at)
                if end == len(text):    # a number may go on in the next piece
                    raise json.JSONDecodeError("piece ends", text, at)
                yield base + at, base + end
                at = end
            except json.JSONDecodeError as error:
                more = file.read(size)
                if not more:
                    place = f"byte {base + error.pos}: {error.msg}"
                    raise ConfigError(f"{path} breaks off or is not JSON at {place}") from error
                text, base, at = text[at:] + more.decode("latin-1"), base + at, 0
                size *= 2               # so that a mistake in a large file is found in linear time
