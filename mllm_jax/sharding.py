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
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mllm_jax.chips import check_quantized, chip_of
from mllm_jax.compiler import check_flags
from mllm_jax.config import ConfigError, config

Rules = Mapping[str, str | tuple[str, ...] | None]

BATCH_AXES = ("data", "fsdp", "expert")
CONTEXT = "context"                     # splits the positions of a row, and parameters: devices with other positions need all of them in turn
FSDP_TENSOR: Rules = {
    "batch": BATCH_AXES, "seq": CONTEXT,
    "item": (*BATCH_AXES, CONTEXT),     # media items of all rows, each whole on one device
    "row_heads": ("tensor", CONTEXT),   # heads, where rows are whole: nn/context.py
    "row_width": CONTEXT,               # the width, where rows are whole: `pick`
    "embed": ("fsdp", "expert", CONTEXT), "expert": "expert", "mlp": "tensor", "heads": "tensor", "kv_heads": "tensor", "vocab": "tensor",
}
PARAMETER_AXES = ("embed", "expert", "mlp", "heads", "kv_heads", "vocab")
LARGE = 1 << 18                         # numbers of a parameter on one device, 1 MiB, from which on every axis splits it


@config
class Layout:
    """How a program is laid out on devices; what it computes does not depend on it, but for `dtype` and `quantize`."""

    mesh: Mapping[str, int] = field(default_factory=lambda: {"data": -1, "fsdp": 1, "tensor": 1})   # -1: the rest
    rules: Mapping[str, str | tuple[str, ...] | None] = field(default_factory=lambda: dict(FSDP_TENSOR))
    dtype: str = "float32"              # of matmuls; parameters, norms, softmax and losses stay float32
    quantize: str = "none"              # "int8" or "fp8": products of layers in eight bits, on chips that have them: nn/quantized.py
    remat: str = "none"                 # what a layer keeps for its backward pass: "none" is computed again, or see nn/remat.py
    microbatches: int = 1               # a step's rows are processed in so many parts
    unroll: int = 1                     # layers in one iteration of the loop over layers
    slices: int = 1                     # the mesh is that of one slice; `data` is so many times longer, over their network.  -1: all there are
    attention: str = "auto"             # "auto": by the platform's own kernel; "xla"; or its name: "flash" on TPU, "cudnn" on GPU
    flags: str = "auto"                 # for XLA on TPUs: those of the chip; "none"; or sets joined by "+": compiler.py

    def make_mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
        """The mesh over these devices (all by default); with several slices, neighbours along `data` may be of two of them.

        Raises:
          ConfigError: the sizes do not multiply to the number of devices of a slice, there are not so many slices, the chips
            cannot do what `quantize` asks, or `flags` are not known.
        """
        devices = jax.devices() if devices is None else list(devices)
        check_quantized(self.quantize, devices[0].device_kind)
        check_flags(self.flags)
        groups = _slices(devices, self.slices)
        sizes = self.sizes(len(groups[0]), len(groups))
        # In an order that makes neighbours of a mesh axis neighbours on the wires; where an axis of the mesh is a part of one of the
        # torus, or spans two, it is split.
        place = lambda group: create_device_mesh(tuple(sizes.values()), group, allow_split_physical_axes=group[0].platform == "tpu")
        grid = [place(group) for group in groups]
        ordered = np.concatenate(grid, axis=list(sizes).index("data")) if len(grid) > 1 else grid[0]
        # Mesh makes automatic axes only if it is told; explicit ones change the meaning of every operation.
        return Mesh(ordered, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    def sizes(self, each: int, slices: int = 1) -> dict[str, int]:
        """The axes of the mesh of one slice, which has `each` devices and is one of so many.

        Raises:
          ConfigError: the sizes do not multiply to `each`, or there is no axis to go over the slices.
        """
        sizes, rest = dict(self.mesh), [k for k, n in self.mesh.items() if n == -1]
        known = math.prod(n for n in sizes.values() if n != -1)
        if len(rest) > 1 or known < 1 or each % known or (not rest and known != each):
            want = " x ".join(f"{k}={n}" for k, n in sizes.items())
            of = "" if slices == 1 else f" of each of {slices} slices"
            raise ConfigError(f"the mesh {want} does not fit {each} devices{of}; change the layout's mesh sizes "
                              f"so that they multiply to {each} (one may be -1, for the rest)")
        if slices > 1 and "data" not in sizes:
            raise ConfigError(f"a layout of {slices} slices needs the axis data, which goes over them; add mesh.data=1")
        return sizes | {k: each // known for k in rest}


def _slices(devices: list[jax.Device], wanted: int) -> list[list[jax.Device]]:
    """The devices by the slice that they are in; equal parts in their order where the machine knows none, as CPUs do.

    Raises:
      ConfigError: there are not so many slices, or they are not of one size.
    """
    of: dict[int, list[jax.Device]] = {}
    for device in devices:
        of.setdefault(getattr(device, "slice_index", 0), []).append(device)
    groups = [of[i] for i in sorted(of)]
    if devices[0].platform != "tpu" and wanted > 0 and len(groups) != wanted:
        size = len(devices) // wanted if len(devices) % wanted == 0 else 0
        groups = [devices[i * size:(i + 1) * size] for i in range(wanted)] if size else groups
    if wanted not in (-1, len(groups)):
        raise ConfigError(f"the layout is for {wanted} slices and {len(devices)} devices are here, in {len(groups)}; "
                          f"choose a layout of {len(groups)}, or change it with slices={len(groups)}")
    if len({len(group) for group in groups}) > 1:
        raise ConfigError(f"the slices have unequal numbers of devices: {[len(g) for g in groups]}; start as many processes in each")
    return groups


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


def platform() -> str:
    """Where the program that is traced will run, which need not be where it is traced: "cpu", "gpu" or "tpu"."""
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def fast_memory() -> float:
    """Bytes of it that a core has there; infinite where that is not known."""
    mesh = current_mesh()
    chip = chip_of((jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]).device_kind)
    return chip.vmem if chip is not None and chip.vmem else math.inf


def compute_dtype() -> jnp.dtype:
    return jnp.dtype(current().dtype)


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> PartitionSpec:
    """Partition of an array whose last `len(axes)` dimensions have these names.

    A leading axis without a name (stacked layers) is not sharded, nor is an axis over mesh axes that an earlier dimension
    already uses; of the mesh axes wanted, the first ones are taken that divide it together.
    """
    used: set[str] = set()
    out: list = [None] * (len(shape) - len(axes))
    for name, size in zip(axes, shape[len(out):]):
        wanted = rules.get(name) or ()
        wanted = tuple(a for a in ((wanted,) if isinstance(wanted, str) else wanted) if a in mesh.shape and a not in used)
        while wanted and size % math.prod(mesh.shape[a] for a in wanted):
            wanted = wanted[:-1]
        if wanted:
            used.update(wanted)
            out.append(wanted if len(wanted) > 1 else wanted[0])
        else:
            out.append(None)
    return PartitionSpec(*out)


def sharding_of(axes: tuple[str | None, ...], shape: tuple[int, ...], layout: Layout, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(axes, shape, layout.rules, mesh))


def splitting(rules: Rules, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that split parameters."""
    wanted = (rules.get(name) for name in PARAMETER_AXES)
    each = dict.fromkeys(a for w in wanted for a in mesh_axes(w))
    return tuple(a for a in each if mesh.shape.get(a, 1) > 1)


def parameter_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> PartitionSpec:
    """Partition of a parameter: as its axes are named, and a large one by every mesh axis that can.

    Where the named dimensions leave an axis of the mesh unused (32,001 tokens over two chips, a matrix without the width
    of the model), it splits the largest one that it divides.  Whoever uses the parameter gathers it.
    """
    parts = [mesh_axes(p) for p in spec(axes, shape, rules, mesh)]
    local = [n // math.prod(mesh.shape[a] for a in p) for n, p in zip(shape, parts)]
    names = [None] * (len(shape) - len(axes)) + [name or "" for name in axes]
    for axis in splitting(rules, mesh):
        fits = [k for k, n in enumerate(local) if names[k] not in (None, "layers") and n % mesh.shape[axis] == 0]
        if any(axis in p for p in parts) or math.prod(local) < LARGE or not fits:
            continue
        k = max(fits, key=lambda k: local[k])
        parts[k] += (axis,)
        local[k] //= mesh.shape[axis]
    return PartitionSpec(*(None if not p else p[0] if len(p) == 1 else p for p in parts))


def sharding_of_parameter(axes: tuple[str | None, ...], shape: tuple[int, ...], layout: Layout, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, parameter_spec(axes, shape, layout.rules, mesh))


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.shape)))


def positions(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of arrays [b s ...] whose second axis goes along the rows: split over the axis "context" where it divides."""
    along = CONTEXT if CONTEXT in mesh.shape and shape[1] % mesh.shape[CONTEXT] == 0 else None
    return NamedSharding(mesh, PartitionSpec(*rows(mesh).spec, along))


def row_shards(mesh: Mesh | None = None) -> int:
    """Into how many parts the rows of a batch are split; 1 outside a mesh."""
    mesh = _active.get()[1] if mesh is None else mesh
    return 1 if mesh is None else math.prod(mesh.shape[a] for a in BATCH_AXES if a in mesh.shape)


def check_rows(field: str, rows: int, layout: Layout, mesh: Mapping[str, int]) -> None:
    """Raises ConfigError if so many rows, the value of this field, do not divide over a mesh of these sizes and its microbatches."""
    parts = math.prod(mesh.get(a, 1) for a in BATCH_AXES)
    if rows % (need := parts * layout.microbatches):
        raise ConfigError(f"{field} is {rows}; the layout needs a multiple of {need}: {parts} parts of the rows times "
                          f"{layout.microbatches} microbatches; choose {field}={-(-rows // need) * need}, or a smaller layout")


def check_length(field: str, length: int, mesh: Mapping[str, int]) -> None:
    """Raises ConfigError if a row of so many positions, the value of this field, does not divide over a mesh of these sizes."""
    parts = mesh.get(CONTEXT, 1)
    if parts > 1 and length % (2 * parts):
        raise ConfigError(f"{field} is {length}; the layout needs a multiple of {2 * parts}: two pieces of a row for each of the "
                          f"{parts} parts of {CONTEXT}={parts}")


def cut_axes(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[Mesh, tuple[str, ...], tuple[str, ...]] | None:
    """(mesh, outer axes, inner axes): the same devices, each of these axes cut in two so that the inner parts count `size` together.

    Devices that differ in the inner parts alone are neighbours on the axes.  None where no such cut exists.
    """
    inner, left = {}, size
    for name in reversed(axes):
        inner[name] = math.gcd(left, mesh.shape[name])
        left //= inner[name]
        if left > 1 and inner[name] != mesh.shape[name]:
            return None
    if left > 1:
        return None
    names, sizes = [], []
    for name, n in mesh.shape.items():
        names += [f"{name}.out", f"{name}.in"] if name in inner else [name]
        sizes += [n // inner[name], inner[name]] if name in inner else [n]
    cut = Mesh(mesh.devices.reshape(sizes), tuple(names), axis_types=(AxisType.Auto,) * len(names))
    return cut, tuple(f"{a}.out" for a in axes), tuple(f"{a}.in" for a in axes)


def cut_spec(of: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The same partition on a mesh that `cut_axes` made of these axes."""
    return PartitionSpec(*(tuple(b for a in mesh_axes(entry) for b in ((f"{a}.out", f"{a}.in") if a in axes else (a,))) or None for entry in of))


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of a mesh that one entry of a partition names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def host_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count) of the part of the rows that this process must read.

    Processes whose devices hold the same rows (tensor parallelism across hosts) read the same part, so
    the answer comes from the sharding and not from the number of processes.
    """
    parts, mine = _parts(mesh, process)
    return parts.index(mine), len(parts)


def host_rows(mesh: Mesh, count: int) -> tuple[int, ...]:
    """Which rows of a batch of `count` this process holds; with devices in an odd order they need not lie together."""
    each = count // row_shards(mesh)
    return tuple(part * each + row for part in _parts(mesh)[1] for row in range(each))


def _parts(mesh: Mesh, process: int | None = None) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The parts of the rows that hosts hold, of all of them and of one."""
    process = jax.process_index() if process is None else process
    n = row_shards(mesh)
    owned: dict[int, set[int]] = {}
    for device, index in rows(mesh).devices_indices_map((n,)).items():
        owned.setdefault(device.process_index, set()).update(range(*index[0].indices(n)))
    groups = sorted({tuple(sorted(r)) for r in owned.values()})
    if len({len(g) for g in groups}) != 1 or sum(map(len, groups)) != n:
        raise ConfigError(f"hosts hold unequal parts of the batch: {groups}; choose a mesh whose rows divide over hosts")
    return groups, tuple(sorted(owned[process]))


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Fixes the sharding of an activation whose axes have these names; does nothing without a mesh."""
    layout, mesh = _active.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding_of(tuple(axes.split()), x.shape, layout, mesh))


def pick(x: jax.Array, at: jax.Array) -> jax.Array:
    """The positions i32[b n] of the rows f[b m d] -> f[b n d].

    Where positions of a row are split, they are exchanged for parts of the width and back, so that no device holds a row.
    """
    whole = "batch row row_width"
    return constrain(jnp.take_along_axis(constrain(x, whole), constrain(at, "batch row")[..., None], axis=1), whole)


def put_rows(x: np.ndarray, mesh: Mesh, where: NamedSharding | None = None) -> jax.Array:
    """This process's rows -> the global array whose rows, or what the sharding says, are spread over the mesh."""
    _, hosts = host_share(mesh)
    return jax.make_array_from_process_local_data(where or rows(mesh), x, (x.shape[0] * hosts, *x.shape[1:]))
