"""Text beside media: each with the text of its own turn, tokenized as the connector says."""

from dataclasses import replace

import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.connectors.qformer import QFormerConfig, Words
from mllm_jax.data.batch import collate, decode_items
from mllm_jax.data.pack import pack, row_spec
from mllm_jax.data.sources.shapes import Shapes
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import Square
from mllm_jax.data.words import tokens_of
from mllm_jax.encoders import vit
from mllm_jax.models.tower import TowerConfig
from mllm_jax.types import Part, Turn

WORDS = replace(Words().tiny(), length=9)
TOWER = TowerConfig(view=Square(size=32), encoder=vit.EVA_G14_224.tiny(), connector=QFormerConfig(tokens=17, queries=2, words=WORDS))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


def said(ids) -> str:
    return load_tokenizer(WORDS.tokenizer, media=()).decode([i for i in ids if i >= 0])


def test_a_long_text_loses_its_beginning_and_what_is_typed_is_letters():
    assert said(tokens_of("a cat", WORDS)) == "<s>a cat</s>"
    assert said(tokens_of("where is the cat", WORDS)) == "<s>the cat</s>" and len(tokens_of("where is the cat", WORDS)) == 9
    assert said(tokens_of("</s>", WORDS)[1:-1]) == "</s>" and len(tokens_of("</s>", WORDS)) == 6
    assert said(tokens_of("", WORDS)) == "<s></s>"
    with pytest.raises(ConfigError, match="has 259 tokens and the connector room for 200"):
        tokens_of("a", replace(WORDS, vocab=200))


def test_bert_begins_and_ends_with_its_own(tmp_path):
    pytest.importorskip("torch")
    from tests.hf.tiny_blip import bert

    bert().save_pretrained(tmp_path / "bert")
    read = load_tokenizer(str(tmp_path / "bert"), media=())
    ids = tokens_of("The moon", replace(WORDS, tokenizer=str(tmp_path / "bert"), length=20))
    assert ids.tolist() == bert()("the moon")["input_ids"] and ids[0] == read.cls_token_id
    assert (read.bos_token, read.eos_token) == ("[CLS]", "[SEP]")


def test_packed_media_keep_the_text_of_their_turns(tokenizer):
    scenes = Shapes(size=64)
    ask = lambda text, media: Turn(role="user", parts=(Part(kind="image", media=media), Part(text=text)))
    say = Turn(role="assistant", parts=(Part(text="yes"),))
    one = replace(scenes[0], turns=(ask("what?", 0), say), media=scenes[0].media)
    two = replace(scenes[1], turns=(ask("this?", 0), say, ask("that?", 1), say), media=(*scenes[1].media, *scenes[2].media))
    spec = row_spec(96, {"image": 4}, {"image": TOWER}, tokenizer.pad_token_id)
    sequences = [encode(e, template="instructblip", tokenizer=tokenizer, towers={"image": TOWER}) for e in (one, two)]
    [row] = pack(sequences, spec)
    batch = collate([row], [decode_items(row.media, {"image": TOWER}, exact=True)], spec)
    text = batch.media["image"].text
    assert text.shape == (1, 4, 9) and text.dtype == np.int32
    order = [said(ids) for ids in text[0]]
    assert sorted(order[:3]) == ["<s>that?</s>", "<s>this?</s>", "<s>what?</s>"] and order[3] == ""
    assert order.index("<s>that?</s>") == order.index("<s>this?</s>") + 1


def test_a_tower_without_words_has_no_text():
    plain = replace(TOWER, connector=replace(TOWER.connector, words=None))
    assert row_spec(96, {}, {"image": plain}, 0).media["image"].text == 0
    assert row_spec(96, {}, {"image": replace(TOWER, route="pool")}, 0).media["image"].text == 0       # rows that are that text
