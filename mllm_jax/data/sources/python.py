"""Any Python sequence as a source: lists of dicts, Hugging Face `datasets`, or a function of the user that makes one.

    python:my_project.data:questions?split=train        my_project/data.py: def questions(split): ...
"""

import importlib
from typing import Any

from mllm_jax.config import ConfigError, nearest
from mllm_jax.data.adapters import parse
from mllm_jax.types import Example


class Rows:
    """Whatever has a length and items; items are Examples or raw records, see `adapters.parse`."""

    def __init__(self, rows: Any, *, name: str = "rows"):
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ConfigError(f"{name} is a {type(rows).__name__}; a source needs a length and items by number")
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.name}")
        raw = self.rows[index]
        given = raw.get("id") if isinstance(raw, dict) else None
        id = f"{self.name}/{index}" + (f"/{given}" if given is not None else "")
        return parse(raw, id=id, source=self.name)


class Python(Rows):
    """The sequence called `module:attribute`, or what the function of that name returns for `arguments`.

    Pickles as the name and the arguments; a worker process calls the function again.
    """

    def __init__(self, path: str, *, name: str, **arguments: Any):
        self.call = {"path": path, "name": name, **arguments}
        module, colon, attribute = path.partition(":")
        if not colon:
            raise ConfigError(f"python:{path} must be python:module:attribute")
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"python:{path}: module {module!r} cannot be imported: {error}") from error
        if not hasattr(found, attribute):
            raise ConfigError(f"{module} has no {attribute!r}; nearest: {nearest(attribute, vars(found))}")
        value = getattr(found, attribute)
        super().__init__(value(**arguments) if callable(value) else value, name=name)

    def __getstate__(self) -> dict[str, Any]:
        return self.call

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)
