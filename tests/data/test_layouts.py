"""Layouts against transformers: the tokens that stand for an image, and where they come from."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.layouts import (
    IDEFICS3,
    IDEFICS3_WHOLE,
    INTERNVL,
    INTERNVL_VIDEO,
    MARK,
    SMOLVLM_VIDEO,
    AnyRes,
    Marked,
    Plain,
    Spans,
    bilinear,
    in_words,
)
from mllm_jax.data.tiles import NEXT, ONEVISION, DynamicTiles, OneTile, SplitTiles, Tiles
from mllm_jax.data.video import Frames
from mllm_jax.data.views import Square
from mllm_jax.types import Cut, Run

SIZES = [(80, 100), (500, 1000), (900, 300), (480, 640), (800, 800), (31, 97), (1333, 77), (2304, 2304), (700, 2000)]


def gathered(run: Run, features: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """What stands in the row: features f[m d], with the marks after them."""
    every = np.concatenate([features, marks])
    of = lambda slots: every[np.where(slots <= MARK, len(features) + MARK - slots, slots)]
    return of(run.slots) if run.taps is None else np.einsum("nkd,nk->nd", of(run.taps), run.mix)


@pytest.mark.parametrize(("family", "size", "patch", "pinpoints", "cap"), [
    ("llava_next", 336, 14, NEXT, None), ("llava_onevision", 384, 14, ONEVISION, 9), ("llava_next", 384, 14, ONEVISION, None)])
def test_the_tokens_of_an_image_are_those_that_transformers_packs(family, size, patch, pinpoints, cap):
    torch = pytest.importorskip("torch")
    name = {"llava_next": "LlavaNextModel", "llava_onevision": "LlavaOnevisionModel"}[family]
    model = getattr(pytest.importorskip(f"transformers.models.{family}.modeling_{family}"), name)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=size, patch_size=patch),
        image_grid_pinpoints=[[r * size, c * size] for r, c in pinpoints])
    view, layout, d = Tiles(size=size, pinpoints=pinpoints), AnyRes(cap=cap), 3
    for height, width in SIZES:
        cut = view.plan(height, width, patch)
        features = np.random.default_rng(0).normal(size=(cut.tiles, math.prod(cut.grid), d)).astype(np.float32)
        newline = np.full((1, d), 7, np.float32)
        options = {"vision_feature_select_strategy": "full"} if family == "llava_next" else {"vision_aspect_ratio": f"anyres_max_{cap}"}
        theirs, _ = model.pack_image_features(
            SimpleNamespace(config=config), [torch.tensor(features)], [(height, width)], image_newline=torch.tensor(newline[0]), **options)
        (run,) = layout(cut, cut.grid)
        ours = gathered(run, features.reshape(-1, d), newline)
        assert ours.shape == theirs[0].shape, (height, width)
        # Copies are exact; means are four float32 products.
        np.testing.assert_allclose(ours, theirs[0].numpy(), atol=0 if run.taps is None else 1e-5, rtol=0)


def test_token_counts_of_llava_next():
    view, layout = Tiles(size=336), AnyRes()
    count = lambda width, height: len(layout(view.plan(height, width, 14), (1, 24, 24))[0].slots)
    found = {size: count(*size) for size in [(1000, 500), (640, 480), (300, 900), (800, 800)]}
    assert found == {(1000, 500): 1752, (640, 480): 2340, (300, 900): 2376, (800, 800): 2928}


def test_token_counts_of_onevision():
    view, layout = Tiles(size=384, pinpoints=ONEVISION), AnyRes(cap=9)
    count = lambda width, height: len(layout(view.plan(height, width, 14), (1, 27, 27))[0].slots)
    assert count(2304, 2304) == 729 + 81 * 82           # 6 x 6 tiles of 27 x 27 tokens, shrunk to 81 x 81
    assert len(layout(Square(size=384).plan(9, 9, 14), (1, 27, 27))[0].slots) == 730


def test_a_mark_ends_every_row():
    (run,) = AnyRes()(Cut(size=(8, 16), grid=(1, 2, 2), rows=1, columns=2, overview=0), (1, 2, 2))
    assert run.slots.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, MARK, 6, 7, 10, 11, MARK] and run.taps is None
    with pytest.raises(ConfigError, match="not 5 in a line"):
        AnyRes()(Cut(size=(8, 16), grid=(1, 2, 2), rows=1, columns=2, overview=0), (1, 1, 5))


@pytest.mark.parametrize(("old", "new"), [((27, 27), (14, 14)), ((30, 41), (9, 17)), ((5, 4), (10, 12))])
def test_bilinear_taps_are_those_of_torch(old, new):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=old).astype(np.float32)
    taps, mix = bilinear(np.arange(math.prod(old), dtype=np.int32).reshape(old), *new)
    theirs = torch.nn.functional.interpolate(torch.tensor(x)[None, None], new, mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose((x.reshape(-1)[taps] * mix).sum(-1), theirs, atol=1e-5, rtol=0)


def text_of(pieces, token: str) -> str:
    return "".join(piece if isinstance(piece, str) else token * len(piece.slots) for piece in pieces)


def processor_of(family: str, name: str, image_processor, **fields):
    """A processor without a tokenizer, for the text that it writes for an image."""
    module = pytest.importorskip(f"transformers.models.{family}.processing_{family}")
    out = object.__new__(getattr(module, name))
    vars(out).update(fields)
    return out


@pytest.mark.parametrize("size", SIZES)
def test_the_text_around_tiles_is_that_of_transformers(size):
    view = SplitTiles(size=364, longest=1456)
    cut = view.plan(*size, 14)
    idefics = processor_of("idefics3", "Idefics3Processor", None, fake_image_token="<fake_token_around_image>", image_token="<image>",
                           global_image_tag="<global-img>", image_seq_len=4)
    theirs = idefics.replace_image_token({"rows": [[cut.rows]], "cols": [[cut.columns]]}, 0)
    smol = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm").get_image_prompt_string
    assert theirs == smol(cut.rows, cut.columns, 4, "<fake_token_around_image>", "<image>", "<global-img>")
    pieces = IDEFICS3(cut, (1, 2, 2))
    assert text_of(pieces, "<image>") == theirs
    assert np.concatenate([p.slots for p in pieces if isinstance(p, Run)]).tolist() == list(range(4 * cut.tiles))
    cut = DynamicTiles(size=448).plan(*size, 14)
    intern = processor_of("internvl", "InternVLProcessor", None, start_image_token="<img>", end_image_token="</img>",
                          image_token="<IMG_CONTEXT>", image_seq_length=4)
    theirs = intern.replace_image_token({"num_patches": [cut.tiles]}, 0)
    assert text_of(INTERNVL(cut, (1, 2, 2)), "<IMG_CONTEXT>") == theirs


def test_an_image_of_one_tile_is_its_overview():
    cut = SplitTiles(size=364, longest=364).plan(300, 200, 14)
    assert text_of(IDEFICS3(cut, (1, 1, 2)), ".") == "<fake_token_around_image><global-img>..<fake_token_around_image>"


def test_an_image_that_is_not_split_is_one_tile():
    cut = OneTile(size=364, longest=1456).plan(300, 200, 14)
    assert text_of(IDEFICS3_WHOLE(cut, (1, 1, 2)), ".") == "<fake_token_around_image><global-img>..<fake_token_around_image>"


@pytest.mark.parametrize(("total", "rate"), [(100, 10.0), (1, 24.0), (3_700, 30.0), (250_000, 24_000 / 1001), (140, 20.0)])
def test_frames_of_smolvlm_and_the_text_around_them_are_those_of_transformers(monkeypatch, total, rate):
    """Its processor says numbers by num2words; ours are compared with a few by hand here, and were with the first 20,000."""
    theirs = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")
    sample = pytest.importorskip("transformers.models.smolvlm.video_processing_smolvlm").SmolVLMVideoProcessor.sample_frames
    metadata = pytest.importorskip("transformers.video_utils").VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
    view = Frames(view=OneTile(size=512, longest=2_048), frames=64, fps=1.0, pick="inside")
    metadata.frames_indices = sample(SimpleNamespace(num_frames=64, fps=1.0), metadata)
    cut = view._plan(360, 640, total, rate, 16)
    assert view._wanted(total, rate).tolist() == metadata.frames_indices.tolist() and cut.frames == len(metadata.frames_indices)
    monkeypatch.setattr(theirs, "num2words", in_words)
    smol = processor_of("smolvlm", "SmolVLMProcessor", None, fake_image_token="<fake_token_around_image>", image_token="<image>",
                        global_image_token="<global-img>", image_seq_len=4)
    text = smol.replace_video_token({"pixel_values": np.zeros((1, cut.frames)), "video_metadata": [metadata]}, 0)
    assert text_of(SMOLVLM_VIDEO(cut, (1, 2, 2)), "<image>") == text


def test_numbers_in_words():
    said = {0: "zero", 4: "four", 13: "thirteen", 40: "forty", 64: "sixty-four", 100: "one hundred", 101: "one hundred and one",
            128: "one hundred and twenty-eight", 1_000: "one thousand", 1_034: "one thousand and thirty-four",
            12_900: "twelve thousand, nine hundred"}
    assert {n: in_words(n) for n in said} == said


def test_frames_are_named_and_timed():
    video = Cut(size=(8, 8), grid=(1, 2, 2), frames=2, seconds=(0.5, 1.25))
    assert text_of(INTERNVL_VIDEO(video, (1, 1, 2)), ".") == "Frame1: <img>..</img>\nFrame2: <img>..</img>"
    timed = Spans(tile="<{seconds:.1f} seconds>")
    assert text_of(timed(video, (1, 1, 2)), ".") == "<0.5 seconds>..<1.2 seconds>.."
    # The packed layout has the steps of time in the grid.
    packed = Cut(size=(8, 8), grid=(2, 2, 2), seconds=(0.5, 1.25))
    assert text_of(timed(packed, (2, 1, 2)), ".") == "<0.5 seconds>..<1.2 seconds>.."


def test_marks_stand_around_the_tokens():
    pieces = Marked()(Cut(size=(8, 8), grid=(1, 1, 2)), (1, 1, 2))
    assert [(run.slots.tolist(), run.kind) for run in pieces] == [([-2], None), ([0, 1], None), ([-3], "text")]


def test_plain_tokens_are_in_the_order_of_the_tiles():
    (run,) = Plain()(Cut(size=(8, 8), grid=(1, 1, 2), rows=2, overview=0), (1, 1, 2))
    assert run.slots.tolist() == list(range(6))
