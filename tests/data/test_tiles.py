"""Views of several tiles against the image processors of transformers."""

import io

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.tiles import NEXT, NEXT_OFFICIAL, ONEVISION, DynamicTiles, OneTile, SplitTiles, Tiles
from mllm_jax.types import Blob

SIZES = [(80, 100), (500, 1000), (900, 300), (480, 640), (800, 800), (31, 97), (336, 336), (8, 500)]


def picture(height: int, width: int, format: str = "PNG") -> bytes:
    small = np.random.default_rng(height * width).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, format)
    return out.getvalue()


def theirs(processor, data: bytes) -> np.ndarray:
    """u8[tile h w 3] of a processor that only cuts."""
    out = processor(Image.open(io.BytesIO(data)).convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np")
    pixels = np.asarray(out["pixel_values"])
    return pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1)


def processor(family: str, module: str, name: str, **options):
    return getattr(pytest.importorskip(f"transformers.models.{family}.image_processing_pil_{module}"), name)(**options)


def pairs(s: int = 32):
    """(our view, their processor) of each convention, with tiles of s pixels."""
    pixels = lambda pinpoints: [[rows * s, columns * s] for rows, columns in pinpoints]
    square = {"height": s, "width": s}
    return {
        "next": (Tiles(size=s), processor(
            "llava_next", "llava_next", "LlavaNextImageProcessorPil", size={"shortest_edge": s}, crop_size=square,
            image_grid_pinpoints=pixels(NEXT))),
        "onevision": (Tiles(size=s, pinpoints=ONEVISION), processor(
            "llava_onevision", "llava_onevision", "LlavaOnevisionImageProcessorPil", size=square, image_grid_pinpoints=pixels(ONEVISION))),
        "internvl": (DynamicTiles(size=s), processor(
            "got_ocr2", "got_ocr2", "GotOcr2ImageProcessorPil", size=square, crop_to_patches=True, min_patches=1, max_patches=12)),
        "idefics3": (SplitTiles(size=s, longest=4 * s), processor(
            "idefics3", "idefics3", "Idefics3ImageProcessorPil", size={"longest_edge": 4 * s}, max_image_size={"longest_edge": s})),
        "smolvlm": (SplitTiles(size=s, longest=4 * s), processor(
            "smolvlm", "smolvlm", "SmolVLMImageProcessorPil", size={"longest_edge": 4 * s}, max_image_size={"longest_edge": s})),
        "smolvlm of one tile": (SplitTiles(size=s, longest=s), processor(
            "smolvlm", "smolvlm", "SmolVLMImageProcessorPil", size={"longest_edge": s}, max_image_size={"longest_edge": s})),
        "smolvlm without splitting": (OneTile(size=s, longest=4 * s), processor(
            "smolvlm", "smolvlm", "SmolVLMImageProcessorPil", size={"longest_edge": 4 * s}, max_image_size={"longest_edge": s},
            do_image_splitting=False)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["next", "onevision", "internvl", "idefics3", "smolvlm", "smolvlm of one tile", "smolvlm without splitting"])
def test_exact_pixels_equal_those_of_transformers(name):
    view, processor = pairs()[name]
    for height, width in SIZES:
        data = picture(height, width)
        ours = view.pixels(data, exact=True).reshape(-1, 32, 32, 3)
        np.testing.assert_array_equal(ours, theirs(processor, data), err_msg=f"{height}x{width}")
        cut = view.look(Blob(kind="image", data=data), 8)
        assert cut.tiles == len(ours) <= view.room(8) and cut.size == (height, width)
        # Faster pixels differ by their filter and not by where they look; random blocks are far harsher than photographs.
        quick = view.pixels(data, exact=False).reshape(-1, 32, 32, 3)
        assert quick.shape == ours.shape and np.abs(quick.astype(int) - ours).mean() < 16, (height, width)


def test_tiles_of_the_published_size_equal_those_of_transformers():
    for name, s in (("next", 336), ("idefics3", 364)):
        view, processor = pairs(s)[name]
        data = picture(480, 640)
        np.testing.assert_array_equal(view.pixels(data, exact=True), theirs(processor, data))


def test_a_jpeg_that_is_decoded_small_is_cut_as_its_header_says():
    data = picture(451, 903, "JPEG")
    for view in (Tiles(size=32), DynamicTiles(size=32), SplitTiles(size=32, longest=128)):
        exact, quick = (view.pixels(data, exact=e).astype(int) for e in (True, False))
        assert exact.shape == quick.shape and np.abs(exact - quick).mean() < 16


def test_values_come_tile_after_tile():
    view, data = Tiles(size=32), picture(80, 100)
    values, coords = view(data, 8, exact=True)
    plan = view.plan(80, 100, 8)
    assert (plan.rows, plan.columns, plan.overview, plan.tiles, plan.grid) == (2, 2, 0, 5, (1, 4, 4))
    assert values.shape == (5 * 16, 8 * 8 * 3)
    pixels = view.pixels(data, exact=True)
    np.testing.assert_array_equal(values[2 * 16 + 5].reshape(8, 8, 3), pixels[2, 8:16, 8:16])
    assert coords[2 * 16 + 5].tolist() == [0, 1, 1]


def test_the_order_of_pinpoints_decides_between_equal_ones():
    assert Tiles(size=336).arrange(100, 100) == (1, 2)
    assert Tiles(size=336, pinpoints=NEXT_OFFICIAL).arrange(100, 100) == (2, 1)
    assert all(Tiles(size=336).arrange(h, w) == Tiles(size=336, pinpoints=NEXT_OFFICIAL).arrange(h, w) for h, w in SIZES if max(h, w) > 336)


def test_an_image_of_one_tile_has_no_second_view_of_itself():
    plan = DynamicTiles(size=32).plan(30, 30, 8)
    assert (plan.tiles, plan.overview) == (1, None)
    plan = SplitTiles(size=32, longest=32).plan(30, 10, 8)
    assert (plan.tiles, plan.overview, plan.rows, plan.columns) == (1, 0, 0, 0)


@pytest.mark.parametrize("view", [Tiles(size=32), DynamicTiles(size=32), SplitTiles(size=32, longest=128), OneTile(size=32, longest=128)])
def test_a_hair_does_not_fill_the_memory(view):
    out = io.BytesIO()
    Image.new("RGB", (8, 60_000), (9, 9, 9)).save(out, "PNG")
    for exact in (True, False):
        assert (view.pixels(out.getvalue(), exact=exact).reshape(-1, 32, 32, 3)[0, 16, 16] == 9).all()
