"""Chips that are not here: their names, and their devices for the compiler.

`libtpu` compiles for any topology on a CPU; chips.py says what each can do.
"""

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from mllm_jax.chips import TPUS, Chip
from mllm_jax.config import ConfigError, nearest
from mllm_jax.types import record

# libtpu looks for a machine with TPUs, and for a lock that says it is the only one; neither matters to a compiler.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled",
               "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
FORM = "write it as GENERATION:AxB, such as v5e:16x16, or AxBxC for v4 and v5p, such as v5p:4x4x8"


@record
class Topology:
    """One or several slices of a kind of chip."""

    name: str                           # "v5e:16x16"
    slices: int
    chip: Chip
    sides: tuple[int, ...]
    devices: tuple[jax.Device, ...]     # compile for them; nothing can run on them

    @property
    def hosts(self) -> int:
        return -(-len(self.devices) // self.chip.per_host)

    @property
    def coords(self) -> list[tuple[int, ...]]:
        """Place of each device: in the torus, and its slice."""
        return [(*d.coords, getattr(d, "slice_index", None) or 0) for d in self.devices]

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def topology(name: str, slices: int = 1) -> Topology:
    """The topology of that name.

    Raises:
      ConfigError: no such chip, a shape that it does not come in, or libtpu is not installed.
    """
    kind, _, text = name.partition(":")
    if kind not in TPUS:
        raise ConfigError(f"no TPU is called {kind!r}; nearest: {nearest(kind, TPUS)}; {FORM}")
    chip = TPUS[kind]
    if not re.fullmatch(r"\d+(x\d+)*", text) or len(text.split("x")) != chip.dims:
        raise ConfigError(f"the topology {name!r} has not the {chip.dims} sides of a {kind}; {FORM}")
    sides = tuple(map(int, text.split("x")))
    if min(sides) < 1 or slices < 1:
        raise ConfigError(f"the topology {name!r} with {slices} slices has no chip; {FORM}")
    try:
        _load()
    except Exception as error:          # noqa: BLE001  of several kinds
        raise ConfigError('libtpu, the compiler for TPUs, does not start; is it installed? pip install "mllm_jax[plan]"') from error
    wrap = tuple(n % chip.wraps_at == 0 for n in sides) + (False,) * (3 - len(sides))
    options = {"wrap": wrap} | ({"num_slices": slices} if slices > 1 else {}) | ({"chip_config_name": "megacore"} if kind == "v4" else {})
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:          # noqa: BLE001  of several kinds, all with a status code and long
        raise ConfigError(f"there is no topology {name!r}: {' '.join(str(error).split())[:200]}; {FORM}") from error
    if len(devices) != slices * math.prod(sides):
        raise ConfigError(f"the topology {name!r} came with {len(devices)} devices instead of {slices * math.prod(sides)}; "
                          "this version of libtpu is not known here")
    return Topology(name=name, slices=slices, chip=chip, sides=sides, devices=tuple(devices))


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """Keeps what is compiled inside out of the cache on disk: no program for devices that are not here can be read back from it."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


@functools.cache
def _load() -> None:
    """Starts libtpu, once in a process, with a program of nothing.

    It reads XLA_FLAGS too, which jax has read by then, and ends the process at a flag that it does not know.
    """
    jax.devices("cpu")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        [device, *_] = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
        one = jax.ShapeDtypeStruct((), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
        with not_kept():
            jax.jit(lambda x: x).lower(one).compile()
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags
