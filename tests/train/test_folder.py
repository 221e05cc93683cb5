"""Whose a run's folder is: a mistake claims nothing, what was saved is kept, and nobody else's file is touched."""

from pathlib import Path

import pytest

from mllm_jax.config import ConfigError, load, override
from mllm_jax.recipe import Recipe
from mllm_jax.train.folder import Run, RunOptions, prepare


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load("projector/llava_15").tiny()


def begin(recipe: Recipe, out: Path, **options: bool) -> Run:
    return prepare(recipe, RunOptions(name="projector/llava_15", out=out, **options))


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_mistake_makes_no_folder(recipe: Recipe, tmp_path: Path):
    for wrong in ("tokenizer=nowhere", "stages.align.data.batch_size=7"):
        with pytest.raises(ConfigError):
            begin(override(recipe, wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_where_nothing_was_saved_is_free(recipe: Recipe, tmp_path: Path):
    begin(override(recipe, "stages.align.optimizer.lr=0.5"), tmp_path / "run")
    for file in ("tokenizer/stale.json", "notes.txt"):
        (tmp_path / "run" / file).write_text("mine")
    begin(recipe, tmp_path / "run")
    begin(recipe, tmp_path / "new")
    assert content(tmp_path / "run") == content(tmp_path / "new") | {"notes.txt": b"mine"}


def test_what_was_saved_is_kept_until_it_is_to_be_forgotten(recipe: Recipe, tmp_path: Path):
    begin(recipe, tmp_path)
    (tmp_path / "stages" / "align" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "data.json").write_text("mine")
    before = content(tmp_path)
    other = override(recipe, "stages.align.optimizer.lr=0.5")
    with pytest.raises(ConfigError, match=r"stages\.align\.optimizer\.lr was 0.001 and is 0.5; choose another --out, or --fresh"):
        begin(other, tmp_path)
    assert content(tmp_path) == before
    assert begin(recipe, tmp_path).start_of("align") == 3
    run = begin(other, tmp_path, fresh=True)
    assert run.start_of("align") == 0 and (tmp_path / "data.json").read_text() == "mine"
