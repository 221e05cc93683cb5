"""One example as a sequence: targets, weights, slots."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.errors import BadExample
from mllm_jax.data.tokenize import encode, encode_prompt
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.types import Blob, Example, Part, Turn

VIT = ViTConfig(width=8, heads=1, mlp=8, patch=8, grid=2, depth=1)
TOWER = TowerConfig(view=Square(size=16), encoder=VIT, connector=MLPConfig())
POOL = TowerConfig(view=Square(size=16), encoder=VIT, route="pool")
TOKENIZER = load_tokenizer("bytes")
IMAGE, PAD, EOS = 3, 0, 2


def png(size: int = 16) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(out, "PNG")
    return out.getvalue()


def example(*parts: str, answer: str = "yes", images: int | None = None, **more) -> Example:
    """A question of these parts, where "<image>" is the next image."""
    count, out = 0, []
    for part in parts:
        out.append(Part(kind="image", media=count) if part == "<image>" else Part(text=part))
        count += part == "<image>"
    turns = (Turn(role="user", parts=tuple(out)), Turn(role="assistant", parts=(Part(text=answer),)))
    media = tuple(Blob(kind="image", data=png()) for _ in range(count if images is None else images))
    return Example(id="e", turns=turns, media=media, **more)


def go(example, template="plain", towers=None, **more):
    return encode(example, template=template, tokenizer=TOKENIZER, towers={"image": TOWER} if towers is None else towers, **more)


def text(ids) -> str:
    return TOKENIZER.decode(ids)


def test_an_image_becomes_its_tokens_and_targets_are_shifted():
    s = go(example("a", "<image>", "b?"))
    assert text(s.tokens) == "<s>a" + "<image>" * 4 + "b?\nyes</s>"
    assert s.targets.tolist() == [*s.tokens[1:].tolist(), PAD]
    assert s.slots["image"].tolist() == [-1, -1, 0, 1, 2, 3] + [-1] * 7
    assert s.kinds.tolist() == [0, 0, 1, 1, 1, 1] + [0] * 7
    # A weight belongs to the token that is predicted: "y" is predicted from the new line.
    assert text(s.targets[s.weights > 0]) == "yes</s>"
    assert s.positions.tolist() == [[i, i, i] for i in range(len(s))]
    assert s.blocks is None
    assert [(i.modality, i.cut.grid, i.room, i.num_tokens) for i in s.items] == [("image", (1, 2, 2), 1, 4)]


def test_an_example_counts_as_its_tokens_as_any_other_or_between_both():
    """The answers have four and nine tokens, with the one that ends them."""
    both = [example("a", answer="yes"), example("b", answer="the moon")]
    sums = {how: [go(e, reduction=how).weights.sum() for e in both] for how in ("token", "root", "example")}
    np.testing.assert_allclose([sums["token"], sums["root"], sums["example"]], [[4, 9], [2, 3], [1, 1]], rtol=1e-6)
    # As a loss: the mean over examples of the means over tokens.
    losses = [np.random.default_rng(len(e.turns[1].parts[0].text)).uniform(size=len(go(e))) for e in both]
    total = sum((go(e, reduction="example").weights * loss).sum() for e, loss in zip(both, losses))
    means = [loss[go(e).weights > 0].mean() for e, loss in zip(both, losses)]
    np.testing.assert_allclose(total / sum(sums["example"]), np.mean(means), rtol=1e-6)
    with pytest.raises(ConfigError, match="data.reduction='examples' is none; nearest: example"):
        go(both[0], reduction="examples")


def test_two_images_share_one_count_of_slots():
    s = go(example("<image>", "and", "<image>"))
    assert s.slots["image"][s.slots["image"] >= 0].tolist() == list(range(8))
    assert len(s.items) == 2


def test_images_stand_in_the_order_of_the_text_not_of_the_list():
    swapped = Example(
        id="e",
        turns=(
            Turn(role="user", parts=(Part(kind="image", media=1), Part(kind="image", media=0))),
            Turn(role="assistant", parts=(Part(text="x"),)),
        ),
        media=(Blob(kind="image", data=png(16)), Blob(kind="image", data=png(32))),
    )
    assert [item.blob.data for item in go(swapped).items] == [png(32), png(16)]


def test_a_placeholder_that_a_user_typed_is_not_an_image():
    s = go(example("<image>", "what does <image> mean?"))
    assert np.sum(s.tokens == IMAGE) == 4


def test_memory_keeps_one_position_and_later_text_names_its_item():
    s = go(example("a", "<image>", "b", "<image>", "c"), towers={"image": replace(TOWER, route="memory")})
    assert text(s.tokens) == "<s>a<image>b<image>c\nyes</s>"
    assert s.slots["image"].tolist() == [-1, -1, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert not s.kinds.any()


def test_a_pair_is_a_caption_and_an_image_without_positions():
    pair = Example(id="p", media=(Blob(kind="image", data=png()),), captions=("one", "two"))
    s = go(pair, "clip", {"image": POOL}, max_len=8)
    assert text(s.tokens) == "<s>one</s>"
    assert (s.slots["image"] == -1).all() and len(s.items) == 1
    chosen = {text(go(pair, "clip", {"image": POOL}, max_len=8, rng=np.random.default_rng(i)).tokens) for i in range(9)}
    assert chosen == {"<s>one</s>", "<s>two</s>"}
    assert len(go(pair, "siglip", {"image": POOL}, max_len=8)) == 8


def test_a_pair_under_a_chat_format_is_an_image_and_its_caption():
    pair = Example(id="p", media=(Blob(kind="image", data=png()),), captions=("one",))
    assert text(go(pair, "caption").tokens) == "<s>" + "<image>" * 4 + "one\n"


def test_the_caption_format_prefers_captions_to_questions():
    both = example("<image>", "how many?", answer="2", captions=("two cats",))
    assert text(go(both, "caption").tokens) == "<s>" + "<image>" * 4 + "two cats\n"
    assert text(go(both, "plain").tokens) == "<s>" + "<image>" * 4 + "how many?\n2</s>"


def test_a_prompt_ends_where_the_answer_begins():
    s = encode_prompt(example("<image>", "b?"), template="vicuna_v1", tokenizer=TOKENIZER, towers={"image": TOWER})
    assert text(s.tokens).endswith("USER: " + "<image>" * 4 + "b? ASSISTANT:")
    whole = go(example("<image>", "b?"), "vicuna_v1")
    assert whole.tokens[: len(s)].tolist() == s.tokens.tolist()
    assert not s.weights.any()


def test_text_may_be_cut_but_an_image_never():
    long = example("<image>", "?", answer="x" * 50)
    s = go(long, max_len=12, overlong="truncate")
    assert len(s) == 12 and s.targets[-1] == go(long).tokens[12]
    few = go(long, max_trained=3, overlong="truncate")
    assert np.count_nonzero(few.weights) == 3 and few.weights[-1] and few.tokens.tolist() == go(long).tokens[: len(few)].tolist()
    with pytest.raises(BadExample, match="58 positions, 4 of them media, for a row of 12.*raise data.seq_len"):
        go(long, max_len=12)
    with pytest.raises(BadExample, match="would cut a medium"):
        go(example("long text", "<image>"), max_len=8, overlong="truncate")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (example("q", answer="  "), "empty_answer"),
        (Example(id="e", turns=(Turn(role="user", parts=(Part(text="q"),)),)), "no_trained"),
        (Example(id="e", media=(Blob(kind="image", data=png()),)), "no_text"),
    ],
)
def test_an_example_with_nothing_to_learn_is_bad(bad, reason):
    with pytest.raises(BadExample, match="record 'e' is bad") as caught:
        go(bad)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (Blob(kind="image", path="/no/such.jpg"), "missing_file"),
        (Blob(kind="image", data=b"<html>not found</html>"), "decode"),
        (Blob(kind="image", data=png(4)), "tiny"),
    ],
)
def test_a_broken_header_is_found_before_packing(blob, reason):
    with pytest.raises(BadExample, match="record 'e' is bad") as caught:
        go(replace(example("<image>"), media=(blob,)))
    assert caught.value.reason == reason


def test_an_image_for_a_model_of_text_is_a_fault_of_the_recipe():
    with pytest.raises(ConfigError, match="the data has images and the model takes text only"):
        go(example("<image>"), towers={})
