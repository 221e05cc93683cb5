"""Every way to put eight devices into a mesh of data, fsdp and tensor, with the rows of a step in one, two or four parts."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from mllm_jax.objectives import NextToken
from mllm_jax.sharding import Layout
from tests.synthetic import llava
from tests.train import test_step

MESHES = [sizes for sizes in product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8]
MICROBATCHES = (1, 2, 4)


def small():
    """One layer of each kind, and eight heads, so that every mesh splits them."""
    model = llava()
    image = model.inputs["image"]
    image = replace(image, encoder=replace(image.encoder, depth=2, heads=8, width=32))
    return replace(model, inputs={"image": image}, decoder=replace(model.decoder, depth=1, heads=8, kv_heads=8, width=32))


def gradients(layout: Layout) -> tuple[dict, dict]:
    """Of two rows at least for each device and part: a product of one row sums in an order of its own."""
    return test_step.gradients("small", layout, rows=64)


@pytest.fixture(scope="module", autouse=True)
def one():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(test_step.CASES, "small", (small, {"lm": NextToken()}))
        yield gradients(test_step.ONE)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "data={} fsdp={} tensor={}".format(*s))
@pytest.mark.parametrize("microbatches", MICROBATCHES)
def test_loss_and_gradients_are_those_of_one_device(sizes, microbatches, one):
    layout = Layout(mesh=dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), microbatches=microbatches)
    grads, scores = gradients(layout)
    want, want_scores = one
    assert scores == pytest.approx(want_scores, rel=1e-6)
    whole = lambda of: np.sqrt(sum(np.sum(np.square(of(k), dtype=np.float64)) for k in want))
    # Float32 sums in another order; of all gradients together, for a small one is the difference of large ones.
    assert whole(lambda k: grads[k] - want[k]) <= 1e-6 * whole(lambda k: want[k])
    assert max(np.abs(grads[k] - want[k]).max() for k in want) <= 1e-6
