"""Models that the tests of this folder share: made once, saved once."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Saved:
    folder: Path
    model: Any                          # of torch
    processor: Any


@pytest.fixture(scope="session")
def saved(torch, tmp_path_factory):
    """A function from a name of tiny.py to the model and the folder where it is saved."""
    from tests.hf import tiny

    @cache
    def make(name: str) -> Saved:
        folder = tmp_path_factory.mktemp("hf") / name
        model, processor = tiny.save(name, folder)
        return Saved(folder=folder, model=model, processor=processor)

    return make
