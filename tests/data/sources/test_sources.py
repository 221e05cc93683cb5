"""Laws that every source obeys, each on real files that the fixtures write."""

import hashlib
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample
from mllm_jax.data.images import decode_image
from mllm_jax.data.sources import Rows, Slice, cut_range, open_source
from mllm_jax.data.sources.shapes import COLOURS, Shapes
from mllm_jax.data.sources.shots import joined
from mllm_jax.types import Part
from tests.data.sources import fixtures
from tests.data.sources.fixtures import RECORDS, expected, plain


@pytest.fixture(scope="module", params=fixtures.FORMATS, ids=lambda write: write.__name__)
def opened(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    name = request.param(folder)
    return name, folder, open_source(name, folder)


def pixels(example):
    """Media by their pixels: a source of decoded images has to encode them again."""
    return [decode_image(blob.data).tolist() for blob in example.media]


def test_a_record_gives_the_same_example_in_every_format(opened):
    name, _, source = opened
    assert len(source) == len(RECORDS)
    order = range(len(RECORDS))
    if name.startswith("tfds:"):        # TFDS shuffles when it writes, so records are found by their answer
        answers = [source[i].turns[-1].parts[0].text for i in order]
        order = [answers.index(answer) for _, _, answer in RECORDS]
    for i, record in zip(order, RECORDS, strict=True):
        got, wanted = plain(source[i]), expected(record)
        assert pixels(got) == pixels(wanted)
        if not name.startswith("python:"):
            assert got.media == wanted.media
        assert (got.turns, got.captions, got.answers, got.extra) == (wanted.turns, (), (), {})


def test_ids_are_unique_and_the_same_every_time(opened):
    name, folder, source = opened
    ids = [source[i].id for i in range(len(source))]
    assert len(set(ids)) == len(ids)
    again = open_source(name, folder)
    assert [again[i].id for i in range(len(again))] == ids


def test_a_source_travels_as_its_paths(opened):
    _, _, source = opened
    source[0]                           # whatever is kept in memory must not travel
    data = pickle.dumps(source)
    assert len(data) < 40_000
    assert not any(image[100:140] in data for images, _, _ in RECORDS for image in images)
    copy = pickle.loads(data)
    assert [plain(copy[i]).turns for i in range(len(copy))] == [plain(source[i]).turns for i in range(len(source))]


def test_numbers_outside_are_refused(opened):
    _, _, source = opened
    for index in (-1, len(source), len(source) + 1000):
        with pytest.raises(IndexError):
            source[index]


def test_a_slice_of_a_source_is_a_source(opened):
    name, folder, source = opened
    part = open_source(f"{name}?slice=2:50%", folder)
    assert [part[i].id for i in range(len(part))] == [source[2].id]
    assert [e.id for e in open_source(f"{name}?slice=-2:", folder)] == [source[4].id, source[5].id]
    with pytest.raises(ConfigError, match="holds no record: slice=9: of 6"):
        open_source(f"{name}?slice=9:", folder)


def test_parts_are_cut_in_records_and_percent():
    assert cut_range("", 10) == range(10) and cut_range("10:15", 12) == range(10, 12)
    assert list(cut_range(":25%", 10)) == [0, 1] and list(cut_range("25%:", 10)) == list(range(2, 10))
    assert list(cut_range("-30%:", 10)) == [7, 8, 9] and list(cut_range("-3:-1", 10)) == [7, 8]
    for wrong in ("5", "%:", "a:b", "1:2:3", "5%"):
        with pytest.raises(ConfigError, match="is not a part of a source"):
            cut_range(wrong, 10)
    assert len(Slice([1, 2, 3], range(0))) == 0


def test_unknown_names_formats_and_options_name_the_nearest():
    with pytest.raises(ConfigError, match="'llava_mix_665'; nearest: llava_mix_665k"):
        open_source("llava_mix_665")
    with pytest.raises(ConfigError, match="'lava' is not a format of data; nearest: llava"):
        open_source("lava:chat.json")
    with pytest.raises(ConfigError, match="has no option 'image'; nearest: images"):
        open_source("llava:chat.json?image=x")
    with pytest.raises(ConfigError, match="webli is not public"):
        open_source("webli")


def test_missing_files_are_named_with_their_place_and_address(tmp_path):
    message = r"llava_lcs_558k needs \S*LLaVA-Pretrain/images.* https://huggingface.co"
    with pytest.raises(ConfigError, match=message) as error:
        open_source("llava_lcs_558k", tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="llava_mix_665k needs .*coco/train2017, which is not there"):
        open_source("llava_mix_665k", tmp_path)
    formats = {"llava": "x.json", "parquet": "x", "tfds": "x", "array_record": "x", "webdataset": "{0..3}.tar"}
    for format, path in formats.items():
        with pytest.raises(ConfigError, match="which is not there; the data root is"):
            open_source(f"{format}:{path}", tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no record"):
        open_source("messages:empty.jsonl", tmp_path)


def test_shapes_are_the_same_everywhere_and_answer_their_questions():
    source = open_source("shapes")
    assert len(source) == 4096 and source[7] == pickle.loads(pickle.dumps(source))[7] == Shapes()[7]
    code = "from mllm_jax.data.sources import open_source; import hashlib; e = open_source('shapes')[7]\n"
    code += "print(hashlib.sha256(e.media[0].data).hexdigest(), e.captions[0])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == f"{hashlib.sha256(source[7].media[0].data).hexdigest()} {source[7].captions[0]}"
    examples = [source[i] for i in range(200)]
    assert {e.kind for e in examples} == {"colour", "shape", "place", "count"}
    for example in examples:
        assert decode_image(example.media[0].data).shape == (64, 64, 3)
        question, answer = example.turns[0].parts[1].text, example.answers[0]
        if example.kind == "count":
            assert int(answer) == example.captions[0].count(",") + 1
        else:                           # the answer is in the caption, beside what was asked about
            things = [thing.split(" ", 2) for thing in example.captions[0].split(", ")]
            colour, shape, place = next(t for t in things if t[1] in question or question.endswith(f"the {t[2]}?"))
            assert answer == {"colour": colour, "shape": shape, "place": place}[example.kind]
    # Most captions fit one image only, or a contrastive loss could not be learned.
    assert len({source[i].captions[0] for i in range(1000)}) > 850


def test_the_colour_of_a_shape_is_in_its_picture():
    for i in range(50):
        example = Shapes()[i]
        seen = {tuple(c) for c in np.unique(decode_image(example.media[0].data).reshape(-1, 3), axis=0).tolist()}
        named = {thing.split()[0] for thing in example.captions[0].split(", ")}
        assert {name for name, colour in COLOURS.items() if colour in seen} == named


def test_python_sequences_say_what_is_wrong():
    with pytest.raises(ConfigError, match="has no 'row'; nearest: rows"):
        open_source("python:tests.data.sources.fixtures:row")
    with pytest.raises(ConfigError, match="module 'no_such_thing' cannot be imported"):
        open_source("python:no_such_thing:rows")
    with pytest.raises(ConfigError, match="a source needs a length and items"):
        Rows(iter([]))
    with pytest.raises(BadExample, match="'rows/0' is bad .malformed.: a record must be a dict"):
        Rows([3])[0]


def test_shots_come_before_a_record_with_their_media():
    plain, few = open_source("shapes"), open_source("shapes?shots=2&slice=:5")
    assert len(few) == 5
    example = few[3]
    assert example.id == plain[3].id and example.answers == plain[3].answers and len(example.media) == 3
    first = [turn for turn in example.turns if turn.role == "user"]
    assert [p.media for turn in first for p in turn.parts if p.kind == "image"] == [0, 1, 2]
    assert example.turns[4].parts[1:] == plain[3].turns[0].parts[1:] and example.media[2] == plain[3].media[0]
    drawn = {few[i].media[k].data for i in range(5) for k in (0, 1)}
    assert drawn <= {plain[i].media[0].data for i in range(5)} and few[3] == few[3]
    assert all(plain[i].media[0].data not in {m.data for m in few[i].media[:2]} for i in range(5))
    pairs = joined([replace(plain[i], turns=(), captions=("one", "or two")) for i in (0, 1)])
    assert [t.role for t in pairs.turns] == ["user", "assistant"] * 2 and pairs.turns[3].parts == (Part(text="one"),)
    for wrong in ("5", "few"):
        with pytest.raises(ConfigError, match="shots="):
            open_source(f"shapes?slice=:5&shots={wrong}")
