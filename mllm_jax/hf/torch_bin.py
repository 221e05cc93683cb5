"""PyTorch checkpoints (`pytorch_model.bin`), read without torch and without running what a pickle says.

Many checkpoints of the cookbook exist on the Hub in no other form.  The file is a zip whose entries are stored
as they are: `data.pkl` describes the tensors, `data/0`, `data/1`, ... are their bytes.  The unpickler here
knows tensors, storages and dictionaries; a pickle that names anything else is refused by its name.
"""

import collections
import math
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.hf.stored import Stored
from mllm_jax.types import record

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


@record
class _Storage:
    dtype: np.dtype
    key: str


def read_pickle(file: Path) -> dict[str, Stored]:
    """The tensors of one file.

    Raises:
      ConfigError: not such a file, or one that holds more than tensors.
    """
    if not zipfile.is_zipfile(file):
        raise ConfigError(f"{file} is no checkpoint of PyTorch 1.6 or later, or is cut short; save the model as safetensors")
    with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        entries = {i.filename: i for i in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConfigError(f"{file} holds {len(pickles)} pickles named data.pkl where one is expected; download it again")
        root = pickles[0].removesuffix("data.pkl")

        def tensor(storage: _Storage, start: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Stored:
            t = Stored(file=file, dtype=storage.dtype, shape=tuple(shape), offset=0)
            in_order = tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
            if t.nbytes and any(have != want for have, want, n in zip(strides, in_order, shape) if n > 1):
                raise ConfigError(f"{file}: a tensor of shape {shape} is stored with strides {strides}; save the model as safetensors")
            begin = _data_offset(raw, entries[f"{root}data/{storage.key}"]) + start * t.dtype.itemsize
            return replace(t, offset=begin)

        class Reader(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                if module == "torch" and name in STORAGES:
                    return np.dtype(STORAGES[name])
                known = {
                    ("torch._utils", "_rebuild_tensor_v2"): tensor,
                    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
                    ("collections", "OrderedDict"): collections.OrderedDict,
                }
                if (module, name) not in known:
                    raise ConfigError(f"{file} names {module}.{name}, which is not a tensor and is not run; save the model as safetensors")
                return known[module, name]

            def persistent_load(self, found: tuple) -> _Storage:
                _, dtype, key, *_ = found
                return _Storage(dtype=dtype, key=key)

        with archive.open(pickles[0]) as stream:
            tree = Reader(stream).load()
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(v, Stored) for v in tree.values()):
        raise ConfigError(f"{file} is not a dictionary of tensors")
    return dict(tree)


def _data_offset(raw: Any, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind a local header with a name and an alignment of its own."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ConfigError(f"{raw.name}: {entry.filename} is compressed; save the model as safetensors")
    raw.seek(entry.header_offset + 26)
    name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
    return entry.header_offset + 30 + name + extra
