"""A conversion is read back whole, or the reader says which file is not what was written."""

import json
from pathlib import Path

import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample
from mllm_jax.data.manifest import convert
from mllm_jax.data.sources import open_source
from mllm_jax.data.sources.python import Rows
from mllm_jax.types import Example

EXAMPLES = [Example(id=str(i), captions=("word " * i,)) for i in range(11)]
ALL = "array_record:set-*.array_record"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    convert(EXAMPLES, "somewhere", tmp_path / "set.array_record", shards=4)
    return tmp_path


def test_shards_hold_the_records_in_their_order(folder: Path):
    for name in (ALL, "array_record:.", "array_record:set-{00000..00003}-of-00004.array_record"):
        source = open_source(name, folder)
        assert [source[i] for i in range(len(source))] == EXAMPLES
    manifest = json.loads((folder / "set.manifest.json").read_text())
    assert [shard["records"] for shard in manifest["shards"]] == [2, 3, 3, 3] and manifest["records"] == 11
    assert {shard["file"]: shard["bytes"] for shard in manifest["shards"]} == {
        p.name: p.stat().st_size for p in folder.glob("*.array_record")}
    assert manifest["source"] == "somewhere" and manifest["schema"] == 1 and "mllm_jax" in manifest["versions"]


def test_a_second_conversion_writes_the_same_records(folder: Path, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    convert(EXAMPLES, "somewhere", other / "set.array_record", shards=4)
    assert (other / "set.manifest.json").read_bytes() == (folder / "set.manifest.json").read_bytes()


@pytest.mark.parametrize("known", [True, False], ids=["by its manifest", "by its name"])
def test_a_shard_that_is_lost_is_named(folder: Path, known: bool):
    (folder / "set-00002-of-00004.array_record").unlink()
    if not known:
        (folder / "set.manifest.json").unlink()
    for name in (ALL, "array_record:."):
        with pytest.raises(ConfigError, match=r"set-00002-of-00004.array_record is missing; 1 of 4 shards are: copy them again"):
            open_source(name, folder)
    # Some of the shards may be asked for by name, one of them even alone.
    assert len(open_source("array_record:set-00000-of-00004.array_record", folder)) == 2


def test_a_part_of_what_is_there_may_be_read(folder: Path):
    assert len(open_source("array_record:set-{00000..00001}-of-00004.array_record", folder)) == 5


def test_a_shard_of_another_size_is_named(folder: Path):
    file = folder / "set-00001-of-00004.array_record"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    for name in (ALL, f"array_record:{file.name}"):
        with pytest.raises(ConfigError, match=f"{file.name} has {size - 100:,} bytes; set.manifest.json says {size:,}; copy it again"):
            open_source(name, folder)


def test_a_shard_of_an_earlier_conversion_is_named(folder: Path):
    convert(EXAMPLES, "somewhere", folder / "set.array_record", shards=2)
    with pytest.raises(ConfigError, match=r"of-00004.array_record is not in set.manifest.json: it is left from another conversion"):
        open_source(ALL, folder)
    for old in folder.glob("*-of-00004.array_record"):
        old.unlink()
    assert len(open_source(ALL, folder)) == 11


def test_what_is_no_manifest_is_named(folder: Path):
    (folder / "set.manifest.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"set.manifest.json is not a manifest of data convert"):
        open_source(ALL, folder)


def test_bad_records_are_counted_by_reason(tmp_path: Path):
    rows = Rows([{"caption": "x"}, {"image": "no.png", "caption": "y"}, {}, {"caption": "z"}], name="rows")
    with pytest.raises(BadExample, match="'rows/1' is bad .missing_file."):
        convert(rows, "rows", tmp_path / "a.array_record")
    assert not list(tmp_path.glob("a.*json"))
    manifest = convert(rows, "rows", tmp_path / "a.array_record", skip_bad=True)
    assert manifest["records"] == 2 and manifest["left_out"] == {"missing_file": 1, "no_text": 1}
    assert [e.captions for e in open_source("array_record:a.array_record", tmp_path)] == [("x",), ("z",)]
