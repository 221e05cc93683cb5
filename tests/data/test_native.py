"""Images of native resolution: pixels and places of transformers, and rows that they fill."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError, config
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.batch import collate, decode_items, describe, prompt_batch
from mllm_jax.data.errors import BadExample
from mllm_jax.data.native import Native
from mllm_jax.data.pack import pack, row_spec
from mllm_jax.data.preview import _picture
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import join
from mllm_jax.models.tower import TowerConfig
from mllm_jax.types import Blob, Example, Grid, Part, Turn

SIZES = [(480, 640), (80, 100), (500, 1000), (900, 300), (33, 100), (8, 1000), (31, 97), (1204, 1000), (42, 70)]
TOKENIZER = load_tokenizer("bytes")


@config
class Merge:
    """An encoder that makes a token of 2 x 2 patches, as far as the host knows it."""

    patch: int = 14
    patch_dim: int = 2 * 14 * 14 * 3
    width: int = 8

    def num_tokens(self, grid: Grid) -> Grid:
        return grid[0], grid[1] // 2, grid[2] // 2


TOWER = TowerConfig(view=Native(), encoder=Merge(), connector=MLPConfig(), place="grid")


def picture(height: int, width: int) -> bytes:
    small = np.random.default_rng(height * width).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def header(height: int, width: int) -> bytes:
    """An image whose header can be read, and no more."""
    return b"P6 %d %d 255\n" % (width, height)


def example(id: str, text: str, *images: bytes) -> Example:
    parts = (*(Part(kind="image", media=i) for i in range(len(images))), Part(text=text))
    turns = (Turn(role="user", parts=parts), Turn(role="assistant", parts=(Part(text="yes"),)))
    return Example(id=id, turns=turns, media=tuple(Blob(kind="image", data=data) for data in images))


def go(example: Example, tower: TowerConfig = TOWER):
    return encode(example, template="plain", tokenizer=TOKENIZER, towers={"image": tower})


def test_exact_pixels_equal_those_of_transformers():
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").Qwen2VLImageProcessorPil()
    view = Native()
    for height, width in SIZES:
        data = picture(height, width)
        out = theirs(Image.open(io.BytesIO(data)), do_rescale=False, do_normalize=False, return_tensors="np")
        values, coords = view(data, 14, exact=True)
        plan = view.plan(height, width, 14)
        assert plan.grid == tuple(out["image_grid_thw"][0]) and plan.grid == tuple(coords.max(0) + 1)
        # Theirs are (channel, time, row, column).
        own = values.reshape(-1, 2, 14, 14, 3).transpose(0, 4, 1, 2, 3).reshape(len(values), -1)
        np.testing.assert_array_equal(own, out["pixel_values"])
        quick, _ = view(data, 14, exact=False)
        assert quick.shape == values.shape and np.abs(quick.astype(int) - values).mean() < 16


def test_sizes_are_those_of_transformers():
    smart_resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    rng = np.random.default_rng(0)
    view = Native(min_pixels=100 * 28 * 28, max_pixels=400 * 28 * 28)
    for height, width in np.exp(rng.uniform(np.log(8), np.log(1500), (2000, 2))).astype(int).tolist():
        assert view.resized(height, width, 14) == smart_resize(height, width, 28, view.min_pixels, view.max_pixels)
    # Halves round to even: 42 / 28 is 1.5, 70 / 28 is 2.5.
    assert Native().resized(42, 70, 14) == (56, 56) and Native(min_pixels=28 * 28).resized(14, 28, 14) == (28, 56)


def test_a_hair_is_a_bad_example():
    with pytest.raises(BadExample, match="8x1700 pixels; the longer side may be 200 times the shorter"):
        go(example("e", "?", header(1700, 8)))


def test_patches_of_a_token_stand_side_by_side():
    view, image = Native(), np.random.default_rng(0).integers(0, 256, (1, 56, 84, 3)).astype(np.uint8)
    values, coords = view.cut(image, 14)
    assert coords[:6].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 2], [0, 0, 3]]
    np.testing.assert_array_equal(join(values, coords, 14), image[0])
    first, second = np.split(values.reshape(-1, 2, 14 * 14 * 3), 2, axis=1)
    np.testing.assert_array_equal(first, second)        # an image repeats its only moment


def test_frames_fill_patches_of_two_moments():
    frames = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3)).astype(np.uint8)
    values, coords = Native().cut(frames, 14)
    assert coords.max(0).tolist() == [1, 1, 1] and values.shape == (8, 2 * 14 * 14 * 3)
    last = values[4:].reshape(4, 2, 14, 14, 3)
    np.testing.assert_array_equal(last[0, 0], frames[2, :14, :14])
    np.testing.assert_array_equal(last[:, 0], last[:, 1])


def test_a_row_of_images_of_different_sizes():
    towers = {"image": TOWER}
    images = [picture(60, 90), picture(120, 56), picture(56, 56)]
    examples = [example("a", "?", images[0], images[1]), example("b", "!", images[2])]
    spec = row_spec(64, {"image": 70}, towers, 0)
    room = spec.media["image"]
    assert (room.items, room.tokens, room.packed) == (72, 18, True)
    rows = list(pack(map(go, examples), spec))
    assert len(rows) == 1
    batch = collate(rows, [decode_items(rows[0].media, towers, exact=True)], spec)
    media = batch.media["image"]
    grids = [Native().plan(h, w, 14).grid for h, w in ((60, 90), (120, 56), (56, 56))]
    assert grids == [(1, 4, 6), (1, 8, 4), (1, 4, 4)]
    assert media.item[0].tolist() == [1] * 24 + [2] * 32 + [3] * 16 and media.mask.all()
    np.testing.assert_array_equal(media.values[0, 24:56], Native()(images[1], 14, exact=True)[0])
    np.testing.assert_array_equal(media.coords[0, 24:56], Native()(images[1], 14, exact=True)[1])
    info = describe(rows)
    assert (info.media, info.frames, info.pairs) == ({"image": 72}, {"image": 3}, {"image": 24**2 + 32**2 + 16**2})
    # Tokens are counted over all images of the row, in the order in which their patches come.
    assert media.slot[media.slot >= 0].tolist() == list(range(6 + 8 + 4))
    np.testing.assert_array_equal(_picture(media, 0, 2, TOWER), join(media.values[0, 24:56], media.coords[0, 24:56], 14))


def test_prompts_have_room_for_their_patches():
    batch = prompt_batch([example("a", "?", picture(60, 90)), example("b", "?")], template="plain", tokenizer=TOKENIZER, towers={"image": TOWER})
    media = batch.media["image"]
    assert media.values.shape == (2, 24, 2 * 14 * 14 * 3) and media.mask.sum(1).tolist() == [24, 0]
    assert batch.positions[0].max() == batch.positions[0, -1, 0]


def test_a_connector_must_keep_to_so_many_patches_a_token():
    @config
    class Mean(MLPConfig):
        """One token an image."""

        def num_tokens(self, grid: Grid) -> Grid:
            return 1, 1, 1

    tower = replace(TOWER, connector=Mean())
    spec = row_spec(64, {"image": 400}, {"image": tower}, 0)
    with pytest.raises(ConfigError, match="needs a connector that keeps to that"):
        spec.check(go(example("a", "?", header(60, 90)), tower))


def test_two_thousand_images_fill_rows_of_one_shape():
    """Sides from 60 to 2,800 pixels, up to four to one, 14 to 1,280 tokens; packed some 32 rows at a time, as the loader does."""
    rng = np.random.default_rng(0)
    towers = {"image": TOWER}
    spec = row_spec(3_072, {"image": 8_192}, towers, 0)
    sequences = []
    for i in range(2_000):
        side, ratio = np.exp(rng.uniform(np.log(120), np.log(1400))), np.exp(rng.uniform(-np.log(4), np.log(4)))
        height, width = (max(60, int(side * r)) for r in (ratio**0.5, ratio**-0.5))
        sequences.append(go(example(str(i), "x" * int(rng.integers(10, 200)), header(height, width))))
    grids = {s.items[0].cut.grid for s in sequences}
    rows = list(pack(sequences, spec))
    patches = sum(item.room for s in sequences for item in s.items)
    padding = 1 - patches / (len(rows) * spec.media["image"].items)
    assert len(grids) > 200 and sum(len(row.entries) for row in rows) == 2_000
    assert {(row.tokens.shape, row.slots["image"].max() < spec.media["image"].tokens) for row in rows} == {((3_072,), True)}
    # 3.1 % measured; one image a row would leave 79 % empty.
    assert padding <= 0.08, f"{padding:.1%} of the patches of {len(rows)} rows are padding"
