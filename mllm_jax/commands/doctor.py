"""`mllm-jax doctor`: what this machine has, what is known to clash, and whether a small program runs."""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mllm_jax.chips import GIB
from mllm_jax.commands import common

HELP = """Check versions, devices, memory and known conflicts.

A small program is compiled and run.  Exit code 1 if something is broken; warnings alone do not count.

examples:
  mllm-jax doctor
  mllm-jax doctor --layout cpu-8
"""

PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "safetensors",
    "numpy", "pillow", "opencv-python-headless", "pyarrow", "tensorflow", "torch", "mllm_jax",
)
OPTIONAL = {"libtpu", "opencv-python-headless", "tensorflow", "torch"}

# (package, lowest version that works, what goes wrong below it)
LOWEST = (
    ("jax", "0.10.2", "the code is written for the mesh and sharding rules since then"),
    ("flax", "0.12.8", "modules are pytrees only since then"),
    ("optax", "0.2.8", ""),
    ("orbax-checkpoint", "0.12.8", "checkpoints are written through its v1 interface"),
    ("grain", "0.2.18", "the state of mixed and packed streams is exact since then"),
    ("transformers", "5.20", "processors without torch, and the rope_parameters of config.json"),
    ("numpy", "2.0", ""),
)
BELOW = (("grain", "0.3", "its iterator states have another form"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_layout(parser)


def run(args: argparse.Namespace) -> int:
    versions = {p: version(p) for p in PACKAGES}
    facts = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}, {cores()} cores",
        "memory": memory(),
        "disk": f"{shutil.disk_usage('.').free / GIB:.0f} GiB free here",
    }
    problems = list(conflicts(versions, sys.version_info[:2]))
    problems += list(surroundings(os.environ, Path("/dev/shm"), platform.system()))
    if not any(broken for broken, _ in problems):
        try:
            running, layout = common.start(args)
            facts |= devices(layout)
            facts["processes"] = f"{running.processes}" + (f", started by {running.cluster}" if running.cluster else "")
        except Exception as error:
            problems.append((True, f"a small program does not run: {type(error).__name__}: {' '.join(str(error).split())}"))
    for name, value in (facts | {"versions": ", ".join(f"{k} {v}" for k, v in versions.items() if v)}).items():
        print(f"{name:<10} {value}")
    for broken, text in problems:
        print(f"{'broken' if broken else 'warning':<10} {text}")
    broken = any(b for b, _ in problems)
    print("broken: see above" if broken else "all is well" if not problems else "works, with warnings")
    return 1 if broken else 0


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def conflicts(versions: Mapping[str, str | None], python: tuple[int, int]) -> Iterator[tuple[bool, str]]:
    """(whether it breaks, what to do) of the packages."""
    at_least = lambda have, want: _key(have) >= _key(want)
    if python < (3, 11):
        yield True, f"Python {python[0]}.{python[1]} is too old; make an environment with Python 3.11 or later"
    for package in versions:
        if versions[package] is None and package not in OPTIONAL:
            yield True, f"{package} is not installed; run `pip install -e .` in the project"
    for package, lowest, why in LOWEST:
        have = versions.get(package)
        if have and not at_least(have, lowest):
            reason = f": {why}" if why else ""
            yield True, f"{package} {have} is older than {lowest}{reason}; run `pip install -U '{package}>={lowest}'`"
    for package, bound, why in BELOW:
        have = versions.get(package)
        if have and at_least(have, bound):
            yield True, f"{package} {have} is not below {bound}: {why}; run `pip install '{package}<{bound}'`"
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    if jax and jaxlib and _key(jax)[:2] != _key(jaxlib)[:2]:
        yield True, f"jax {jax} and jaxlib {jaxlib} do not belong together; run `pip install -U jax jaxlib`"
    if versions.get("tensorflow"):
        yield False, "TensorFlow is installed: nothing here needs it, and once imported it takes the accelerator's memory"


def surroundings(env: Mapping[str, str], shm: Path, system: str) -> Iterator[tuple[bool, str]]:
    """(whether it breaks, what to do) of the machine and the environment."""
    if system == "Linux" and shm.exists() and (size := shutil.disk_usage(shm).total) < GIB:
        yield False, (f"{shm} holds {size / GIB:.2f} GiB: reading with data.workers > 0 needs 1 GiB; "
                      "in a container, start it with --shm-size=8g")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" in env:
        yield False, f"XLA_PYTHON_CLIENT_MEM_FRACTION={env['XLA_PYTHON_CLIENT_MEM_FRACTION']} limits the memory of the accelerator"
    if env.get("JAX_ENABLE_X64", "0").lower() in ("1", "true"):
        yield False, "JAX_ENABLE_X64 is set: numbers become float64, slower and other than published; unset it"
    if env.get("JAX_DISABLE_JIT", "0").lower() in ("1", "true"):
        yield True, "JAX_DISABLE_JIT is set: nothing would be compiled; unset it"
    lock = Path("/tmp/libtpu_lockfile")
    if lock.exists() and not os.access(lock, os.R_OK | os.W_OK):
        yield True, f"{lock} belongs to another user, so the TPU cannot be opened; end their process and delete it"


def devices(layout: object) -> dict[str, str]:
    """What jax sees, and how long a matmul takes to compile and run on the layout's mesh."""
    import jax
    import jax.numpy as jnp

    from mllm_jax.sharding import rows

    found = jax.devices()
    kinds = {d.device_kind for d in found}
    stats = found[0].memory_stats() or {}
    room = f", {stats['bytes_limit'] / GIB:.1f} GiB each" if "bytes_limit" in stats else ""
    mesh = layout.make_mesh()
    began = time.monotonic()
    x = jax.device_put(jnp.ones((mesh.size * 8, 128)), rows(mesh))
    total = float(jax.jit(lambda a: (a @ a.T).sum())(x))
    if total != (mesh.size * 8) ** 2 * 128:
        raise ArithmeticError(f"a sum of ones came out as {total}")
    sizes = " x ".join(f"{k}={n}" for k, n in mesh.shape.items())
    return {
        "devices": f"{len(found)} x {', '.join(sorted(kinds))} ({jax.default_backend()}){room}",
        "layout": f"{sizes}, {layout.dtype}",
        "program": f"compiled and ran in {time.monotonic() - began:.1f} s",
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(read: Callable[[], str] = lambda: Path("/proc/meminfo").read_text()) -> str:
    try:
        kib = {k: int(v.split()[0]) for k, _, v in (line.partition(":") for line in read().splitlines())}
    except OSError:                     # no such file outside Linux
        return "unknown"
    return f"{kib['MemAvailable'] / (1 << 20):.1f} GiB free of {kib['MemTotal'] / (1 << 20):.1f} GiB"


def _key(text: str) -> tuple[int, ...]:
    """"0.10.2rc1" -> (0, 10, 2): enough to compare releases."""
    match = re.match(r"\d+(\.\d+){0,2}", text)
    return tuple(map(int, match[0].split("."))) if match else ()
