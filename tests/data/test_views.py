import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError, override
from mllm_jax.data.augment import HorizontalFlip
from mllm_jax.data.views import Pad, Square, cut, join

REAL = Path(os.environ.get("MLLM_JAX_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
SIZES = [(48, 64), (64, 48), (50, 50), (31, 97), (97, 31), (200, 301), (333, 250), (20, 20)]


def picture(height: int, width: int) -> bytes:
    small = np.random.default_rng(height * width).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def processors(size: int):
    """(our view, their processor) of the three conventions."""
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip").SiglipImageProcessorPil
    llava = pytest.importorskip("transformers.models.llava.image_processing_pil_llava").LlavaImageProcessorPil
    square, short = {"height": size, "width": size}, {"shortest_edge": size}
    return {
        "clip": (Square(size=size, crop=True), clip(size=short, crop_size=square)),
        "siglip": (Square(size=size), siglip(size=square)),
        "llava": (Pad(size=size), llava(size=short, crop_size=square, do_pad=True)),
    }


def assert_same_pixels(view, processor, data: bytes):
    theirs = processor(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="np")["pixel_values"][0]
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    ours = ((view.pixels(data, exact=True) / 255 - mean) / std).transpose(2, 0, 1)
    # The pixels are the same integers; what is left is float32 rounding of the normalization, values up to about 2.7.
    np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["clip", "siglip", "llava"])
@pytest.mark.parametrize("size", [32, 56])
def test_exact_pixels_equal_those_of_transformers(name, size):
    view, processor = processors(size)[name]
    for height, width in SIZES:
        assert_same_pixels(view, processor, picture(height, width))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real photographs in {REAL} (set MLLM_JAX_REAL_DATA)")
@pytest.mark.parametrize("name", ["clip", "siglip", "llava"])
def test_exact_pixels_of_photographs_equal_those_of_transformers(name):
    view, processor = processors(336)[name]
    for path in sorted(REAL.glob("*/images/*.jpg"))[::4]:
        assert_same_pixels(view, processor, path.read_bytes())


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real photographs in {REAL} (set MLLM_JAX_REAL_DATA)")
@pytest.mark.parametrize("view", [Square(size=112), Square(size=112, crop=True), Pad(size=112)])
def test_fast_pixels_of_photographs_are_close_to_exact_ones(view):
    errors = []
    for path in sorted(REAL.glob("*/images/*.jpg"))[::2]:
        exact, fast = (view.pixels(path.read_bytes(), exact=e).astype(int) for e in (True, False))
        errors.append(np.abs(exact - fast).mean())
    # Decoding at a part of the size is another low-pass filter; the docstring of views.py says one to three levels.
    assert np.mean(errors) < 3 and np.max(errors) < 8


@pytest.mark.parametrize("view", [Square(size=32), Square(size=32, crop=True), Pad(size=32)])
def test_fast_pixels_are_close_to_exact_ones(view):
    for height, width in SIZES:
        data = picture(height, width)
        exact, fast = view.pixels(data, exact=True), view.pixels(data, exact=False)
        assert exact.shape == fast.shape == (32, 32, 3) and fast.dtype == np.uint8
        # Random blocks of four pixels are far harsher than photographs; a shift of a pixel would give 40 and more.
        assert np.abs(exact.astype(int) - fast).mean() < 12, (height, width)


def test_patches_join_to_the_image_in_row_major_order():
    image = np.arange(28 * 42 * 3, dtype=np.uint32).astype(np.uint8).reshape(28, 42, 3)
    values, coords = cut(image, 14)
    assert values.shape == (6, 14 * 14 * 3) and coords.dtype == np.int32
    np.testing.assert_array_equal(join(values, coords, 14), image)
    np.testing.assert_array_equal(coords[4], [0, 1, 1])
    np.testing.assert_array_equal(values[4].reshape(14, 14, 3), image[14:, 14:28])
    assert values[4, 3:6].tolist() == image[14, 15].tolist()


def test_a_remainder_is_left_out_at_the_bottom_and_right():
    view = Square(size=384)
    data = picture(64, 64)
    assert view.plan(64, 64, 14).grid == (1, 27, 27)
    values, coords = view(data, 14, exact=True)
    np.testing.assert_array_equal(join(values, coords, 14), view.pixels(data, exact=True)[:378, :378])


def test_the_grid_is_that_of_the_patches():
    for view in (Square(size=30), Square(size=30, crop=True), Pad(size=30)):
        values, coords = view(picture(31, 97), 7, exact=False)
        assert np.prod(view.plan(31, 97, 7).grid) == len(values) == len(coords)
        assert tuple(coords.max(0) + 1) == view.plan(31, 97, 7).grid


def test_change_is_applied_before_the_view():
    data, flip = picture(48, 64), HorizontalFlip(p=1.0)
    view = Square(size=32)
    for exact in (True, False):
        flipped = view.pixels(data, exact=exact, change=lambda image: flip(image, np.random.default_rng(0)))
        plain = view.pixels(data, exact=exact)
        # One level: the weights of a filter are rounded, and their sum is taken in the other order.
        assert np.abs(flipped[:, ::-1].astype(int) - plain).max() <= 1


@pytest.mark.parametrize("view", [Square(size=336), Square(size=336, crop=True), Pad(size=336)])
def test_a_hair_does_not_fill_the_memory(view):
    out = io.BytesIO()
    Image.new("RGB", (8, 60_000), (9, 9, 9)).save(out, "PNG")
    for exact in (True, False):         # cropped or padded as published, it would take 2 and 11 gigabytes
        assert (view.pixels(out.getvalue(), exact=exact)[:, 167] == 9).all()


def test_padding_is_centred_and_has_the_colour():
    out = Pad(size=40, fill=(1, 2, 3)).quickly(Image.new("RGB", (40, 20), (200, 200, 200)), 20, 40)
    assert (out[:10] == [1, 2, 3]).all() and (out[10:30] == 200).all() and (out[30:] == [1, 2, 3]).all()


def test_unknown_filters_and_patches_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="'bicubi' is not a filter; nearest: bicubic"):
        override(Square(size=32), "resample=bicubi")
    with pytest.raises(ConfigError, match="holds no patch of 64x64"):
        cut(np.zeros((32, 32, 3), np.uint8), 64)
    assert Square(size=336, crop=True).tiny(32) == Square(size=32, crop=True)
