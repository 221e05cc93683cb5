"""Native resolution in training: images of every size through one program, on one device as on eight."""

import io
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from mllm_jax import sharding
from mllm_jax.config import load
from mllm_jax.data.loader import Loader
from mllm_jax.data.native import Native
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data
from mllm_jax.sharding import Layout
from mllm_jax.train.feed import to_device
from mllm_jax.train.optimizer import build
from mllm_jax.train.state import Blueprint, make_state
from mllm_jax.train.step import make_step
from mllm_jax.types import Blob, Example, Part, Turn
from tests.train import test_step

IMAGES, ROWS, PATCHES = 2_000, 8, 512


def pictures() -> list[Example]:
    """Sides from 10 to 180 pixels, up to four to one, of one colour, which is the answer."""
    rng, out = np.random.default_rng(0), []
    for i in range(IMAGES):
        side, ratio = np.exp(rng.uniform(np.log(20), np.log(90))), np.exp(rng.uniform(-np.log(4), np.log(4)))
        file = io.BytesIO()
        Image.new("RGB", (int(side * ratio**-0.5), int(side * ratio**0.5)), (255 * (i % 2),) * 3).save(file, "png")
        turns = Turn(role="user", parts=(Part(kind="image", media=0),)), Turn(role="assistant", parts=(Part(text="black white".split()[i % 2]),))
        out.append(Example(id=str(i), turns=turns, media=(Blob(kind="image", data=file.getvalue()),)))
    return out


def test_two_thousand_images_train_through_few_programs_with_little_padding():
    model = load("resolution/qwen2_vl").tiny().model
    tower = model.inputs["image"]
    tower = replace(tower, view=Native(min_pixels=4 * 16**2, max_pixels=32 * 16**2), encoder=replace(tower.encoder, depth=1), also={})
    model = replace(model, inputs={"image": tower}, decoder=replace(model.decoder, depth=1))
    source = pictures()
    data = Data(sources={"pictures": 1.0}, batch_size=ROWS, seq_len=320, items={"image": PATCHES})
    loader = Loader(data, model.inputs, load_tokenizer("bytes"), rows=ROWS, open=lambda name, root: source)
    layout = Layout(mesh={"data": 1})
    with sharding.use(layout, mesh := layout.make_mesh(jax.devices()[:1])), iter(loader) as batches:
        blueprint = Blueprint(model, layout, mesh)
        optimizer = build(Adam(lr=1e-2, warmup=0, schedule="constant"), 100, sorted(blueprint.shapes))
        state = make_state(blueprint.init(0), frozenset(blueprint.shapes), optimizer, blueprint)
        step = jax.jit(make_step(blueprint.graph, {"lm": NextToken()}, optimizer))
        seen, patches, rows, grids, losses = set(), 0, 0, set(), []
        while len(seen) < IMAGES:
            read = next(batches)
            state, scores = step(state, to_device(read.batch, mesh), jax.random.key(0))
            losses.append(float(scores["loss"].value))
            seen |= {id for row in read.info.ids for id in row}
            patches, rows = patches + read.info.media["image"], rows + len(read.info.ids)
            assert read.info.media["image"] == read.batch.media["image"].mask.sum()
            item, at = read.batch.media["image"].item, read.batch.media["image"].coords
            grids |= {tuple(at[r][item[r] == i].max(0)) for r in range(ROWS) for i in range(1, item[r].max() + 1)}
    padding = 1 - patches / (rows * PATCHES)
    assert len(grids) > 50 and step._cache_size() <= 4
    # 1 program and 1.2 % measured.
    assert padding <= 0.08, f"{padding:.1%} of the patches of {rows} rows are padding"
    assert losses[-1] < 0.5 * losses[0]


def test_eight_devices_give_the_loss_and_the_gradient_of_one(monkeypatch, capfd):
    """Windows, a table of positions, levels of the encoder and interleaved rotations, all in one model."""
    model = load("resolution/qwen2_vl:model=3-8b").tiny().model
    tower = model.inputs["image"]
    model = replace(model, inputs={"image": replace(tower, encoder=replace(tower.encoder, window=4, full=(2,)))})
    monkeypatch.setitem(test_step.CASES, "native", (lambda: model, {"lm": NextToken()}))
    want, want_scores = test_step.gradients("native", test_step.ONE)
    grads, scores = test_step.gradients("native", test_step.LAYOUTS["two slices of fsdp-tensor"])
    assert scores == pytest.approx(want_scores, rel=1e-5)
    for name, g in want.items():
        # Relative to the largest entry of the tensor: float32 sums in another order.
        assert np.abs(grads[name] - g).max() <= 1e-5 * np.abs(g).max() + 1e-7, name
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
