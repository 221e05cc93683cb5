"""Layouts in files: read as they were written, changed after a colon, and refused in one line."""

import json
from pathlib import Path

import pytest

from mllm_jax.config import ConfigError
from mllm_jax.launch.layout_file import path_of
from mllm_jax.launch.layouts import LAYOUTS, Machine, auto, find, machine, overrides, words, write
from mllm_jax.launch.runtime import pretended_devices

PLAIN = {"machine": {"chip": "v5e", "chips": 8}, "layout": {"mesh": {"fsdp": 8}, "remat": "none", "rules": {"batch": ["data", "fsdp"]}}}


@pytest.fixture
def file(tmp_path):
    """Writes this and gives its name."""

    def put(what):
        path = tmp_path / "found.json"
        path.write_text(what if isinstance(what, str) else json.dumps(what))
        return str(path)

    return put


@pytest.mark.parametrize("name", ["v5e-256x2", "cpu-8-experts", "v5p-512"])
def test_what_is_written_is_read_again(name, tmp_path):
    path = tmp_path / "a.b.json"
    write(path, LAYOUTS[name], machine(name), "projector/gemma3:size=4b", ("stages.instruct.data.seq_len=4096",))
    assert find(str(path), "tpu") == LAYOUTS[name] and machine(str(path)) == machine(name)
    assert overrides(str(path), "projector/gemma3") == ("stages.instruct.data.seq_len=4096",)
    assert pretended_devices(str(path)) == pretended_devices(name)


def test_fields_that_are_missing_have_their_defaults_and_changes_may_follow(file):
    name = file(PLAIN)
    layout = find(f"{name}:microbatches=4,rules.embed=('data','fsdp'),remat=none,mesh.data=2", "tpu")
    assert layout.dtype == "float32" and layout.microbatches == 4 and layout.remat == "none"
    assert layout.mesh == {"fsdp": 8, "data": 2} and layout.rules == {"batch": ("data", "fsdp"), "embed": ("data", "fsdp")}
    assert machine(f"{name}:microbatches=4") == Machine("v5e", 8, 1) and overrides(name, "first/digits") == ()


def test_only_what_ends_in_json_is_a_file():
    assert path_of("runs/a.json:remat=full") == path_of("runs/a.json") == Path("runs/a.json")
    assert path_of("v5e-8") is path_of("v5e-8:remat=full") is path_of("a.jsonl") is None


def test_words_say_what_a_file_does(file):
    layout = {"mesh": {"expert": 4}, "slices": 2, "rules": auto("tpu").rules}
    name = file(PLAIN | {"machine": {"chip": "v5e", "chips": 4, "slices": 2}, "layout": layout})
    said = find(words(f"{name}:microbatches=2"), "tpu")
    assert said.mesh == {"data": 1, "fsdp": 1, "tensor": 1, "expert": 4} and (said.slices, said.microbatches, said.dtype) == (2, 2, "float32")
    name = file(PLAIN)
    assert find(words(name), "tpu").rules["batch"] == find(name, "tpu").rules["batch"] and words("v5e-8") == "v5e-8"


@pytest.mark.parametrize(("what", "says"), [
    ("{", "is not JSON"), ([], "is no layout"), ({"layout": {}}, "needs machine and layout"), (PLAIN | {"layuot": {}}, "nearest: layout"),
    (PLAIN | {"layout": {"rematt": "full"}}, "nearest: remat"), (PLAIN | {"layout": {"mesh": {"fsdp": "8"}}}, "mesh.fsdp is int"),
    (PLAIN | {"machine": {"chip": "v5e"}}, "machine needs chips"), (PLAIN | {"machine": {"chip": "v5e", "chips": 0}}, "chips is 0"),
    (PLAIN | {"overrides": ["seq_len"]}, "'seq_len' is not an override"),
])
def test_a_bad_file_is_one_line(file, what, says):
    name = file(what)
    with pytest.raises(ConfigError, match=says) as error:
        find(name, "tpu")
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none.json cannot be read"):
        pretended_devices(str(tmp_path / "none.json"))


def test_changes_of_a_recipe_are_not_made_to_another(file):
    name = file(PLAIN | {"recipe": "projector/gemma3", "overrides": ["stages.instruct.data.seq_len=4096"]})
    with pytest.raises(ConfigError, match="for which it was found, and this is resolution/m3; search again"):
        overrides(name, "resolution/m3")


def test_a_path_may_be_written_in_any_way(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(json.dumps({"machine": {"chip": "cpu", "chips": 1}, "layout": {"remat": "dots"}}))
    assert find("./a.json", "cpu") == find("a.json", "cpu")
    assert find(".//a.json:microbatches=2", "cpu").microbatches == 2
