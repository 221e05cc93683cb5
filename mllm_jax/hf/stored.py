"""A tensor as it lies in a file, whatever the format."""

import math
from pathlib import Path

import numpy as np

from mllm_jax.types import record


@record
class Stored:
    """A tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self) -> np.ndarray:
        """The tensor, read from the disk where it is looked at."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
