"""The loss over nested sets of media tokens is the mean of the losses at each of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.connectors.pool import NestedConfig
from mllm_jax.nn.param import merge, split
from mllm_jax.objectives import EveryScale, NextToken
from mllm_jax.types import Batch, Media
from tests.synthetic import batch_for, llava

WINDOWS = (1, 2, 4)


def at(windows: tuple[int, ...]):
    """The tiny LLaVA with this connector; rotary positions, so that only their differences count."""
    model = llava()
    tower = replace(model.inputs["image"], connector=NestedConfig(grid=4, windows=windows))
    return replace(model, inputs={"image": tower})


def laid_out_anew(batch: Batch, full: int, size: int) -> Batch:
    """Numpy: the rows with `size` tokens for each medium, as if they had been made for that number; shorter."""
    media = batch.media["image"]
    keep = (media.slot < 0) | (media.slot % full >= full - size)
    width = int(keep.sum(axis=1).max())
    slot = np.where(media.slot >= 0, media.slot // full * size + media.slot % full - (full - size), -1)

    def cut(x: np.ndarray, fill: int = 0) -> np.ndarray:
        out = np.full((x.shape[0], width, *x.shape[2:]), fill, x.dtype)
        for row, kept in zip(range(len(x)), keep):
            out[row, : kept.sum()] = x[row][kept]
        return out

    segments = cut(batch.segments)
    starts = np.maximum.accumulate(np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(width), 0), axis=1)
    positions = np.repeat((np.arange(width) - starts)[..., None], 3, axis=-1).astype(np.int32)
    return replace(
        batch, tokens=cut(batch.tokens), targets=cut(batch.targets), weights=cut(batch.weights), segments=segments, positions=positions,
        kinds=cut(batch.kinds), media={"image": replace(media, slot=cut(slot, -1).astype(np.int32))})


@pytest.fixture(scope="module")
def params():
    import flax.nnx as nnx

    return split(at(WINDOWS).build(rngs=nnx.Rngs(0)))[1]


def run(model, objective):
    import flax.nnx as nnx

    graph = split(nnx.eval_shape(lambda: model.build(rngs=nnx.Rngs(0))))[0]

    @jax.jit
    def f(params, batch):
        batch = objective.corrupt(batch, jax.random.key(0))
        return objective.score(merge(graph, params)(batch), batch)["loss"]

    return f


def test_the_loss_is_the_mean_over_the_scales_each_laid_out_for_itself(params):
    batch = batch_for(at(WINDOWS), rows=3)
    weights = np.array(batch.weights)
    weights[:, 16] = 0.7                # the last patch of the first image predicts what follows it
    batch = replace(batch, weights=weights)
    nested = run(at(WINDOWS), EveryScale(windows=WINDOWS))(params, batch)
    alone = [run(at((w,)), NextToken())(params, laid_out_anew(batch, 16, (4 // w) ** 2)) for w in WINDOWS]
    assert len({round(float(loss.value), 4) for loss in alone}) == 3
    # Softmax over fewer keys adds in another order.
    np.testing.assert_allclose(nested.value, np.mean([loss.value for loss in alone]), rtol=2e-6)
    np.testing.assert_allclose(nested.count, 3 * batch.weights.sum(), rtol=1e-6)


def test_one_scale_is_the_plain_loss(params):
    batch = batch_for(at((1,)), rows=2)
    assert run(at((1,)), EveryScale(windows=(1,)))(params, batch).value == run(at((1,)), NextToken())(params, batch).value


def test_copies_of_a_row_lie_beside_it_and_what_has_no_medium_is_unchanged():
    batch = batch_for(at(WINDOWS), rows=2)
    text = np.full_like(batch.media["image"].slot[1], -1)
    slot = np.stack([batch.media["image"].slot[0], text])
    batch = replace(batch, media={"image": replace(batch.media["image"], slot=slot)})
    copies = EveryScale(windows=WINDOWS).corrupt(jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    for k in range(3):
        np.testing.assert_array_equal(copies.tokens[k], batch.tokens[0])
        for name in ("tokens", "segments", "positions", "weights"):
            np.testing.assert_array_equal(getattr(copies, name)[3 + k], getattr(batch, name)[1])
        # The sets lie one behind the other: two items of 16, two of 4, two of 1.
        here = copies.media["image"].slot[k]
        np.testing.assert_array_equal(here[here >= 0], [np.arange(32), 32 + np.arange(8), 40 + np.arange(2)][k])


def test_what_it_cannot_read_is_said():
    batch = batch_for(at(WINDOWS), rows=1)
    with pytest.raises(KeyError, match="EveryScale reads 'audio'; the batch has media of \\['image'\\]"):
        EveryScale(windows=WINDOWS, modality="audio").corrupt(batch, jax.random.key(0))
    odd = Media(values=np.zeros((1, 1, 17, 3)), coords=np.zeros((1, 1, 17, 3)), mask=np.ones((1, 1), bool), slot=np.zeros((1, 48)))
    with pytest.raises(ValueError, match="they have 17 patches"):
        EveryScale(windows=WINDOWS).corrupt(replace(batch, media={"image": odd}), jax.random.key(0))
