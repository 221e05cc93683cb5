"""Tokenizers made here, saved, and read back."""

import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.tokenizer import load_tokenizer, placeholder

TEXTS = ["the red circle is left of the blue square", "the red square is at 12 and 21", "where is the red circle?"] * 3


def test_bytes_decode_to_what_was_encoded():
    tokenizer = load_tokenizer("bytes")
    assert len(tokenizer) == 256 + 4
    text = "naïve 12.5 €\n\tx  y 😀 ."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_pairs_merge_words_with_their_space_and_leave_digits_alone():
    tokenizer = load_tokenizer("bpe:400", TEXTS)
    assert tokenizer.tokenize("the red circle 12") == ["the", "Ġred", "Ġcircle", "Ġ", "1", "2"]


def test_training_does_not_depend_on_the_order_of_the_texts():
    one, two = load_tokenizer("bpe:300", TEXTS), load_tokenizer("bpe:300", reversed(TEXTS))
    assert one.get_vocab() == two.get_vocab()


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_a_saved_tokenizer_reads_back_the_same(name, tmp_path):
    tokenizer = load_tokenizer(name, TEXTS, media=("image", "audio"), tokens=("<|im_end|>",))
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path), media=("image", "audio"), tokens=("<|im_end|>",))
    text = "<s>the red <image> is 7<audio><|im_end|></s>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert len(again) == len(tokenizer)
    assert (again.pad_token, again.bos_token, again.eos_token) == ("<pad>", "<s>", "</s>")


def test_a_folder_without_the_placeholder_is_given_one(tmp_path):
    load_tokenizer("bytes", media=()).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    token, id = placeholder(tokenizer, "image")
    assert (token, id) == ("<image>", 259)
    assert tokenizer("a<image>b").input_ids[1] == id


def test_a_modality_that_was_not_asked_for_has_no_placeholder():
    with pytest.raises(ConfigError, match=r"no <video>; load it with media=\('video',\)"):
        placeholder(load_tokenizer("bytes"), "video")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bpe:100", "bpe:SIZE with SIZE at least 260"),
        ("bpe:300", "trained on text and was given none"),
        ("no-such-folder", "write bytes, bpe:SIZE, hf://name, or a folder"),
    ],
)
def test_a_name_that_cannot_be_loaded_is_one_clear_line(name, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(name)
