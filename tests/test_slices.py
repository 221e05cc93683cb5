"""Meshes over several slices: which devices are neighbours, on machines that say so and on CPUs that pretend."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mllm_jax.chips import CHIPS, shape_of
from mllm_jax.config import ConfigError
from mllm_jax.launch.layouts import LAYOUTS, auto, machine
from mllm_jax.sharding import Layout, host_share, row_shards


@pytest.fixture(scope="module")
def devices_of():
    """Those of a topology that is not here: (chip, shape of a slice, slices) -> devices; needs libtpu."""
    pytest.importorskip("libtpu")
    from mllm_jax.plan.topology import topology

    return lambda chip, shape, slices=1: list(topology(f"{chip}:{shape}", slices).devices)


def test_data_goes_over_the_slices_as_jax_would_have_it(devices_of):
    """The oracle is jax's own hybrid mesh: the same slices, in the same physical order inside each."""
    from jax.experimental.mesh_utils import create_hybrid_device_mesh

    devices = devices_of("v5e", "4x4", 2)
    layout = replace(LAYOUTS["v5e-16x2"], mesh={"data": 2, "fsdp": 8, "tensor": 1})
    mesh = layout.make_mesh(devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 8, "tensor": 1} and row_shards(mesh) == 32
    want = create_hybrid_device_mesh((2, 8, 1), (2, 1, 1), devices, allow_split_physical_axes=True)
    assert (mesh.devices == want).all()
    assert [[d.slice_index for d in row.flat] for row in mesh.devices] == [[0] * 8, [0] * 8, [1] * 8, [1] * 8]


def test_neighbours_of_a_mesh_axis_are_neighbours_on_the_wires(devices_of):
    mesh = Layout(mesh={"fsdp": 4, "tensor": 4}).make_mesh(devices_of("v5e", "4x4"))
    place = np.array([d.coords for d in mesh.devices.flat]).reshape(4, 4, 3)
    for axis in (0, 1):
        hops = np.abs(np.diff(place, axis=axis)).sum(-1)
        assert (hops == 1).all()


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n.startswith("v") and machine(n).chips > 1])
def test_a_named_layout_fits_the_slices_of_its_name_and_each_machine_reads_rows_of_its_own(name, devices_of):
    chip, chips, slices = machine(name)
    mesh = LAYOUTS[name].make_mesh(devices := devices_of(chip, shape_of(chip, chips), slices))
    assert mesh.size == chips * slices and len({d.id for d in mesh.devices.flat}) == mesh.size
    machines = len({d.process_index for d in devices})
    assert machines == chips * slices // CHIPS[chip].per_host and host_share(mesh, 0) == (0, machines)


@pytest.mark.parametrize(("sizes", "parts"), [({"context": 16}, 1), ({"data": 4, "context": 4}, 4)], ids=str)
def test_machines_with_positions_of_the_same_rows_read_the_same_rows(sizes, parts, devices_of):
    mesh = Layout(mesh=sizes).make_mesh(devices := devices_of("v4", "2x2x4"))
    machines = {d.process_index for d in devices}
    assert len(machines) == 4
    shares = [host_share(mesh, p) for p in machines]
    assert {n for _, n in shares} == {parts} and sorted(i for i, _ in shares) == sorted(list(range(parts)) * (4 // parts))


def test_another_number_of_slices_is_one_line(devices_of):
    devices = devices_of("v5e", "4x4", 2)
    with pytest.raises(ConfigError, match=r"the layout is for 1 slices and 32 devices are here, in 2; .* slices=2"):
        LAYOUTS["v5e-16"].make_mesh(devices)
    assert dict(auto("tpu").make_mesh(devices).shape) == {"data": 2, "fsdp": 16, "tensor": 1}


def test_cpus_pretend_slices_in_their_order():
    devices = jax.devices()
    layout = Layout(mesh={"data": 1, "fsdp": 2, "tensor": 2}, slices=2)
    mesh = layout.make_mesh(devices[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2} and row_shards(mesh) == 4 and host_share(mesh) == (0, 1)
    assert [d.id for d in mesh.devices.flat] == [d.id for d in devices[:8]]


@pytest.mark.parametrize(("change", "says"), [
    ({"slices": 3}, "for 3 slices and 8 devices are here, in 1; choose a layout of 1, or change it with slices=1"),
    ({"slices": 2, "mesh": {"fsdp": 4}}, "needs the axis data"),
    ({"slices": 2, "mesh": {"data": 8}}, r"does not fit 4 devices of each of 2 slices"),
])
def test_what_cannot_be_is_one_line(change, says):
    with pytest.raises(ConfigError, match=says):
        replace(Layout(), **change).make_mesh(jax.devices()[:8])
