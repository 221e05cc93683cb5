"""The architecture, as a test: a package imports the packages of its own list and nothing else of ours."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BASE = {"config", "types", "sharding", "hosts", "recipe"}
PARTS = {"encoders", "connectors", "decoders"}
MODEL = {"config", "types", "sharding", "nn", *PARTS, "models"}
RUN = {*BASE, "nn", *PARTS, "models", "objectives", "data", "generate", "hf"}

MAY_IMPORT = {                          # package -> packages of ours that it may import beside itself
    "config": {"configs"},              # `load` looks a recipe up by its name
    "types": set(), "recipe": {"config"}, "chips": {"config"}, "compiler": {"config", "chips"},
    "sharding": {"config", "types", "chips", "compiler"}, "hosts": {"config", "sharding"},
    "nn": {"config", "types", "sharding"},
    "encoders": {"config", "types", "sharding", "nn"},
    "connectors": {"config", "types", "sharding", "nn"},
    "decoders": {"config", "types", "sharding", "nn"},
    "objectives": {"config", "types", "sharding"},
    "data": {"config", "types"},
    "models": MODEL - {"models"},
    "hf": {*MODEL, "data"},
    "generate": {*MODEL, "data", "hosts"},
    "train": {*RUN, "compiler", "evaluation"},
    "evaluation": RUN,
    "configs": {*RUN, "evaluation", "train"} - {"hf"},
    "launch": {"config", "chips", "sharding"},
    "plan": {*RUN, "chips", "compiler", "train", "evaluation", "configs"},
    "commands": {*RUN, "chips", "train", "evaluation", "configs", "launch", "plan"},
    "cli": {"config", "commands", "data", "launch"},
}
# Stronger than the list: workers that read data touch no device.
NEVER = {"data": {"jax", "flax", "optax", "torch", "tensorflow"}}
ONLY_TESTS = {"torch"}                  # never imported by the library itself


def files() -> list[Path]:
    return sorted(p for top in ("mllm_jax", "configs", "launch") for p in (ROOT / top).rglob("*.py"))


def package_of(path: Path) -> str:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return rest[0] if top == "mllm_jax" else top


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a file imports; `from mllm_jax import x` is mllm_jax.x."""
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: imports are absolute here"
            names = [alias.name for alias in node.names] if node.module == "mllm_jax" else [""]
            out += [(node.lineno, f"{node.module}.{name}".rstrip(".")) for name in names]
    return out


def faults(path: Path) -> list[str]:
    """What a file may not import, as "connectors/pool.py:12: connectors may not import decoders"."""
    package = package_of(path)
    if package == "__init__":
        return []
    out, where = [], path.relative_to(ROOT / "mllm_jax") if (ROOT / "mllm_jax") in path.parents else path.relative_to(ROOT)
    for line, name in imports(path):
        top, *rest = name.split(".")
        if top == "mllm_jax" and rest and rest[0] != package and rest[0] not in MAY_IMPORT[package]:
            out.append(f"{where}:{line}: {package} may not import {rest[0]}")
        if top in NEVER.get(package, set()) | ONLY_TESTS:
            out.append(f"{where}:{line}: {package} may not import {top}")
    return out


def test_every_package_has_a_floor():
    missing = {package_of(p) for p in files()} - set(MAY_IMPORT) - {"__init__"}
    assert not missing, f"say in MAY_IMPORT what these may import: {sorted(missing)}"


def test_imports_go_down():
    assert not (found := [fault for path in files() for fault in faults(path)]), "\n".join(found)


def test_no_two_packages_import_each_other():
    """The lists themselves are floors: following them never comes back, but for the name that `config` looks up."""
    graph = {k: set(v) - {"configs"} if k == "config" else set(v) for k, v in MAY_IMPORT.items()}
    done: set[str] = set()
    while ready := [k for k, v in graph.items() if k not in done and v <= done]:
        done |= set(ready)
    assert done == set(graph), f"a circle among {sorted(set(graph) - done)}"


@pytest.mark.parametrize(("file", "text", "fault"), [
    ("connectors/pool.py", "import math\n\nfrom mllm_jax.decoders.transformer import Decoder\n", "3: connectors may not import decoders"),
    ("data/x.py", "import jax.numpy as jnp\n", "1: data may not import jax"),
    ("objectives/x.py", "def f():\n    from mllm_jax import models\n", "2: objectives may not import models"),
    ("hf/x.py", "import torch\n", "1: hf may not import torch"),
])
def test_a_fault_is_found_and_names_file_and_line(file, text, fault, tmp_path, monkeypatch):
    monkeypatch.setattr("test_floors.ROOT" if __name__ == "test_floors" else f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "mllm_jax" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert faults(path) == [f"{file}:{fault}"]
