"""Batches of prompts, and what decoding leaves in a row."""

import io

import numpy as np
import pytest
from PIL import Image

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.batch import blank_batch, collate, decode_items, describe, mend, prompt_batch
from mllm_jax.data.errors import BadExample
from mllm_jax.data.pack import pack, row_spec
from mllm_jax.data.tokenize import encode, encode_prompt
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.types import Blob, Example, Part, Turn

VIT = ViTConfig(width=8, heads=1, mlp=8, patch=8, grid=2, depth=1)
TOWERS = {"image": TowerConfig(view=Square(size=16), encoder=VIT, connector=MLPConfig())}
TOKENIZER = load_tokenizer("bytes")
MODEL = {"template": "plain", "tokenizer": TOKENIZER, "towers": TOWERS}


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(out, "PNG")
    return out.getvalue()


def example(question: str, *colours: str, data: bytes | None = None) -> Example:
    parts = tuple(Part(kind="image", media=i) for i in range(len(colours)))
    return Example(
        id=question,
        turns=(Turn(role="user", parts=(*parts, Part(text=question))), Turn(role="assistant", parts=(Part(text="yes"),))),
        media=tuple(Blob(kind="image", data=data or png(colour)) for colour in colours),
    )


def test_prompts_end_together_and_padding_is_at_the_left():
    examples = [example("long question?", "red"), example("b?"), example("c?", "red", "blue")]
    batch = prompt_batch(examples, **MODEL, rows=4)
    assert batch.tokens.shape == (4, 64)                    # the longest has 21, rounded up
    for b, one in enumerate(examples):
        alone = encode_prompt(one, **MODEL)
        n = len(alone)
        np.testing.assert_array_equal(batch.tokens[b, -n:], alone.tokens)
        np.testing.assert_array_equal(batch.positions[b, -n:], alone.positions)
        np.testing.assert_array_equal(batch.media["image"].slot[b, -n:], alone.slots.get("image", np.full(n, -1)))
        assert (batch.segments[b, -n:] == 1).all() and not batch.segments[b, :-n].any()
        assert (batch.media["image"].slot[b, :-n] == -1).all()
    assert not batch.segments[3].any() and not batch.media["image"].mask[3].any()
    assert batch.media["image"].mask.tolist() == [[True, False], [False, False], [True, True], [False, False]]
    assert not batch.weights.any()


def test_prompts_have_the_pixels_of_their_own_images():
    batch = prompt_batch([example("a"), example("b", "blue", "red")], **MODEL)
    pixels = batch.media["image"].values[1].reshape(2, -1, 3)
    assert (pixels[0] == (0, 0, 255)).all() and (pixels[1] == (255, 0, 0)).all()


def test_a_prompt_that_does_not_fit_says_so():
    with pytest.raises(BadExample, match="record 'a long one' is bad .overlong."):
        prompt_batch([example("a long one")], **MODEL, seq_len=8)


def test_a_prompt_with_a_broken_image_says_so():
    with pytest.raises(BadExample, match="record 'q' is bad .decode."):
        prompt_batch([example("q", "red", data=png("red")[:-30])], **MODEL)


def test_decoding_after_packing_equals_decoding_before():
    examples = [example("a", "red"), example("b"), example("c", "blue", "green")]
    spec = row_spec(64, {"image": 3}, TOWERS, TOKENIZER.pad_token_id)
    rows = list(pack((encode(e, **MODEL) for e in examples), spec))
    decoded = [decode_items(row.media, TOWERS, exact=True) for row in rows]
    batch = collate(rows, decoded, spec)
    before = [TOWERS["image"].view(blob.data, 8, exact=True) for e in examples for blob in e.media]
    np.testing.assert_array_equal(batch.media["image"].values[0], np.stack([values for values, _ in before]))
    np.testing.assert_array_equal(batch.media["image"].coords[0], np.stack([coords for _, coords in before]))
    assert batch.blocks is None
    info = describe(rows)
    assert info.ids == (("a", "b", "c"),) and info.media == {"image": 3} and not info.frames


def test_a_batch_says_where_it_is_trained():
    spec = row_spec(64, {"image": 3}, TOWERS, TOKENIZER.pad_token_id, 9)
    rows = list(pack((encode(e, **MODEL) for e in (example("a", "red"), example("b"))), spec))
    batch = collate(rows, [decode_items(row.media, TOWERS, exact=True) for row in rows], spec)
    for where, weights in zip(batch.trained, batch.weights, strict=True):
        there = np.flatnonzero(weights)
        assert where.tolist() == there.tolist() + [-1] * (9 - len(there)) and 0 < len(there) < 9
    blank = blank_batch(len(rows), spec)
    assert (blank.trained.shape, blank.trained.dtype) == (batch.trained.shape, batch.trained.dtype)


def test_a_broken_image_takes_only_its_own_example_out_of_the_row():
    examples = [example("a", "red"), example("b", "red", "blue", data=png("red")[:-30]), example("c", "blue")]
    spec = row_spec(96, {"image": 4}, TOWERS, TOKENIZER.pad_token_id)
    (row,) = pack((encode(e, **MODEL) for e in examples), spec)
    decoded = decode_items(row.media, TOWERS, exact=True)
    assert [isinstance(d, BadExample) and d.id for d in decoded] == [False, "b", "b", False]
    row, good = mend(row, decoded, spec)
    batch = collate([row], [good], spec)
    media = batch.media["image"]
    assert set(batch.segments[0]) == {0, 1, 3}
    assert media.mask[0].tolist() == [True, False, False, True]
    # The slots of the third example still name its own image, which kept its place.
    assert sorted(media.slot[0][batch.segments[0] == 3].tolist())[-4:] == [12, 13, 14, 15]
    assert (media.values[0, 3].reshape(-1, 3) == (0, 0, 255)).all()
