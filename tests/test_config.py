"""Configurations: load, override, compare; and mistakes that name what was meant."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, field, replace
from typing import Any

import pytest

from mllm_jax.config import ConfigError, compare, config, load, nearest, override, parse, recipe_names, to_json
from mllm_jax.recipe import Adam, Data, Recipe, Stage


@config
class Part:
    width: int = 4
    rate: float = 0.1
    name: str = "a"
    on: bool = False
    limit: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] = ("*",)


@config
class Whole:
    part: Part = Part()
    parts: Mapping[str, Part] = field(default_factory=lambda: {"x": Part(), "y": Part(width=8, limit=5)})
    list: tuple[Part, ...] = (Part(), Part(width=2))
    weights: Mapping[str, float] = field(default_factory=lambda: {"a": 1.0})
    anything: Any = None


@pytest.mark.parametrize(("assignment", "read", "value"), [
    ("part.width=7", lambda c: c.part.width, 7),
    ("part.rate=1", lambda c: c.part.rate, 1.0),
    ("part.rate=1e-5", lambda c: c.part.rate, 1e-5),
    ("part.name=two words", lambda c: c.part.name, "two words"),
    ("part.name=none", lambda c: c.part.name, "none"),
    ("part.on=true", lambda c: c.part.on, True),
    ("part.name=none", lambda c: c.part.name, "none"),
    ("part.limit=3", lambda c: c.part.limit, 3),
    ("parts.y.limit=none", lambda c: c.parts["y"].limit, None),
    ("part.sizes=[3,4]", lambda c: c.part.sizes, (3, 4)),
    ("part.names=decoder/*", lambda c: c.part.names, ("decoder/*",)),
    ("parts.y.width=9", lambda c: c.parts["y"].width, 9),
    ("list.1.width=5", lambda c: c.list[1].width, 5),
    ("weights.a=2", lambda c: c.weights["a"], 2.0),
    ("weights.b=0.5", lambda c: c.weights, {"a": 1.0, "b": 0.5}),
    ("anything=(1,2)", lambda c: c.anything, (1, 2)),
])
def test_an_override_changes_one_field_and_nothing_else(assignment, read, value):
    before = Whole()
    after = override(before, assignment)
    assert read(after) == value and type(read(after)) is type(value)
    assert list(compare(before, after)) == [assignment.partition("=")[0]] and before == Whole()


@pytest.mark.parametrize(("assignment", "says"), [
    ("part.widht=7", "part.widht: Part has no field 'widht'; nearest: width"),
    ("part.width=wide", "part.width is int (now 4); got 'wide'"),
    ("part.width=1.5", "part.width is int (now 4); got 1.5"),
    ("part.width=true", "got True"),
    ("part.on=1", "part.on is bool"),
    ("parts.z.width=1", "nearest: x, y"),
    ("part.width", "write path.to.field=value"),
    ("part.width.deeper=1", "int has no field 'deeper'"),
])
def test_a_mistake_is_one_line_that_says_what_is_there(assignment, says):
    with pytest.raises(ConfigError) as error:
        override(Whole(), assignment)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_configuration_is_a_value():
    assert Whole() == Whole() and compare(Whole(), Whole()) == {}
    with pytest.raises(FrozenInstanceError):
        Part().width = 3
    with pytest.raises(TypeError):
        Part(3)


def test_compare_is_the_difference_and_stops_where_kinds_differ():
    a = Whole(anything=Part())
    b = replace(Whole(anything=Whole()), weights={"b": 1.0})
    assert compare(a, b) == {
        "weights.a": (1.0, None), "weights.b": (None, 1.0), "anything": (a.anything, b.anything)}


def test_json_keeps_class_names():
    assert json.loads(json.dumps(to_json(Whole())))["parts"]["y"] == to_json(Part(width=8, limit=5))
    assert to_json(Part())["_"] == "Part"


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1e-3", 1e-3), ("a b", "a b"), ("'1'", "1"), ("None", None), ("[1]", [1])])
def test_text_is_a_literal_or_itself(text, value):
    assert parse(text) == value


def test_nearest_gives_like_words_or_all():
    assert nearest("wdith", ["width", "height"]) == "width"
    assert nearest("zzz", ["width", "height"]) == "width, height"


def test_recipes_are_found_and_loaded_by_name():
    assert "first/digits" in recipe_names()
    assert isinstance(load("first/digits"), Recipe) and load("configs/first/digits.py") == load("first/digits")


@pytest.mark.parametrize(("name", "says"), [
    ("first/digit", "nearest: first/digits"),
    ("first/digits:size=3", "no knob 'size=3'; it has: none"),
])
def test_an_unknown_recipe_or_knob_is_named(name, says):
    with pytest.raises(ConfigError, match=says):
        load(name)


def test_tiny_keeps_the_stages_and_leaves_downloads_out():
    stage = Stage(data=Data(sources={"webli": 1.0}, batch_size=4096, seq_len=2048), objectives={}, optimizer=Adam(lr=1.0), steps=10**6,
                  weights={"decoder": "hf://a/b", "inputs": "stage://x", "other": "/a/folder"})

    class Model:
        def tiny(self) -> str:
            return "tiny model"

    tiny = Recipe(paper="p", model=Model(), stages={"x": stage}, params=1e9).tiny()
    assert tiny.model == "tiny model" and tiny.params is None and tiny.stages["x"].weights == {"inputs": "stage://x"}
    assert tiny.stages["x"].steps <= 100 and tiny.stages["x"].data.sources == {"shapes": 1.0}


def test_importing_config_does_not_import_jax():
    subprocess.run([sys.executable, "-c", "import sys, mllm_jax.config, mllm_jax.recipe; assert 'jax' not in sys.modules"], check=True)
