"""Sources of examples: random access by number, paths only, so that they travel to worker processes.

    source = open_source("shapes")
    len(source), source[17]             # an Example
"""

from pathlib import Path
from typing import Protocol

from mllm_jax.config import ConfigError, nearest
from mllm_jax.data.sources.shapes import Shapes
from mllm_jax.types import Example


class Source(Protocol):
    """What Grain calls a random-access data source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_source(name: str, root: Path | None = None) -> Source:
    """The source of that name; raises ConfigError if there is none."""
    if name == "shapes":
        return Shapes()
    raise ConfigError(f"no data set is called {name!r}; nearest: {nearest(name, ['shapes'])}")
