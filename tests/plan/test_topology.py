"""Names of topologies, and meshes over their devices."""

import pytest

pytest.importorskip("libtpu")

from mllm_jax.config import ConfigError  # noqa: E402
from mllm_jax.plan.topology import topology  # noqa: E402
from mllm_jax.sharding import Layout  # noqa: E402


@pytest.mark.parametrize(("name", "slices", "chips", "hosts"), [
    ("v5e:2x2", 1, 4, 1), ("v5e:16x16", 1, 256, 64), ("v6e:4x4", 2, 32, 8), ("v4:2x2x4", 1, 16, 4), ("v5p:4x4x4", 1, 64, 16)])
def test_a_topology_has_its_chips_each_of_them_one_device(name, slices, chips, hosts):
    found = topology(name, slices)
    assert (len(found.devices), found.hosts) == (chips, hosts)
    assert len(set(found.coords)) == chips
    assert {d.platform for d in found.devices} == {"tpu"}


@pytest.mark.parametrize(("name", "message"), [
    ("v5:4x4", "no TPU is called 'v5'; nearest: v5p, v5e"),
    ("v5e:4x4x4", "has not the 2 sides of a v5e; write it as"),
    ("v5e", "has not the 2 sides"),
    ("v5e:3x5", "there is no topology 'v5e:3x5'"),
    ("v5e:0x4", "has no chip"),
])
def test_a_topology_that_does_not_exist_is_one_clear_line(name, message):
    with pytest.raises(ConfigError, match=message) as error:
        topology(name)
    assert "\n" not in str(error.value)


def test_neighbours_in_a_mesh_are_neighbours_in_the_torus():
    """Of a mesh that has a side for each side of the torus every axis goes along one side."""
    mesh = Layout(mesh={"fsdp": 8, "tensor": 4}).make_mesh(list(topology("v5e:8x4").devices))
    places = [[d.coords for d in row] for row in mesh.devices]
    assert all(len({c[0] for c in row}) == 1 or len({c[1] for c in row}) == 1 for row in places)


def test_slices_differ_in_the_axis_data_alone():
    found = topology("v5e:2x4", 2)
    mesh = Layout(mesh={"data": 2, "fsdp": -1, "tensor": 2}, slices=2).make_mesh(list(found.devices))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
    slices = [{d.slice_index for d in part.flat} for part in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(ConfigError, match="the layout is for 1 slices and 16 devices are here, in 2"):
        Layout(mesh={"data": 1, "fsdp": -1}).make_mesh(list(found.devices))
