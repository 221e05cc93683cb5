"""Sources of examples: random access by number, paths only, so that they travel to worker processes.

    open_source("shapes")                                           built in
    open_source("llava_mix_665k", root)                             a name of `datasets.py`, files under `root`
    open_source("llava:chat.json?images=photos")                    format:path?option=value&...
    open_source("webdataset:shards/{00000..00127}.tar?slice=:95%")

Any of them takes `slice=begin:end`, in records or percent, to hold a part out, and `shots=4`, to put each record
behind four others.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from mllm_jax.config import ConfigError, nearest, parse
from mllm_jax.data.datasets import DATASETS
from mllm_jax.data.sources.array_record import ArrayRecord
from mllm_jax.data.sources.digits import Digits
from mllm_jax.data.sources.json import Json
from mllm_jax.data.sources.parquet import Parquet
from mllm_jax.data.sources.python import Python, Rows
from mllm_jax.data.sources.shapes import Shapes
from mllm_jax.data.sources.shots import Shots
from mllm_jax.data.sources.slices import Slice, cut_range
from mllm_jax.data.sources.tfds import Tfds
from mllm_jax.data.sources.webdataset import WebDataset
from mllm_jax.types import Example

__all__ = ["FORMATS", "Rows", "Slice", "Source", "cut_range", "open_source"]

FORMATS = {
    "llava": Json,
    "messages": Json,
    "webdataset": WebDataset,
    "parquet": Parquet,
    "tfds": Tfds,
    "array_record": ArrayRecord,
    "python": Python,
    "shapes": Shapes,
    "digits": Digits,
}


class Source(Protocol):
    """What Grain calls a random-access data source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_source(name: str, root: Path | str | None = None) -> Source:
    """The source of a named data set, or of `format:path?option=value&...`; relative paths begin at `root`.

    Raises:
      ConfigError: no such name, format or option (the message names the nearest ones), or files are missing
        (it says which, where, and from where to get them).
    """
    root = Path(root) if root is not None else Path()
    spec, _, query = name.partition("?")
    options = {key: unquote(text) for key, _, text in (pair.partition("=") for pair in query.split("&") if pair)}
    part, shots = options.pop("slice", None), options.pop("shots", "0")
    if not shots.isdecimal():
        raise ConfigError(f"shots={shots} is not a number of records; write shots=4")
    format, colon, path = spec.partition(":")
    if colon:
        url, short = "", _short(format, path)
        if format not in FORMATS:
            raise ConfigError(f"{format!r} is not a format of data; nearest: {nearest(format, FORMATS)}")
    else:
        if spec not in DATASETS:
            known = [*DATASETS, *(f"{format}:" for format in FORMATS)]
            raise ConfigError(f"no data set is called {spec!r}; nearest: {nearest(spec, known)}, or write format:path")
        dataset, short = DATASETS[spec], spec
        if dataset.licence == "not public":
            raise ConfigError(f"{spec} is not public ({dataset.url}); give your own pairs, such as webdataset:shards")
        format, path, url, options = dataset.format, dataset.path, dataset.url, {**dataset.options, **options}
        for needed in dataset.needs:
            _require(root / needed, spec, root, url)
    try:
        source = _open(FORMATS[format], format, path, short, options, root)
    except FileNotFoundError as error:
        missing = error.filename or error.args[0]
        raise ConfigError(_missing(name if colon else spec, missing, root, url)) from error
    if len(source) == 0:
        raise ConfigError(f"{name} holds no record")
    if part is not None:
        numbers = cut_range(part, len(source), f"slice={part}")
        if not numbers:
            raise ConfigError(f"{name} holds no record: slice={part} of {len(source)}")
        source = Slice(source, numbers)
    return Shots(source, int(shots)) if int(shots) else source


def _open(kind: type, format: str, path: str, short: str, options: Mapping[str, str], root: Path) -> Source:
    known = [key for key in inspect.signature(kind).parameters if key not in ("path", "name", "arguments")]
    if kind is not Python:              # whose options are the arguments of the user's function
        for option in options:
            if option not in known:
                raise ConfigError(f"{format}: has no option {option!r}; nearest: {nearest(option, known)}")
    values: dict[str, Any] = {key: parse(text) for key, text in options.items()}
    if kind in (Shapes, Digits):        # drawn when asked for: no files
        return kind(**values)
    if kind is Python:
        return Python(path, name=short, **values)
    if "images" in options:
        values["images"] = root / options["images"]
        if not values["images"].is_dir():
            raise FileNotFoundError(str(values["images"]))
    return kind(root / path, name=short, **values)


def _short(format: str, path: str) -> str:
    """What records of an unnamed source are called: the file or folder without what machines differ in."""
    if format == "tfds":
        return ""                       # it knows its name
    names = [part for part in Path(path).parts if not set("{}*?") & set(part)]
    return Path(names[-1]).stem.strip("/.") or format if names else format


def _require(path: Path, name: str, root: Path, url: str) -> None:
    if not path.exists():
        raise ConfigError(_missing(name, str(path), root, url))


def _missing(name: str, path: str, root: Path, url: str) -> str:
    address = f"; get it from {url}" if url else ""
    return f"data set {name} needs {path}, which is not there; the data root is {root.resolve()}{address}"
