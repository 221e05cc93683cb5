"""From axis names to shardings: the only file that knows both.

A parameter names its axes where it is created (`param(rngs, (d, f), "embed mlp")`), a layout says
what those names mean on a mesh, and the launcher chooses the layout.  Nothing else mentions a mesh.

A layout is also where precision and rematerialization are chosen; layers ask `current()` while they
are traced.  One program is traced under one layout: make the jitted function anew for another.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from dataclasses import field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mllm_jax.config import ConfigError, config

Rules = Mapping[str, str | tuple[str, ...] | None]

BATCH_AXES = ("data", "fsdp", "expert")
FSDP_TENSOR: Rules = {
    "batch": BATCH_AXES,
    "embed": ("fsdp", "expert"), "expert": "expert", "mlp": "tensor", "heads": "tensor", "kv_heads": "tensor", "vocab": "tensor",
}


@config
class Layout:
    """How a program is laid out on devices; what it computes does not depend on it."""

    mesh: Mapping[str, int] = field(default_factory=lambda: {"data": -1, "fsdp": 1, "tensor": 1})   # -1: the rest
    rules: Mapping[str, str | tuple[str, ...] | None] = field(default_factory=lambda: dict(FSDP_TENSOR))
    dtype: str = "float32"              # of matmuls; parameters, norms, softmax and losses stay float32
    remat: str = "none"                 # what a layer recomputes in the backward pass: "none", "dots" or "full"
    microbatches: int = 1               # a step's rows are processed in so many parts
    unroll: int = 1                     # layers in one iteration of the loop over layers

    def make_mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
        """The mesh over these devices (all by default).

        Raises:
          ConfigError: the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes, rest = dict(self.mesh), [k for k, n in self.mesh.items() if n == -1]
        known = math.prod(n for n in sizes.values() if n != -1)
        if len(rest) > 1 or known < 1 or len(devices) % known or (not rest and known != len(devices)):
            want = " x ".join(f"{k}={n}" for k, n in sizes.items())
            raise ConfigError(f"the mesh {want} does not fit {len(devices)} devices; change the layout's mesh sizes "
                              f"so that they multiply to {len(devices)} (one may be -1, for the rest)")
        for k in rest:
            sizes[k] = len(devices) // known
        # jax.make_mesh makes explicit axes by default, which change the meaning of every operation.
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


_active: contextvars.ContextVar[tuple[Layout, Mesh | None]] = contextvars.ContextVar("layout", default=(Layout(), None))


@contextlib.contextmanager
def use(layout: Layout, mesh: Mesh | None = None) -> Iterator[None]:
    """Programs traced inside follow this layout; without a mesh only its precision and rematerialization count."""
    token = _active.set((layout, mesh))
    try:
        yield
    finally:
        _active.reset(token)


def current() -> Layout:
    return _active.get()[0]


def current_mesh() -> Mesh | None:
    return _active.get()[1]


def compute_dtype() -> jnp.dtype:
    return jnp.dtype(current().dtype)


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> PartitionSpec:
    """Partition of an array whose last `len(axes)` dimensions have these names.

    A leading axis without a name (stacked layers) is not sharded; nor is an axis that the mesh axes do
    not divide, or whose mesh axes an earlier dimension already uses.
    """
    used: set[str] = set()
    out: list = [None] * (len(shape) - len(axes))
    for name, size in zip(axes, shape[len(out):]):
        wanted = rules.get(name) or ()
        wanted = tuple(a for a in ((wanted,) if isinstance(wanted, str) else wanted) if a in mesh.shape and a not in used)
        if wanted and size % math.prod(mesh.shape[a] for a in wanted) == 0:
            used.update(wanted)
            out.append(wanted if len(wanted) > 1 else wanted[0])
        else:
            out.append(None)
    return PartitionSpec(*out)


def sharding_of(axes: tuple[str | None, ...], shape: tuple[int, ...], layout: Layout, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(axes, shape, layout.rules, mesh))


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.shape)))


def row_shards(mesh: Mesh | None = None) -> int:
    """Into how many parts the rows of a batch are split; 1 outside a mesh."""
    mesh = _active.get()[1] if mesh is None else mesh
    return 1 if mesh is None else math.prod(mesh.shape[a] for a in BATCH_AXES if a in mesh.shape)


def host_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count) of the part of the rows that this process must read.

    Processes whose devices hold the same rows (tensor parallelism across hosts) read the same part, so
    the answer comes from the sharding and not from the number of processes.
    """
    process = jax.process_index() if process is None else process
    n = row_shards(mesh)
    owned: dict[int, set[int]] = {}
    for device, index in rows(mesh).devices_indices_map((n,)).items():
        owned.setdefault(device.process_index, set()).update(range(*index[0].indices(n)))
    groups = sorted({tuple(sorted(r)) for r in owned.values()})
    if len({len(g) for g in groups}) != 1 or sum(map(len, groups)) != n:
        raise ConfigError(f"hosts hold unequal parts of the batch: {groups}; choose a mesh whose rows divide over hosts")
    return groups.index(tuple(sorted(owned[process]))), len(groups)


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Fixes the sharding of an activation whose axes have these names; does nothing without a mesh."""
    layout, mesh = _active.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding_of(tuple(axes.split()), x.shape, layout, mesh))


def put_rows(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """This process's rows -> the global array whose rows are spread over the mesh."""
    _, hosts = host_share(mesh)
    return jax.make_array_from_process_local_data(rows(mesh), x, (x.shape[0] * hosts, *x.shape[1:]))
