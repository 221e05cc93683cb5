"""How a module of an official repository becomes a fixture: weights, an input, what comes out, and gradients.

The official code is read from a clone and never stored here.  A script `make_*.py` beside this file names repository
and commit, makes a tiny module, and calls `record`.  `read` is for the tests, and needs numpy alone.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
Group = dict[str, np.ndarray]


def read(name: str) -> tuple[Group, Group, Group]:
    """(x, y, pull and dx; weights by their official names; gradients of sum(y * pull) by the weights)."""
    return groups(dict(np.load(HERE / f"{name}.npz")))


def groups(arrays: Group) -> tuple[Group, Group, Group]:
    part = lambda head: {k.removeprefix(head): v for k, v in arrays.items() if k.startswith(head)}
    return part("io/"), part("weight/"), part("grad/")


def package(clone: Path, name: str, **stubs: types.ModuleType) -> types.ModuleType:
    """A package of a clone whose `__init__` is not run; stubs stand for submodules that need what is not installed."""
    module = types.ModuleType(name)
    module.__path__ = [str(clone / name.replace(".", "/"))]
    sys.modules[name] = module
    for sub, stub in stubs.items():
        sys.modules[f"{name}.{sub}"] = stub
    return module


def load(clone: Path, module: str) -> types.ModuleType:
    """A module of a clone, by its dotted name."""
    sys.path.insert(0, str(clone))
    return importlib.import_module(module)


def randomize(module: Any, seed: int = 0) -> Any:
    """Every weight anew, norms and biases too, so that swapped or missing ones do not pass unnoticed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = name.endswith("weight") and p.ndim == 1
            p.copy_(1 + 0.2 * noise if scale else noise * (0.2 if p.ndim == 1 else max(p[0].numel(), 1) ** -0.5))
    return module


def run(module: Any, x: np.ndarray, call: Any = None) -> Group:
    """A forward pass of x, and a backward pass from a random direction."""
    import torch

    x = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    module.eval().zero_grad()
    # Some modules add to their input in place.
    y = (call or module)(x * 1.0)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * pull).sum().backward()
    numpy = lambda t: t.detach().numpy()
    arrays = {"io/x": numpy(x), "io/y": numpy(y), "io/pull": numpy(pull), "io/dx": numpy(x.grad)}
    for key, p in module.named_parameters():
        arrays[f"weight/{key}"] = numpy(p)
        if p.grad is not None:
            arrays[f"grad/{key}"] = numpy(p.grad)
    return arrays


def record(name: str, module: Any, x: np.ndarray, call: Any = None) -> None:
    """Writes `<name>.npz`."""
    arrays = run(module, x, call)
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    print(f"{name}.npz: {sum(a.size for a in arrays.values())} numbers, {(HERE / f'{name}.npz').stat().st_size // 1024} kB")
