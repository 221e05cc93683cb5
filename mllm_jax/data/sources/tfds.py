"""Data sets that TensorFlow Datasets has prepared as ArrayRecord or Parquet, read without TensorFlow.

    tfds:coco_captions/2014/1.1.0?split=train[:1000]        the folder that holds features.json

Images are never decoded by TFDS: OpenCV and Pillow disagree there, and its errors do not say which record.
Parts of a split (`train[10:15]`, `train[:5%]+validation`) are cut here: TFDS returns whole files for parts of Parquet
splits, in silence.  What cannot be opened without TensorFlow: TFRecord files, and audio or video features.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError, nearest
from mllm_jax.data.adapters import parse
from mllm_jax.data.sources.files import locate
from mllm_jax.data.sources.slices import cut_range
from mllm_jax.types import Example


class Tfds:
    """Records of one or more splits of a prepared data set as Examples; see `adapters.parse` for the features read.

    A `label` becomes the answer, by its name, and the caption where there is no other text.
    """

    def __init__(self, path: Path, *, name: str = "", split: str = "train", rename: str = ""):
        self.call = {"path": path, "name": name, "split": split, "rename": rename}
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ConfigError("tfds: needs the package tensorflow-datasets: pip install tensorflow-datasets") from error
        if not (path / "features.json").is_file():
            raise FileNotFoundError(f"{path / 'features.json'} (the folder of one version of a prepared data set)")
        self.rename = dict(pair.split(":") for pair in rename.split("+") if pair)
        try:
            builder = tfds.builder_from_directory(path)
        except ImportError as error:    # an audio or video feature
            detail = f"{path} has features that need TensorFlow: {error}"
            raise ConfigError(f"{detail}; convert it where that is installed") from error
        self.name = name or builder.info.full_name
        self.features = builder.info.features
        encoded = _decoders(self.features, tfds.features.Image)
        self.parts: list[tuple[str, Any, range]] = []
        for piece in split.split("+"):
            base, _, inside = piece.strip().partition("[")
            if base not in builder.info.splits:
                raise ConfigError(f"{path} has no split {base!r}; nearest: {nearest(base, builder.info.splits)}")
            try:
                rows = builder.as_data_source(split=base, decoders=encoded)
            except NotImplementedError as error:
                detail = f"{path} is stored as {builder.info.file_format.value}, which has no random access"
                raise ConfigError(f"{detail}; prepare it as array_record") from error
            self.parts.append((base, rows, cut_range(inside.removesuffix("]"), len(rows), piece)))
        self.ends = np.cumsum([len(rows) for _, _, rows in self.parts])

    def __getstate__(self) -> dict[str, Any]:
        return self.call                # the arguments alone: TFDS keeps the whole table of a Parquet split in memory

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Example:
        part, place = locate(index, self.ends, self.name)
        split, rows, numbers = self.parts[part]
        row = numbers[place]
        raw = {self.rename.get(key, key): value for key, value in _plain(rows[row], self.features).items()}
        if isinstance(raw.get("label"), str):
            raw.setdefault("answers", [raw.pop("label")])
            if not any(raw.get(key) for key in ("caption", "captions", "text", "question")):
                raw["caption"] = raw["answers"][0]
        id = f"{self.name}/{split}/{row}" + (f"/{raw['id']}" if raw.get("id") is not None else "")
        return parse(raw, id=id, source=self.name)


class _Encoded:
    """A TFDS decoder that decodes nothing; its own `SkipDecoding` does not know sequences of images."""

    def setup(self, *, feature: Any) -> None:
        pass

    def decode_example_np(self, data: Any) -> Any:
        return data

    decode_batch_example_np = decode_ragged_example_np = decode_example_np


def _decoders(features: Any, image: type) -> dict[str, Any]:
    """An `_Encoded` for every image feature, nested as the features are."""
    found = {}
    for key, feature in features.items():
        inner = getattr(feature, "feature", feature)            # of a sequence
        if isinstance(inner, image):
            found[key] = _Encoded()
        elif hasattr(inner, "items") and (nested := _decoders(inner, image)):
            found[key] = nested
    return found


def _plain(value: Any, feature: Any) -> Any:
    """A record as plain Python: text decoded, class numbers as names, arrays as lists; images stay bytes."""
    sort = type(feature).__name__
    if isinstance(value, dict):
        inner = getattr(feature, "feature", None)
        columns = {key: _plain(v, (inner or feature)[key]) for key, v in value.items()}
        # A sequence of records comes as a record of sequences.
        return columns if inner is None else [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]
    inner = getattr(feature, "feature", None)
    if inner is not None and not isinstance(value, (bytes, str)):
        return [_plain(v, inner) for v in value]
    if isinstance(value, np.ndarray):
        value = value.item() if not value.ndim else list(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v, feature) for v in value]
    if sort == "Image":
        return bytes(value)
    if sort == "ClassLabel" and int(value) >= 0:
        return feature.int2str(int(value))
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
