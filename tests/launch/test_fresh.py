"""The two commands of the README: what they make, and when they do not make it again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_jax.launch import fresh

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The commands that would be run; the project stands in a folder of its own."""
    made: list[list[str]] = []
    (tmp_path / "setup.py").write_text("setup()")
    monkeypatch.setattr(fresh, "ROOT", tmp_path)

    def run(command, **_):
        made.append(command)
        if command[1:3] == ["-m", "venv"]:
            Path(command[3]).mkdir()
        return 0

    monkeypatch.setattr(subprocess, "check_call", run)
    monkeypatch.setattr(subprocess, "call", run)
    return made


def test_an_environment_is_made_once_and_again_when_setup_changes(calls, tmp_path):
    assert fresh.main(["first", "--out", "x"]) == 0
    venv, install, train = calls
    assert venv[3].endswith(".venv-first") and install[-1] == str(tmp_path)
    assert train[1:] == ["-m", "mllm_jax.cli", "train", "first/digits", "--out", "x"] and train[0].startswith(venv[3])
    fresh.main(["first"])
    assert len(calls) == 4
    (tmp_path / "setup.py").write_text("setup(more)")
    fresh.main(["first"])
    assert len(calls) == 7


def test_the_two_commands_need_nothing_of_each_other(calls):
    fresh.main(["first"])
    first = len(calls)
    fresh.main(["test", "-k", "x"])
    venv, install, tests = calls[first:]
    assert venv[3].endswith(".venv-test") and install[-1].endswith("[test]") and tests[1:3] == ["-m", "pytest"] and tests[-2:] == ["-k", "x"]


def test_a_failed_installation_is_tried_again(calls, monkeypatch):
    done = subprocess.check_call

    def fail(command, **kw):
        if "pip" in command:
            raise subprocess.CalledProcessError(1, command)
        return done(command, **kw)

    monkeypatch.setattr(subprocess, "check_call", fail)
    with pytest.raises(subprocess.CalledProcessError):
        fresh.main(["first"])
    monkeypatch.setattr(subprocess, "check_call", done)
    before = len(calls)
    fresh.main(["first"])
    assert any("pip" in c for c in calls[before:])


def test_an_old_python_looks_for_another(monkeypatch):
    monkeypatch.setattr(fresh, "NEEDS", (9, 99))
    with pytest.raises(SystemExit, match=r"Python 9\.99 or later is needed"):
        fresh.suitable_python()
    monkeypatch.setattr(fresh, "NEEDS", (3, 11))
    assert fresh.suitable_python() == sys.executable


def test_without_a_verb_it_says_what_there_is():
    for argv, code in ([], 0), (["nonsense"], 2):
        run = subprocess.run([sys.executable, str(ROOT / "launch" / "fresh.py"), *argv], capture_output=True, text=True)
        assert run.returncode == code and "fresh.py first" in run.stdout and "fresh.py test" in run.stdout


def test_ci_calls_the_command_of_the_readme_and_needs_real_data(tmp_path):
    command = "python3 launch/fresh.py test"
    assert command in (ROOT / ".ci" / "run").read_text() and command in (ROOT / "README.md").read_text()
    run = subprocess.run([ROOT / ".ci" / "run"], env=os.environ | {"MLLM_JAX_REAL_DATA": str(tmp_path / "none")}, capture_output=True, text=True)
    assert run.returncode == 1 and "there is no real data" in run.stderr
