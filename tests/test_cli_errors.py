"""What is wrong with a command is one line on stderr and an exit code: 2 for what was written, 1 for a run that failed."""

import errno
import subprocess
import sys

import pytest

from mllm_jax.cli import VERBS, explain, main
from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample


def command(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as exit:                          # argparse's own
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(("argv", "says"), [
    (["trian", "first/digits"], "mllm-jax: no verb is called 'trian'; nearest: train"),
    (["describe", "first/digit"], "mllm-jax describe: no recipe is called 'first/digit'; nearest: first/digits"),
    (["describe", "first/digits:size=9"], "first/digits has no knob 'size=9'"),
    (["describe", "first/digits", "stages.instruct.optimizer.lrr=1"], "Adam has no field 'lrr'; nearest: lr"),
    (["describe", "first/digits", "stages.instruct.steps=many"], "stages.instruct.steps is int"),
    (["describe", "first/digits", "stages"], "write path.to.field=value"),
    (["describe", "first/digits", "--stage", "instrcut"], "first/digits has no stage 'instrcut'; nearest: instruct"),
    (["describe", "first/digits", "--stagee"], "there is no option '--stagee'; nearest: --stage"),
    (["describe", "first/digits", "stages.align.train=nothing/*"], "train names 'nothing/*', which matches no parameter"),
    (["compare", "first/digits", "first/digitz"], "nearest: first/digits"),
    (["compare", "first/digits", "first/digits", "more"], "'more' is one argument too many"),
    (["train", "first/digits", "--layout", "v5-8"], "no layout is called 'v5-8'; nearest: v5p-8, v5e-8"),
    (["train", "first/digits", "--layout", "v5e-256"], "does not fit"),
    (["evaluate", "nowhere", "anwsers"], "no task is called 'anwsers'; nearest: answers"),
    (["generate", "nowhere", "--prompt", "x"], "'nowhere' is not a folder"),
    (["generate", "nowhere", "--prompt", "x", "--image", "no.jpg"], "there is no file 'no.jpg'"),
    (["export", "nowhere", "out"], "there is no folder nowhere"),
    (["import", "nowhere", "out"], "there is no folder nowhere"),
    (["data", "preview", "first/nothing"], "first/nothing"),
    (["data", "stats", "first/digits", "--limt", "5"], "there is no option '--limt'; nearest: --limit"),
])
def test_a_mistake_is_one_line_and_exit_code_2(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, *argv)
    assert code == 2 and not out
    assert says in err and err.startswith("mllm-jax") and err.count("\n") == 1, err


def test_what_is_required_is_named(capsys):
    code, _, err = command(capsys, "train")
    assert code == 2 and "RECIPE" in err


def test_an_empty_folder_is_neither_a_run_nor_a_model(capsys, tmp_path):
    code, _, err = command(capsys, "generate", str(tmp_path), "--prompt", "x")
    assert code == 2 and "holds neither recipe.json" in err


@pytest.mark.parametrize(("error", "line", "code"), [
    (ConfigError("a\nb"), "a b", 2),
    (FileNotFoundError(2, "x", "/a/b"), "there is no file '/a/b'", 2),
    (BadExample("7", "bomb", "400 megapixels"), "record '7' is bad (bomb)", 1),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", 1),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero (-v shows where)", 1),
])
def test_each_error_has_its_line_and_code(error, line, code):
    text, got = explain(error)
    assert text.startswith(line) or line in text
    assert got == code and "\n" not in text


def test_verbose_shows_where(capsys):
    code, _, err = command(capsys, "describe", "first/digit", "-v")
    assert code == 2 and "Traceback" in err and err.rstrip().endswith("nearest: first/digits")


def test_interruption_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mllm_jax.commands.compare.load", interrupted)
    code, _, err = command(capsys, "compare", "first/digits", "first/digits")
    assert code == 130 and "interrupted" in err


def test_help_of_everything_reads(capsys):
    run = subprocess.run([sys.executable, "-m", "mllm_jax.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(verb in run.stdout for verb in VERBS) and "examples:" in run.stdout
    for verb in VERBS:
        code, out, _ = command(capsys, verb, "--help")
        assert code == 0 and f"mllm-jax {verb}" in out and "examples:" in out, verb


def test_help_imports_nothing_heavy():
    code = ("import sys, mllm_jax.cli as c; c.make_parser(); "
            "print([m for m in ('jax', 'numpy', 'transformers', 'grain', 'torch') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
