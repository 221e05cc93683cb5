"""The order of records, and processes for sources."""

import pytest

from mllm_jax.data.entries import Entries, share


@pytest.mark.parametrize("count", [1, 2, 100, 4096, 5000])
def test_an_epoch_is_a_permutation_of_the_source_however_large(count):
    entries = Entries("s", range(count), None, {}, None, "raise", "token", "seed")
    orders = [[entries.order(epoch, k) for k in range(count)] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    assert count < 100 or orders[0] != orders[1]
    assert orders[0][: count // 2] == [entries.order(0, k) for k in range(count // 2)]


def test_workers_are_shared_by_weight():
    assert share(4, {"a": 0.5, "b": 0.25, "c": 0.25}) == {"a": 2, "b": 1, "c": 1}
    assert share(2, {"a": 1.0, "b": 1.0, "c": 0.1}) == {"a": 1, "b": 1, "c": 0}
