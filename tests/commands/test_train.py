"""The train verb: what it hands to the loop."""

from pathlib import Path

import pytest

from mllm_jax.cli import main
from mllm_jax.commands.common import run_name
from mllm_jax.config import load
from mllm_jax.launch import layouts
from mllm_jax.train import run


@pytest.fixture
def given(monkeypatch, tmp_path):
    """(recipe, options) of the calls that would train; the folder of a run gets a report."""
    calls = []

    def train(recipe, options):
        calls.append((recipe, options))
        options.out.mkdir(parents=True)
        (options.out / "report.html").touch()

    monkeypatch.setattr(run, "train", train)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_recipe_its_overrides_and_its_layout(given, capsys):
    argv = ["train", "first/digits", "--layout", "cpu-8:remat=full", "stages.align.steps=3", "--stages", "align,instruct",
            "--data-root", "d", "--save-every", "7", "stages.instruct.optimizer.lr=1"]
    assert main(argv) == 0
    [(recipe, options)] = given
    assert recipe.stages["align"].steps == 3 and recipe.stages["instruct"].optimizer.lr == 1.0
    assert options.name == "first/digits" and options.out == Path("runs/first-digits") and options.data_root == Path("d")
    assert options.layout.remat == "full" and options.layout.mesh["tensor"] == 2 and options.save_every == 7
    assert options.stages == ("align", "instruct") and options.overrides == ("stages.align.steps=3", "stages.instruct.optimizer.lr=1")
    assert not options.stop.is_set() and not options.fresh
    assert capsys.readouterr().out == "report: runs/first-digits/report.html\n"


def test_changes_that_belong_to_a_layout_come_before_those_of_the_user(given):
    data = "stages.instruct.data"
    layouts.write(Path("found.json"), layouts.LAYOUTS["cpu-8"], layouts.machine("cpu-8"), "first/digits", (f"{data}.seq_len=256", f"{data}.seed=3"))
    assert main(["train", "first/digits", "--layout", "found.json:remat=full", f"{data}.seed=5"]) == 0
    [(recipe, options)] = given
    assert recipe.stages["instruct"].data.seq_len == 256 and recipe.stages["instruct"].data.seed == 5
    assert options.overrides == (f"{data}.seq_len=256", f"{data}.seed=3", f"{data}.seed=5")
    assert options.layout.remat == "full" and options.layout.mesh == layouts.LAYOUTS["cpu-8"].mesh


def test_tiny_has_a_folder_of_its_own_and_an_override_is_the_last_word(given):
    assert main(["train", "first/digits", "--tiny", "--fresh", "stages.align.steps=5"]) == 0
    [(recipe, options)] = given
    assert recipe == load("first/digits", "stages.align.steps=5", tiny=True)
    assert recipe.stages["align"].steps == 5 and recipe.stages["align"].data.sources == {"digits_questions": 1.0}
    assert options.out == Path("runs/first-digits-tiny") and options.tiny and options.fresh


def test_resume_and_fresh_exclude_each_other(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "first/digits", "--resume", "--fresh"])
    assert "not allowed with" in capsys.readouterr().err and not given


def test_a_profile_and_the_age_of_the_process_are_handed_on(given, capsys):
    assert main(["train", "first/digits", "--profile", "20:5"]) == 0
    [(_, options)] = given
    assert options.profile == (20, 5) and options.startup > 0 and options.peak == 0          # that of a CPU is not in the table
    assert main(["train", "first/digits", "--profile", "20"]) == 2
    assert "--profile is '20'; write STEP:N, such as 20:5" in capsys.readouterr().err and len(given) == 1


def test_names_of_runs():
    assert run_name("projector/llava_15:size=13b", tiny=False) == "projector-llava_15-size-13b"
    assert run_name("configs/first/digits.py", tiny=True) == "first-digits-tiny"
