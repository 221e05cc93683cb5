"""ArrayRecord files of our own record (`data/record.py`): media inside, thousands of random reads a second."""

from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource

from mllm_jax.config import ConfigError
from mllm_jax.data.manifest import verify
from mllm_jax.data.record import unpack_example
from mllm_jax.data.sources.files import files
from mllm_jax.types import Example


class ArrayRecord:
    """Records of a file, of a folder of `*.array_record`, or of a pattern, one after another."""

    def __init__(self, path: Path, *, name: str):
        found = files(path, ".array_record")
        verify(found, whole=not path.is_file())
        try:
            self.records = ArrayRecordDataSource([str(file) for file in found])
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{path} is not ArrayRecord, or breaks off; write it again") from error
        self.name = name

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):      # the reader would crash on one that is too large
            raise IndexError(f"record {index} of {len(self)} in {self.name}")
        return unpack_example(self.records[index])
