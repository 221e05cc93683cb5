"""Safetensors files: read as views of what lies on the disk, written in any order, a part of a tensor at a time.

The format (a length, a JSON header, raw bytes) is read here and not through the `safetensors` package for
three reasons: a view touches only the pages that are used; bfloat16 and float8 are numpy arrays through
ml_dtypes; and a tensor can be written layer by layer.  Arrays that are not contiguous are copied into order
a slab at a time (`safetensors.numpy.save_file` writes them wrongly and says nothing).
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.hf.stored import Stored
from mllm_jax.hf.torch_bin import read_pickle

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(v): k for k, v in DTYPES.items()}
SLAB = 8 << 20                          # bytes that are put into order at once when writing
MAX_HEADER = 100_000_000                # as in the safetensors package
INDEX = "model.safetensors.index.json"
PICKLES, PICKLE = "pytorch_model.bin.index.json", "pytorch_model.bin"       # where a folder has nothing better
NATIVE = "params.safetensors"           # our own paths and stacked layers, see convert.py


def tensors_of(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder, by name.

    Raises:
      ConfigError: no tensors, a shard is missing, or a file is cut short; the message names it.
    """
    if (native := folder / NATIVE).exists():
        return read_header(native)
    read = read_header
    if (index := folder / INDEX).exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif len(found := sorted(p.name for p in folder.glob("*.safetensors"))) == 1:
        names = found
    elif not found and (folder / PICKLES).exists():
        names, read = sorted(set(json.loads((folder / PICKLES).read_text())["weight_map"].values())), read_pickle
    elif not found and (folder / PICKLE).exists():
        names, read = [PICKLE], read_pickle
    else:
        raise ConfigError(f"{folder} holds {len(found)} .safetensors files and no {INDEX}, and no {PICKLE}; "
                          "save the model as safetensors (save_pretrained does) and try again")
    if missing := [n for n in names if not (folder / n).exists()]:
        raise ConfigError(f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}; download it again")
    return {name: t for file in names for name, t in read(folder / file).items()}


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file."""
    total = file.stat().st_size
    with open(file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        try:
            if not 2 <= size <= min(MAX_HEADER, total - 8):
                raise ValueError(f"a header of {size} bytes in {total}")
            header = json.loads(f.read(size))
        except ValueError as error:
            raise ConfigError(f"{file} is not a safetensors file, or is cut short ({error}); download it again") from None
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"{file}: {name} is of type {entry['dtype']}; known are {', '.join(DTYPES)}")
        begin, end = (8 + size + o for o in entry["data_offsets"])
        t = Stored(file=file, dtype=np.dtype(DTYPES[entry["dtype"]]), shape=tuple(entry["shape"]), offset=begin)
        if end > total or end - begin != t.nbytes:
            raise ConfigError(f"{file} is cut short or damaged: {name} ends at byte {end} of {total}; download it again")
        out[name] = t
    return out


class Writer:
    """A safetensors file whose header is known before its data; tensors are written in any order.

    Bytes that are never written are zero, so count what you write.
    """

    def __init__(self, file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]):
        header, at = {"__metadata__": dict(metadata)}, 0
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)                          # data begin at a multiple of 8
        self.file = open(file, "wb")     # noqa: SIM115, closed by __exit__
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.offsets = {n: 8 + len(text) + e["data_offsets"][0] for n, e in header.items() if n != "__metadata__"}
        self.dtypes = {n: np.dtype(dtype) for n, (dtype, _) in tensors.items()}
        self.file.truncate(8 + len(text) + at)

    def write(self, name: str, x: np.ndarray, *, layer: int | None = None, skip: int = 0) -> None:
        """Writes a tensor, entry number `layer` of a stack of such, or what follows `skip` bytes of it."""
        assert np.dtype(x.dtype) == self.dtypes[name], f"{name} is promised as {self.dtypes[name]}, not {x.dtype}"
        self.file.seek(self.offsets[name] + (layer or 0) * x.nbytes + skip)
        rows = max(1, SLAB * max(len(x), 1) // max(x.nbytes, 1)) if x.ndim else 0
        for part in [x[i : i + rows] for i in range(0, len(x), rows)] if x.ndim else [x]:
            self.file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def shards(sizes: Mapping[str, int], limit: float, stem: str = "model") -> dict[str, list[str]]:
    """File name -> tensors, in order, each file at most `limit` bytes unless a single tensor is larger."""
    groups, room = [[]], limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05}-of-{len(groups):05}.safetensors": g for i, g in enumerate(groups, 1)}


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end, or vanishes on an error.

    Raises:
      ConfigError: `folder` exists and holds something else than a model.
    """
    ours = lambda: any((folder / file).exists() for file in ("config.json", "adapter_config.json"))
    if folder.exists() and not (folder.is_dir() and (ours() or not any(folder.iterdir()))):
        raise ConfigError(f"{folder} exists and is not a model folder; give another place, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    try:
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
