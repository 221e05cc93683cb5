"""Rows come back in their order, and values as they were."""

import jax
import numpy as np
import pytest

from mllm_jax.hosts import agree, gather, is_writer, local_rows
from mllm_jax.sharding import Layout, put_rows


@pytest.mark.parametrize(
    "mesh",
    [{"data": 8, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 8}],
)
def test_rows_come_back_in_their_order(mesh):
    mesh = Layout(mesh=mesh).make_mesh()
    x = np.arange(48).reshape(16, 3)
    np.testing.assert_array_equal(local_rows(put_rows(x, mesh)), x)
    assert is_writer(mesh)


def test_rows_of_one_device():
    x = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(local_rows(jax.device_put(x, jax.devices()[0])), x)


def test_a_single_process_agrees_with_itself():
    value = {"a": [1, 2**40, 0.1 + 0.2]}
    assert gather(value) == [value]
    agree(None)
    with pytest.raises(KeyError, match="mine"):
        agree(KeyError("mine"))
