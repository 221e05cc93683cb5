"""Parquet files with embedded images, as the Hugging Face hub keeps them.

Columns are understood by name, see `adapters.parse`: `image` or `images` (structs of bytes and path), and
`messages`, `conversations`, `texts`, `question`, `caption`, ...

Surprise: Parquet has no cheap random access. One row costs its whole row group, of which the last few are
kept; a shuffled pass over large groups is slow, and `mllm-jax data convert` makes an ArrayRecord of it once.
"""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mllm_jax.config import ConfigError, nearest
from mllm_jax.data.adapters import parse
from mllm_jax.data.sources.files import files, locate
from mllm_jax.types import Example


class Parquet:
    """Rows of Parquet files as Examples.

    `path` is a file, a folder, or a pattern.  Options: `columns`, the only ones to read, joined by "+"; `rename`,
    pairs such as "img:image+alt:caption"; `images`, the folder of relative media paths; `groups`, how many row
    groups to keep in memory; `placeholders` and `most`, see `adapters.parse`.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        columns: str | None = None,
        rename: str = "",
        images: Path | None = None,
        groups: int = 4,
        placeholders: str = "strict",
        most: int | None = None,
    ):
        self.files, self.name, self.groups = files(path, ".parquet"), name, groups
        self.options = {"placeholders": placeholders, "most": most}
        self.root = images or self.files[0].parent
        self.columns = columns.split("+") if columns else None
        self.rename = dict(pair.split(":") for pair in rename.split("+") if pair)
        self.places: list[tuple[int, int]] = []         # (file, row group)
        rows = []
        for i, file in enumerate(self.files):
            try:
                meta = pq.ParquetFile(file)
            except (pa.ArrowInvalid, OSError) as error:
                raise ConfigError(f"{file} is not Parquet, or breaks off: {error}") from error
            known = meta.schema_arrow.names
            for column in [*(self.columns or ()), *self.rename]:
                if column not in known:
                    raise ConfigError(f"{file} has no column {column!r}; nearest: {nearest(column, known)}")
            self.places += [(i, group) for group in range(meta.num_row_groups)]
            rows += [meta.metadata.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self.ends = np.cumsum(rows) if rows else np.zeros(1, np.int64)
        self._forget()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Example:
        place, row = locate(index, self.ends, self.name)
        raw = self._group(place).slice(row, 1).to_pylist()[0]
        raw = {self.rename.get(key, key): value for key, value in raw.items()}
        id = f"{self.name}/{index}" + (f"/{raw['id']}" if raw.get("id") is not None else "")
        return parse(raw, id=id, source=self.name, root=self.root, **self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def _group(self, place: int) -> pa.Table:
        with self._lock:                # two threads would read the same group twice
            if place not in self._kept:
                file, group = self.places[place]
                self._kept[place] = pq.ParquetFile(self.files[file]).read_row_group(group, columns=self.columns)
                while len(self._kept) > self.groups:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(place)
            return self._kept[place]
