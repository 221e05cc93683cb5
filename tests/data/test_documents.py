"""Web documents to parts, and from there to the text and the labels of OpenFlamingo."""

import base64
import io
import json
import tarfile
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest

from mllm_jax.config import load
from mllm_jax.data.adapters import parse
from mllm_jax.data.errors import BadExample
from mllm_jax.data.formats import TOKENS
from mllm_jax.data.sources import open_source
from mllm_jax.data.sources.shapes import Shapes
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.types import Example, Part

PNG = [Shapes(size=16)[i].media[0].data for i in range(4)]
SENTENCES = ["It began.", "Rain fell", "and fell.", "Then sun.", "The end."]
# As MMC4 lists them: not in the order of the text, two before one sentence, one that matches badly.
MATCHED = [(3, 0.3), (1, 0.4), (3, 0.25), (4, 0.2)]


def mmc4(**more) -> dict:
    info = [{"image_base64": base64.b64encode(PNG[i]).decode(), "matched_text_index": at, "matched_sim": sim}
            for i, (at, sim) in enumerate(MATCHED)]
    return {"text_list": SENTENCES, "image_info": info, "similarity_matrix": [[0.1] * 5] * 4, "url": "u"} | more


def read(raw: dict, **options) -> Example:
    return parse(raw, id="d", source="s", **options)


def shape(example: Example) -> list:
    """Texts, and numbers of PNG."""
    [turn] = example.turns
    assert turn.role == "assistant" and turn.weight is None
    return [p.text if p.kind == "text" else PNG.index(example.media[p.media].data) for p in turn.parts]


def test_images_of_mmc4_stand_before_their_sentences():
    assert shape(read(mmc4())) == ["It began.", 1, "Rain fell and fell.", 0, 2, "Then sun.", 3, "The end."]
    assert shape(read(mmc4(), similarity=0.24)) == ["It began.", 1, "Rain fell and fell.", 0, 2, "Then sun. The end."]
    assert shape(read(mmc4(), similarity=0.24, most=2)) == ["It began.", 1, "Rain fell and fell.", 0, "Then sun. The end."]
    assert shape(read(mmc4(), most=0)) == [" ".join(SENTENCES)]
    assert read(mmc4()).extra == {"url": "u"} and len(read(mmc4(), most=2).media) == 2


def test_places_of_obelics_hold_a_text_or_an_image():
    raw = {"images": [None, PNG[2], PNG[0], None, None, None], "texts": ["a", None, None, "b", None, "c"], "metadata": "[]"}
    assert shape(read(raw)) == ["a", 2, 0, "b\n\nc"]
    assert shape(read(raw, most=1)) == ["a", 2, "b\n\nc"]
    files = read({"images": ["x.png", None], "texts": [None, "y"]}, root=None)
    assert [blob.path for blob in files.media] == ["x.png"] and files.turns[0].parts[0] == Part(kind="image", media=0)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"images": [PNG[0]], "texts": ["a"]}, "malformed"),
        ({"images": [None], "texts": [None]}, "no_text"),
        ({"text_list": ["a"], "image_info": [{"image_name": "x.png", "matched_text_index": 1}]}, "malformed"),
        ({"text_list": ["a"], "image_info": [{"image_base64": "?", "matched_text_index": 0}]}, "decode"),
        ({"texts": ["a", None], "images": [None, "https://x.org/y.png"]}, "missing_file"),
    ],
)
def test_what_is_wrong_with_a_document_is_said(raw, reason):
    with pytest.raises(BadExample) as error:
        read(raw)
    assert error.value.reason == reason and error.value.id == "d"


def test_shards_of_mmc4_are_a_source(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        data = json.dumps(mmc4()).encode()
        info = tarfile.TarInfo("000.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    assert shape(open_source("webdataset:0.tar?similarity=0.24&most=2", tmp_path)[0]) == shape(read(mmc4(), similarity=0.24, most=2))
    (tmp_path / "d.jsonl").write_text(json.dumps(mmc4()))
    assert shape(open_source("messages:d.jsonl?similarity=0.24", tmp_path)[0]) == shape(read(mmc4(), similarity=0.24))


def official(ids: np.ndarray, image: int, end: int, *, document: bool) -> np.ndarray:
    """Which ids are labels in open_flamingo/train/train_utils.py (mlfoundations/open_flamingo, 0086047), said in other words."""
    label = ids != image
    label[0] = False
    if document:
        seen, open_ = False, True
        for i, id in enumerate(ids):
            seen |= id == image
            open_ |= id == image
            label[i] &= seen and open_
            open_ &= id != end
    return label


@pytest.fixture(scope="module")
def words():
    return load_tokenizer("bytes", tokens=TOKENS["flamingo"])


@pytest.fixture(scope="module")
def tower():
    return load("projector/llava").tiny().model.inputs["image"]


@pytest.mark.parametrize("document", [False, True])
def test_text_and_labels_are_those_of_open_flamingo(words, tower, document):
    """A chunk of text belongs to the image before it; text before the first one, and the end of a document, are not trained."""
    pair = Example(id="p", source="s", captions=(" a red moon ",), media=read(mmc4()).media[:1])
    example = read(mmc4(), similarity=0.24) if document else pair
    beside = SimpleNamespace(**{**vars(tower), "route": "memory", "num_tokens": lambda grid: (1, 1, prod(grid)), "patch": tower.patch, "words": None})
    beside.kinds = {"": beside}
    s = encode(example, template="flamingo", tokenizer=words, towers={"image": beside})
    text = words.decode(s.tokens)
    assert text == (
        "<s>It began.<image>Rain fell and fell.<|endofchunk|><image><|endofchunk|><image>Then sun. The end.<|endofchunk|></s>" if document
        else "<s><image>a red moon<|endofchunk|></s>")
    image, end = (words.convert_tokens_to_ids(t) for t in ("<image>", "<|endofchunk|>"))
    np.testing.assert_array_equal(s.weights[:-1] > 0, official(s.tokens, image, end, document=document)[1:])
    np.testing.assert_array_equal(s.slots["image"], np.cumsum(s.tokens == image) - 1)       # as `media_time` counts
