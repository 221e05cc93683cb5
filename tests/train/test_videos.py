"""Real videos from the command line, through the tower of the images, into a step; and what is no video is skipped and counted."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_jax.cli import main

STAGE = "stages.knowledge."
RECORDS = "{'llava:records.json': 1.0}"


@pytest.fixture
def records(real_data: Path, tmp_path: Path, monkeypatch) -> list[dict]:
    """Four videos, two images, an image and a video in one conversation, a video that breaks off, and a text that is called one."""
    monkeypatch.chdir(tmp_path)
    films = json.loads((real_data / "webvid" / "captions.json").read_text())
    photos = json.loads((real_data / "cc3m" / "captions.json").read_text())[:2]
    whole = (real_data / "webvid" / films[0]["file"]).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "text.mp4").write_bytes(b"<html>404 Not Found</html>")
    said = lambda id, asked, answer, **media: {
        "id": id, **media, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer[:40]}]}
    film = lambda entry: str(real_data / "webvid" / entry["file"])
    photo = lambda entry: str(real_data / "cc3m" / entry["file"])
    good = [said(f"film{i}", "<video>\nWhat?", entry["caption"], video=film(entry)) for i, entry in enumerate(films)]
    good += [said(f"photo{i}", "<image>\nWhat?", entry["caption"], image=photo(entry)) for i, entry in enumerate(photos)]
    good += [said("both", "<image> or <video>?", "Both.", image=photo(photos[0]), video=film(films[1]))]
    bad = [said(name, "<video>\nWhat?", "Nothing.", video=f"{name}.mp4") for name in ("half", "text", "missing")]
    return good + bad


def call(capsys, action: list[str], records: list[dict], *more: str) -> tuple[int, str, str]:
    Path("records.json").write_text(json.dumps(records))
    code = main([*action, "--tiny", f"{STAGE}data.sources={RECORDS}", *more])
    return code, *capsys.readouterr()


def test_a_run_on_videos_and_images_skips_what_is_broken(records: list[dict], capsys, tmp_path: Path):
    code, _, err = call(
        capsys, ["train", "resolution/llava_onevision", "--out", "run", "--stages", "align,knowledge"], records,
        f"{STAGE}data.on_bad_example=skip", f"{STAGE}steps=3", "stages.align.steps=3")
    assert code == 0 and "Traceback" not in err, err
    stage = tmp_path / "run" / "stages" / "knowledge"
    summary = json.loads((stage / "summary.json").read_text())
    assert {k.rsplit("/", 1)[1] for k in summary["dropped"]} == {"decode", "missing_file"}
    losses = [json.loads(line)["loss"] for line in (stage / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert summary["images"] > 4 * 4                            # tiles, of which a video has four
    # Where bad records stop the run, each has its line.
    for name, says in (("half", "the video cannot be read|stops being readable"), ("text", "cannot be read"), ("missing", "missing_file")):
        bad = [r for r in records if r["id"] == name]
        code, _, err = call(capsys, ["data", "preview", "resolution/llava_onevision", "--stage", "knowledge", "--rows", "1"], bad)
        lines = err.strip().splitlines()
        assert code == 1 and len(lines) == 1 and f"/{name}' is bad" in lines[0] and re.search(says, lines[0]), err


def test_preview_and_statistics_show_videos(records: list[dict], capsys, tmp_path: Path):
    good = records[:-3]
    code, out, err = call(capsys, ["data", "preview", "resolution/llava_onevision", "--stage", "knowledge", "--rows", "2"], good)
    assert code == 0 and "2 rows of 320 positions" in out, err
    page = (tmp_path / "preview.html").read_text()
    shown = re.findall(r'<img alt="(\w+) \d+" src="data:image/png;base64,([^"]+)"', page)
    frames = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for kind, data in shown if kind == "video"]
    assert len(frames) >= 4 and len(frames) % 4 == 0 and {"video", "image"} == {kind for kind, _ in shown}
    assert all(frame.shape == (32, 32, 3) and frame.std() > 3 for frame in frames) and not np.array_equal(frames[0], frames[3])
    assert "image tiles" in page and "slots 0-58; learned marks: 1</small>" in page             # frames of one video stand side by side
    code, out, err = call(capsys, ["data", "stats", "resolution/llava_onevision", "--stage", "knowledge"], good)
    assert code == 0, err
    assert "moments of a video that are seen: 4 to 4" in out and "seconds of a video: " in out and "image tiles of an example" in out
