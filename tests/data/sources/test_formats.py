"""What is particular to one format: odd files, broken files, and what each of them says."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample
from mllm_jax.data.sources import json as json_source
from mllm_jax.data.sources import open_source, webdataset
from tests.data.sources.fixtures import add, png

CHAT = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "ok"}]


def lines(source) -> list[str]:
    return [source[i].turns[0].parts[0].text for i in range(len(source))]


# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 64, 1 << 24])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_found_in_pieces_of_any_size(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_source, "CHUNK", chunk)
    questions = ['brace } quote " and \\', "緑 [1, 2]", "", "x" * 300]
    rows = [{"question": q, "answer": "a", "n": i} for i, q in enumerate(questions)]
    for name, mark in (("a.json", ""), ("b.json", "\ufeff \n")):
        (tmp_path / name).write_text(mark + json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        source = open_source(f"messages:{name}", tmp_path)
        assert [source[i].extra["n"] for i in range(len(source))] == [0, 1, 2, 3]
        assert source[1].turns[0].parts[0].text == questions[1]


def test_json_that_is_no_list_or_breaks_off_is_refused_on_opening(tmp_path):
    for text, message in (
        ('{"a": 1}', "must be a JSON list of records; it begins with"),
        ("", "must be a JSON list"),
        ('[{"a": 1}, {"b":', "breaks off or is not JSON at byte 16"),
        ('[{"a": 1}, {b: 2}]', "breaks off or is not JSON at byte 12"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            open_source("llava:a.json", tmp_path)


def test_a_broken_line_is_one_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n{oops\n" + json.dumps({"messages": CHAT}))
    source = open_source("messages:a.jsonl", tmp_path)
    assert len(source) == 3 and source[2].turns == source[0].turns
    with pytest.raises(BadExample, match="'a/1' is bad .malformed.: a.jsonl, record 1: Expecting property name"):
        source[1]


def test_places_are_kept_beside_large_files_and_found_again_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(json_source, "REMEMBER", 0)
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": "a"}) for i in range(5)))
    assert lines(open_source("messages:a.jsonl", tmp_path)) == [f"q{i}" for i in range(5)]
    assert (tmp_path / "a.jsonl.offsets.npy").is_file()
    monkeypatch.setattr(json_source, "_scan", lambda path: pytest.fail("the kept places were not used"))
    assert lines(open_source("messages:a.jsonl", tmp_path)) == [f"q{i}" for i in range(5)]
    monkeypatch.undo()
    monkeypatch.setattr(json_source, "REMEMBER", 0)
    file.write_text("\n".join(json.dumps({"question": f"longer{i}", "answer": "a"}) for i in range(3)))
    assert lines(open_source("messages:a.jsonl", tmp_path)) == [f"longer{i}" for i in range(3)]


def test_ids_that_a_file_repeats_stay_unique(tmp_path):
    rows = [{"id": "same", "messages": CHAT}] * 3
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = open_source("llava:a.json", tmp_path)
    assert [source[i].id for i in range(3)] == ["a/0/same", "a/1/same", "a/2/same"]


# --- tars ---------------------------------------------------------------------------------------------------------


def shard(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)


def test_pairs_as_img2dataset_writes_them(tmp_path):
    meta = {"caption": "from json", "status": "success", "width": 16, "key": "000000001"}
    shard(
        tmp_path / "00000.tar",
        ("000000000.jpg", png(0)), ("000000000.txt", b"from txt\n"), ("000000000.json", json.dumps(meta).encode()),
        ("000000001.jpg", png(1)), ("000000001.json", json.dumps(meta).encode()),
        ("000000002.jpg", png(2)),
        ("000000003.json", json.dumps({"status": "failed_to_download"}).encode()),
        ("000000004.json", b"{"),
        ("000000005.txt", b"alone"),
    )  # fmt: skip
    source = open_source("webdataset:00000.tar", tmp_path)
    assert [source[i].captions for i in (0, 1)] == [("from txt",), ("from json",)]
    assert source[0].id == "00000/00000/000000000" and source[0].extra == {"width": 16}
    assert source[0].media[0].data == png(0)
    assert open_source("webdataset:00000.tar?text=json.caption", tmp_path)[0].captions == ("from json",)
    for i, reason in ((2, "no_text"), (3, "missing_file"), (4, "malformed"), (5, "missing_file")):
        with pytest.raises(BadExample) as error:
            source[i]
        assert error.value.reason == reason and error.value.id == f"00000/00000/00000000{i}"


def test_names_are_split_where_asked(tmp_path):
    two = ("x/img.v2.PNG", png(0)), ("x/img.v2.txt", b"two")
    shard(tmp_path / "a.tar", *two, ("y.left.png", png(1)), ("y.txt", b"y"))
    source = open_source("webdataset:a.tar", tmp_path)
    assert len(source) == 3 and source[0].id == "a/a/x/img.v2" and source[0].captions == ("two",)
    first = open_source("webdataset:a.tar?key=first", tmp_path)
    assert len(first) == 2 and first[1].captions == ("y",) and len(first[1].media) == 1
    with pytest.raises(ConfigError, match="key='middle'"):
        open_source("webdataset:a.tar?key=middle", tmp_path)


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    shard(tmp_path / "0.tar", ("k.png", png(0)), ("k.txt", b"a"), ("k.png", png(1)), ("k.txt", b"b"))
    shard(tmp_path / "1.tar", ("k.png", png(2)), ("k.txt", b"c"))
    source = open_source("webdataset:*.tar", tmp_path)
    assert [source[i].captions[0] for i in range(3)] == ["a", "b", "c"]
    assert len({source[i].id for i in range(3)}) == 3


def test_shards_are_found_by_pattern(tmp_path):
    for i in (8, 9, 10):
        shard(tmp_path / f"s{i:03d}.tar", ("k.png", png(i)), ("k.txt", str(i).encode()))
    for pattern in ("s{008..010}.tar", "s*.tar", "."):
        source = open_source(f"webdataset:{pattern}", tmp_path)
        assert [source[i].captions[0] for i in range(len(source))] == ["8", "9", "10"]
    with pytest.raises(ConfigError, match="s007.tar, which is not there"):
        open_source("webdataset:s{007..010}.tar", tmp_path)


def test_a_tar_that_breaks_off_is_refused_on_opening(tmp_path):
    shard(tmp_path / "a.tar", ("k.png", png(0, 64)), ("k.txt", b"a"), ("l.png", png(1, 64)))
    whole = (tmp_path / "a.tar").read_bytes()
    for size in (len(png(0, 64)) // 2, len(whole) - 10240 - 512):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="breaks off"):
            open_source("webdataset:a.tar", tmp_path)
    (tmp_path / "a.tar").write_bytes(b"<html>" * 1000)
    with pytest.raises(ConfigError, match="is no tar"):
        open_source("webdataset:a.tar", tmp_path)


def test_the_index_of_a_large_shard_is_kept_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "REMEMBER", 0)
    shard(tmp_path / "a.tar", ("é.png", png(0)), ("é.txt", b"a"), ("l.png", png(1)), ("l.txt", b"b"))
    before = [open_source("webdataset:a.tar", tmp_path)[i] for i in range(2)]
    assert (tmp_path / "a.tar.members.npz").is_file()
    monkeypatch.setattr(webdataset, "_members", lambda shard: pytest.fail("the kept index was not used"))
    assert [open_source("webdataset:a.tar", tmp_path)[i] for i in range(2)] == before
    assert before[0].id == "a/a/é"


# --- Parquet ------------------------------------------------------------------------------------------------------


def test_parquet_columns_by_name_and_by_renaming(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    picture = {"bytes": png(0), "path": "a.png"}
    table = pa.table({"img": [picture] * 5, "alt": [f"c{i}" for i in range(5)], "big": ["x" * 9] * 5})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = open_source("parquet:a.parquet?rename=img:image+alt:caption&columns=img+alt&groups=1", tmp_path)
    order = [4, 0, 3, 1, 2, 2]
    assert [source[i].captions[0] for i in order] == [f"c{i}" for i in order]
    assert source[0].media[0].data == png(0) and source[0].extra == {}
    with pytest.raises(ConfigError, match="has no column 'imge'; nearest: img"):
        open_source("parquet:a.parquet?columns=imge", tmp_path)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ConfigError, match="is not Parquet, or breaks off"):
        open_source("parquet:a.parquet", tmp_path)


# --- TFDS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_tfds_splits_are_cut_exactly_and_tensorflow_stays_out(tmp_path, file_format):
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.core.registered.skip_registration():

        class Labelled(tfds.core.GeneratorBasedBuilder):
            code_path = None
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                caption = {"id": tfds.features.Scalar(np.int64), "text": tfds.features.Text()}
                features = {
                    "image": tfds.features.Image(),
                    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                    "captions": tfds.features.Sequence(caption),
                    "n": tfds.features.Scalar(np.int64),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(27), "test": self._generate_examples(4)}

            def _generate_examples(self, count):
                for i in range(count):
                    captions = [{"id": j, "text": f"{i}-{j}"} for j in range(i % 3)]
                    yield i, {"image": io.BytesIO(png(i)), "label": i % 2, "captions": captions, "n": i}

    builder = Labelled(data_dir=str(tmp_path), file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(compute_stats="skip"))
    opened = lambda split: open_source(f"tfds:labelled/1.0.0?split={split}", tmp_path)
    everything = opened("train")
    numbers = [everything[i].extra["n"] for i in range(27)]
    assert sorted(numbers) == list(range(27)) and everything.name == "labelled/1.0.0"
    part = opened("train[10:15]")
    assert [part[i].extra["n"] for i in range(len(part))] == numbers[10:15]
    assert [part[i].id for i in range(5)] == [everything[i].id for i in range(10, 15)]
    assert len(opened("train[:50%25]")) == 14 and len(opened("train[-2:]+test")) == 6
    for i in range(27):
        example, n = everything[i], numbers[i]
        assert example.media[0].data == png(n)
        assert example.answers == (("cat", "dog")[n % 2],)
        assert example.captions == (tuple(f"{n}-{j}" for j in range(n % 3)) or example.answers)
    with pytest.raises(ConfigError, match="has no split 'trian'; nearest: train"):
        opened("trian")
    code = "import sys; from mllm_jax.data.sources import open_source; open_source(*sys.argv[1:])[0]\n"
    code += "print('tensorflow' in sys.modules)"
    command = [sys.executable, "-c", code, "tfds:labelled/1.0.0", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"
