"""Bad input, end to end: what a user sees of it is one line that names the record, and an exit code.

2 is for what was written, 1 for a run that could not go on.  With on_bad_example=skip the run goes on and counts.
"""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_jax.cli import main
from mllm_jax.data.tokenizer import load_tokenizer

GOOD = 12                               # records of a file, without the bad ones


def picture(seed: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """400 megapixels in 68 bytes: the header promises them, no pixel follows."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def record(id: str, question: str = "<image>\nWhat?", answer: str = "Noise.", image: str = "good.png") -> dict:
    return {"id": id, "image": image, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


# Name -> (record, reason, what the line says besides).
BAD = {
    "missing": (record("missing", image="nowhere.jpg"), "missing_file", "nowhere.jpg: No such file or directory"),
    "truncated": (record("truncated", image="half.jpg"), "decode", "replace the file: it is truncated, or no medium of its kind"),
    "text": (record("text", image="text.jpg"), "decode", "are no image"),
    "bomb": (record("bomb", image="bomb.png"), "bomb", "400000000 pixels"),
    "two": (record("two", question="<image><image>\nWhat?"), "placeholders", "one placeholder, such as <image>, for each"),
    "none": (record("none", question="What?"), "placeholders", "one placeholder, such as <image>, for each"),
    "empty": (record("empty", answer="  "), "empty_answer", "of the assistant, has no text"),
    "long": (record("long", answer="word " * 100), "overlong", "for a row of 320; raise data.seq_len"),
    "roles": ({"id": "roles", "image": "good.png", "conversations": [{"from": "gpt", "value": "<image>"}]}, "roles", "alternate"),
}


@pytest.fixture
def train(tmp_path: Path, capsys, monkeypatch) -> Callable:
    """Trains the alignment of a tiny LLaVA-1.5 on these records; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.png").write_bytes(picture(0))
    (tmp_path / "half.jpg").write_bytes(picture(1, "jpeg")[:-400])
    (tmp_path / "text.jpg").write_bytes(b"<html>404 Not Found</html>")
    (tmp_path / "bomb.png").write_bytes(bomb())

    def run(records: list[dict], *more: str) -> tuple[int, str, str]:
        (tmp_path / "records.json").write_text(json.dumps(records))
        code = main(["train", "projector/llava_15", "--tiny", "--out", "run", "--stages", "align", "--save-every", "1",
                     "stages.align.data.sources={'llava:records.json': 1.0}", "stages.align.data.template=vicuna_v1",
                     "stages.align.data.overlong=raise", "stages.align.steps=2", *more])
        return code, *capsys.readouterr()

    return run


def the_line(err: str) -> str:
    """What is said besides progress: exactly one line, and no traceback."""
    lines = [line for line in err.splitlines() if not line.startswith("align")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def good(n: int = GOOD) -> list[dict]:
    return [record(f"g{i}") for i in range(n)]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_stops_the_run_with_its_id(name: str, train: Callable, tmp_path: Path):
    bad, reason, says = BAD[name]
    code, _, err = train([bad])
    line = the_line(err)
    assert code == 1 and line.startswith("mllm-jax train: ")
    assert f"record 'records/0/{bad['id']}' is bad ({reason})" in line and says in line
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_skipped_records_are_counted_in_the_log_and_the_summary(train: Callable, tmp_path: Path):
    records = [r for pair in zip(good(len(BAD)), (bad for bad, _, _ in BAD.values())) for r in pair]
    code, _, err = train(records, "stages.align.data.on_bad_example=skip", "stages.align.steps=6")
    assert code == 0 and "Traceback" not in err, err
    summary = json.loads((tmp_path / "run" / "stages" / "align" / "summary.json").read_text())
    reasons = {reason for _, reason, _ in BAD.values()}
    source = "llava:records.json"
    assert set(summary["dropped"]) == {f"{source}/{reason}" for reason in reasons}
    # 6 batches of 8 rows are 48 good records, five or six times each of the nine; so are the bad ones met.
    assert summary["examples"] == 48 and summary["steps"] == 6
    assert 5 <= summary["dropped"][f"{source}/bomb"] <= 6 and 10 <= summary["dropped"][f"{source}/placeholders"] <= 12
    [line] = [line for line in err.splitlines() if "skipped" in line]
    assert f"{sum(summary['dropped'].values())} examples were skipped: {summary['dropped']}" in line


def test_a_source_of_bad_records_alone_ends(train: Callable):
    code, _, err = train([BAD["empty"][0]] * 3, "stages.align.data.on_bad_example=skip")
    assert code == 2
    assert "records of 'llava:records.json' were all bad; the last: record 'records/" in the_line(err)


def test_a_template_that_shows_no_answer(train: Callable, tmp_path: Path):
    """Its mask would be all zero, and nothing would be trained."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code, _, err = train(good(), "stages.align.data.template=tokenizer", f"tokenizer={tmp_path / 'tokenizer'}")
    assert code == 2
    assert "put {% generation %} around what the assistant says" in the_line(err)


@pytest.mark.parametrize(("arguments", "says"), [
    (["projector/lava_15"], "no recipe is called 'projector/lava_15'; nearest: projector/llava_15"),
    (["projector/llava_15:size=70b"], "no knob of projector/llava_15 can be '70b'; configs/projector/llava_15.py has the values"),
    (["projector/llava_15", "stages.align.optimiser.lr=1"], "Stage has no field 'optimiser'; nearest: optimizer"),
    (["projector/llava_15", "stages.align.data.seq_len=long"], "stages.align.data.seq_len is int (now 768); got 'long'"),
    (["projector/llava_15", "--tiny", "--layout", "auto:mesh.data=3,mesh.fsdp=1"], "data=3 x fsdp=1 x tensor=1 does not fit 8 devices"),
    (["projector/llava_15", "--tiny", "stages.align.data.batch_size=6"], "the layout needs a multiple of 8"),
    (["projector/llava_15", "--tiny", "stages.align.data.sources={'llava:no.json': 1.0}"], "needs no.json, which is not there"),
    (["projector/llava_15", "--tiny", "stages.align.data.sources={'lava:no.json': 1.0}"], "'lava' is not a format of data; nearest: llava"),
    (["projector/llava_15", "--tiny", "stages.align.data.template=vicuna"], "nearest: vicuna_v1"),
    (["projector/llava_15", "--tiny", "stages.align.train=inputs/image/conector/*"], "matches no parameter"),
    (["projector/llava_15", "--tiny", "--stages", "algin"], "the recipe has no stage 'algin'; nearest: align"),
    (["projector/llava_15", "--tiny", "tokenizer=nowhere"], "'nowhere' is not a tokenizer"),
    (["projector/llava_15", "--tiny", "stages.align.data.items={'video': 1}"], "data.items names video; the model takes: image"),
    (["projector/llava_15", "--tiny", "--stages", "instruct", "stages.instruct.weights={'decoder': 'stage://algin'}"], "stage://algin"),
    (["projector/llava_15", "--tiny", "stages.align.weights={'decoder': 'nowhere'}"], "there is no folder nowhere"),
    (["projector/llava_15", "--tiny", "--data-root", "nowhere", "stages.align.data.sources={'llava:a.json': 1}"], "a.json"),
])
def test_what_cannot_be_is_said_before_any_work(arguments: list[str], says: str, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["train", *arguments, "--out", "run"])
    err = capsys.readouterr().err
    assert code == 2, err
    assert says in the_line(err) and not list(tmp_path.glob("run/stages/*/checkpoints/[0-9]*"))


def test_the_folder_of_another_recipe_is_refused(capsys, tmp_path, monkeypatch, train: Callable):
    assert train(good())[0] == 0
    before = (tmp_path / "run" / "recipe.json").read_bytes()
    code, _, err = train(good(), "stages.align.optimizer.lr=0.5")
    assert code == 2
    assert "run holds another run: stages.align.optimizer.lr was 0.001 and is 0.5; choose another --out, or --fresh" in the_line(err)
    assert (tmp_path / "run" / "recipe.json").read_bytes() == before


@pytest.mark.parametrize(("hurt", "ends", "says"), [
    ("newest", 0, "broken/2, and the run goes on from step 1"),
    ("only", 1, "delete it, or start anew with --fresh"),
    ("frozen", 1, "start anew with --fresh"),
])
def test_a_corrupt_checkpoint_is_named(hurt: str, ends: int, says: str, train: Callable, tmp_path: Path):
    assert train(good())[0] == 0
    stage = tmp_path / "run" / "stages" / "align"
    (stage / "summary.json").unlink()   # as if it had been killed before the end
    if hurt == "only":
        shutil.rmtree(stage / "checkpoints" / "1")
    target = stage / "frozen" if hurt == "frozen" else stage / "checkpoints" / "2"
    for file in sorted(p for p in target.rglob("*") if p.is_file() and p.stat().st_size):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, _, err = train(good())
    line = the_line(err)
    assert code == ends and f"the checkpoint {target} cannot be read" in line and line.endswith(says), line
