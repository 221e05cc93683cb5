"""The book cannot drift from the code: its commands run, small, and what pages say they print is printed.

In README.md, docs/ and configs/, a block that begins with ```sh run holds commands that run here in the order of their
page, in one folder, with --tiny where they train.  A ```text block right after one is what its last command prints;
`python tests/test_cookbook.py` writes those anew.  In other ```sh blocks commands must parse, and name recipes
and layouts that exist.
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from mllm_jax.cli import make_parser
from mllm_jax.config import load
from mllm_jax.launch.layouts import find

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("README.md")])
BLOCK = re.compile(r"^```sh( run)?\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


def blocks(page: Path, *, run: bool) -> list[tuple[list[list[str]], str | None]]:
    """([arguments of each mllm-jax command], what the last one prints or None) of a page's blocks of this kind."""
    out = []
    for marked, text, expected in BLOCK.findall(page.read_text()):
        if bool(marked) == run:
            lines = [_words(line) for line in text.replace("\\\n", " ").splitlines()]
            out.append(([words[1:] for words in lines if words[:1] == ["mllm-jax"]], expected or None))
    return out


def _words(line: str) -> list[str]:
    """Of a command line, without the file that its output goes to."""
    words = shlex.split(line, comments=True)
    return words[: words.index(">")] if ">" in words else words


def small(argv: list[str]) -> list[str]:
    """A training command in miniature, into the folder that the page goes on to speak of."""
    if argv[0] != "train":
        return argv
    name = re.sub(r"[/:=,]", "-", argv[1])
    return [*argv, *([] if "--tiny" in argv else ["--tiny", "--out", f"runs/{name}"])]


def run(argv: list[str]) -> tuple[int, str]:
    """(exit code, what is printed) of a command."""
    from mllm_jax.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(argv)
    return code, out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_of_a_page_run(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for commands, expected in blocks(page, run=True):
        for argv in commands:
            code, printed = run(small(argv))
            assert code == 0, f"mllm-jax {shlex.join(argv)}: {capfd.readouterr().err[-2000:]}"
        if expected is not None:
            assert printed == expected, f"{page.name}: mllm-jax {shlex.join(commands[-1])} prints something else; see the top of this file"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_other_commands_parse_and_name_what_exists(page):
    for commands, _ in blocks(page, run=False):
        for argv in commands:
            args, rest = make_parser([argv[0]]).parse_known_args(argv)
            assert all("=" in r and not r.startswith("-") for r in rest), f"{page.name}: {argv}: {rest}"
            if hasattr(args, "recipe"):
                load(args.recipe, *args.overrides, *rest)
            if hasattr(args, "layout"):
                find(args.layout, "cpu")


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: no such file: {target}"


def test_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:mllm_jax|configs|launch|tests|docs)/[\w/.]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: no such file: {name}"


def test_every_chapter_has_its_page_and_every_page_its_parts():
    parts = ["The question", "The idea", "Run it", "Read it", "What changed", "What we measured"]
    for folder in (p.parent for p in (ROOT / "configs").glob("*/__init__.py")):
        text = (folder / "README.md").read_text()
        assert re.findall(r"^## (.*)$", text, re.M) == parts, folder.name
        for recipe in (p.stem for p in folder.glob("*.py") if p.stem != "__init__"):
            assert recipe in text, f"{folder.name}/README.md does not speak of {recipe}"


def rewrite() -> None:
    """Puts what commands print today into the pages; only commands that need no run before them."""
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(page.read_text()):
            marked, commands, expected = match.groups()
            if marked and expected is not None:
                printed = run(_words(commands.replace("\\\n", " ").splitlines()[-1])[1:])[1]
                text = text.replace(match[0], match[0].replace(f"```text\n{expected}", f"```text\n{printed}"))
        page.write_text(text)


if __name__ == "__main__":
    sys.exit(rewrite())
