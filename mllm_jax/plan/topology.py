"""Chips that are not here: their names, what they can do, and their devices for the compiler.

`libtpu` compiles for any topology on a CPU.  Rates are of one device as jax counts them, which on every chip listed
here is a whole chip; v4 is asked for in the form that has its two cores as one.  Peaks, memories and links are the
vendor's figures (docs of Cloud TPU, "System architecture"), one way for links; DCN is the share of a chip of its host's network card.
"""

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from mllm_jax.config import ConfigError, nearest
from mllm_jax.types import record

GIB = 1 << 30


@record
class Chip:
    peak: float                         # bf16 operations/s
    clock: float                        # cycles/s
    hbm: float                          # bytes
    hbm_rate: float                     # bytes/s
    link: float                         # bytes/s of one ICI link, one way
    dims: int                           # of the torus
    wraps_at: int                       # a side is a ring when it is a multiple of this
    dcn: float                          # bytes/s to other slices
    host_rate: float                    # bytes/s between the chip and the memory of its host
    per_host: int                       # chips of one host
    host_cores: int                     # processors of such a host (half its virtual ones)
    cores: int = 1
    # Cycles of a splash attention kernel, from its bundle schedule: forward per block of 512 x 512 and head, overhead of a
    # grid step, of a row of blocks; backward per block, overhead of a step.
    splash: tuple[float, ...] = (1192, 165, 363, 2428, 300)
    # The same of nn/flash.py for a causal row of 4096, all in all: forward and backward (benchmarks/flash_cycles.py).
    flash: tuple[float, float] = (1410, 2601)


CHIPS = {
    "v4": Chip(peak=275e12, clock=1.05e9, hbm=32 * GIB, hbm_rate=1.23e12, link=4.5e10, dims=3, wraps_at=4, dcn=6.25e9, host_rate=1.5e10,
               per_host=4, host_cores=120, cores=2, splash=(1181, 420, 345, 2344, 330), flash=(2164, 2730)),
    "v5e": Chip(peak=197e12, clock=1.5e9, hbm=16 * GIB, hbm_rate=8.19e11, link=4.5e10, dims=2, wraps_at=16, dcn=3.125e9, host_rate=1.5e10,
                per_host=4, host_cores=56),
    "v5p": Chip(peak=459e12, clock=1.75e9, hbm=95 * GIB, hbm_rate=2.765e12, link=9e10, dims=3, wraps_at=4, dcn=6.25e9, host_rate=1.5e10,
                per_host=4, host_cores=104, cores=2, splash=(1181, 420, 345, 2344, 330), flash=(1433, 2621)),
    "v6e": Chip(peak=918e12, clock=1.75e9, hbm=32 * GIB, hbm_rate=1.64e12, link=9e10, dims=2, wraps_at=16, dcn=1.25e10, host_rate=3.2e10,
                per_host=4, host_cores=90, splash=(945, 220, 184, 1591, 250), flash=(1132, 1573)),
}
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
    if kind not in CHIPS:
        raise ConfigError(f"no chip is called {kind!r}; nearest: {nearest(kind, CHIPS)}; {FORM}")
    chip = CHIPS[kind]
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
