"""Every way to put eight devices into a mesh of data, fsdp and tensor, with the rows of a step in one, two or four parts.

And some in which the positions of a row are split too: with heads for all devices, with too few of them, and with M-RoPE.
"""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest

from mllm_jax.config import load
from mllm_jax.objectives import NextToken
from mllm_jax.sharding import Layout
from tests.synthetic import llava
from tests.train import test_step

MESHES = [sizes for sizes in product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8]
MICROBATCHES = (1, 2, 4)
CONTEXTS = [{"context": 8}, {"fsdp": 4, "context": 2}, {"data": 2, "context": 4}, {"fsdp": 2, "tensor": 2, "context": 2}]


def small():
    """One layer of each kind, and eight heads, so that every mesh splits them."""
    model = llava()
    image = model.inputs["image"]
    image = replace(image, encoder=replace(image.encoder, depth=2, heads=8, width=32))
    return replace(model, inputs={"image": image}, decoder=replace(model.decoder, depth=1, heads=8, kv_heads=8, width=32))


def few():
    """Six heads, which are not for four devices: those gather the keys."""
    model = small()
    return replace(model, decoder=replace(model.decoder, heads=6, kv_heads=2, head_dim=8))


def qwen():
    """Images of a row in one line of patches, which is split too, and positions by time, row and column."""
    return load("resolution/qwen2_vl").tiny().model


CASES = {"small": small, "few": few, "qwen": qwen}


def gradients(layout: Layout, case: str = "small") -> tuple[dict, dict]:
    """Of two rows at least for each device and part: a product of one row sums in an order of its own."""
    return test_step.gradients(case, layout, rows=64)


@pytest.fixture(scope="module", autouse=True)
def one():
    with pytest.MonkeyPatch.context() as patch:
        for name, make in CASES.items():
            patch.setitem(test_step.CASES, name, (make, {"lm": NextToken()}))
        yield cache(lambda case: gradients(test_step.ONE, case))


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "data={} fsdp={} tensor={}".format(*s))
@pytest.mark.parametrize("microbatches", MICROBATCHES)
def test_loss_and_gradients_are_those_of_one_device(sizes, microbatches, one):
    same(Layout(mesh=dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), microbatches=microbatches), "small", one)


@pytest.mark.parametrize(("case", "mesh", "microbatches"), [
    *[("small", mesh, 1 + i % 2) for i, mesh in enumerate(CONTEXTS)],
    *[(case, mesh, 1) for case in ("few", "qwen") for mesh in CONTEXTS[2:]],
], ids=str)
def test_so_they_are_where_rows_are_split(case, mesh, microbatches, one, capfd):
    same(Layout(mesh=mesh, microbatches=microbatches), case, one)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def same(layout: Layout, case: str, one) -> None:
    grads, scores = gradients(layout, case)
    want, want_scores = one(case)
    assert scores == pytest.approx(want_scores, rel=1e-6)
    whole = lambda of: np.sqrt(sum(np.sum(np.square(of(k), dtype=np.float64)) for k in want))
    # Float32 sums in another order; of all gradients together, for a small one is the difference of large ones.
    assert whole(lambda k: grads[k] - want[k]) <= 1e-6 * whole(lambda k: want[k])
    assert max(np.abs(grads[k] - want[k]).max() for k in want) <= 1e-6
