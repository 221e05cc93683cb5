"""`mllm-jax data` from its command line."""

import json

import pytest

from mllm_jax.cli import main
from mllm_jax.data.sources import open_source
from mllm_jax.data.sources.shapes import Shapes

SMALL = ("--tiny", "stages.instruct.data.seq_len=320")


def test_preview_writes_a_page(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["data", "preview", "projector/llava_15", *SMALL, "--rows", "2", "--out", str(page)]) == 0
    text = page.read_text()
    assert "projector/llava_15, stage instruct" in text and text.count('<section class="row">') == 2
    assert "data:image/png;base64," in text and "<mark>" in text
    assert "2 rows of 320 positions" in capsys.readouterr().out


def test_stats_recommends_rows(capsys):
    assert main(["data", "stats", "projector/llava_15", *SMALL, "--limit", "50"]) == 0
    out = capsys.readouterr().out
    assert "shapes: 4096 records, weight 1; 50 measured" in out
    assert "now 320" in out and "Recommended: data.seq_len=" in out


def test_convert_writes_records_that_read_back_equal(tmp_path, capsys):
    out = tmp_path / "shapes.array_record"
    assert main(["data", "convert", "shapes", "--limit", "5", "--out", str(out)]) == 0
    again = open_source(f"array_record:{out}")
    assert [again[i] for i in range(len(again))] == [Shapes()[i] for i in range(5)]
    assert "5 records" in capsys.readouterr().out


def test_convert_leaves_bad_records_out_only_if_told(tmp_path, capsys):
    chat = tmp_path / "chat.json"
    chat.write_text(
        '[{"id": "a", "image": "no.jpg", "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]},'
        ' {"id": "b", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]}]'
    )
    command = ["data", "convert", f"llava:{chat}", "--out", str(tmp_path / "out.array_record")]
    assert main(command) == 1
    assert "missing_file" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    assert "1 records" in (out := capsys.readouterr().out) and "left out: 1 x missing_file" in out
    assert json.loads((tmp_path / "out.manifest.json").read_text())["left_out"] == {"missing_file": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preview", "projector/llava_15", "--stage", "instrct"], "no stage 'instrct'; nearest: instruct"),
        (["stats", "projector/lava"], "no recipe is called 'projector/lava'; nearest: projector/llava"),
        (["convert", "shpes", "--out", "x.array_record"], "'shpes'"),
        (["convert", "shapes", "--out", "x"], "--out is x; write NAME.array_record"),
        (["convert", "shapes", "--out", "x.array_record", "--limit", "2", "--shards", "3"], "2 records cannot be written as 3 shards"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["data", *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err
