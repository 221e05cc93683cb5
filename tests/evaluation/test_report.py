"""The report: everything that the run's folder says is on the page, nothing is fetched, and it stays small."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mllm_jax.config import ConfigError, to_json
from mllm_jax.data.sources import open_source
from mllm_jax.evaluation.charts import _smoothed, _ticks, curve, heat
from mllm_jax.evaluation.html import Raw, duration, short, table
from mllm_jax.evaluation.report import write_report
from mllm_jax.evaluation.samples import write_samples
from mllm_jax.evaluation.tasks import Answers
from mllm_jax.sharding import Layout


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two stages that knows its trade, but not <tags>."""
    versions = {"jax": "0.10.2"}
    recipe = {
        "name": "first/<b>",
        "overrides": ["a=1"],
        "tiny": True,
        "layout": to_json(Layout()),
        "versions": versions,
    }
    (tmp_path / "recipe.json").write_text(
        json.dumps(recipe | {"config": {"paper": "a paper", "stages": {"one": {}, "two": {}}}})
    )
    for stage, loss in (("one", 4.0), ("two", 2.0)):
        folder = tmp_path / "stages" / stage
        folder.mkdir(parents=True)
        log = [{"step": i, "loss": loss * 0.99**i} for i in range(1, 500)]
        (folder / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log) + '{"step": 500, "lo')
        summary = {
            "stage": stage,
            "steps": 500,
            "seconds": 90.0,
            "compile_seconds": 10.0,
            "examples": 4000,
            "tokens": 80_000,
        }
        summary |= {
            "images": 4000,
            "trained_params": 1000,
            "total_params": 2_000_000,
            "flops_per_s": 3e10,
            "dropped": {"s/decode": 7},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    scored = lambda kind, hits: [
        {
            "id": f"{kind}{i}",
            "kind": kind,
            "answers": ["3"],
            "prediction": "3" if h else "8",
            "score": float(h),
            "stopped": True,
        }
        for i, h in enumerate(hits)
    ]
    own, blank = (
        scored("digit", [1] * 9 + [0]) + scored("sum", [1, 0]),
        scored("digit", [0] * 10) + scored("sum", [0, 1]),
    )
    task = Answers(source="digits", confusion=("digit",))
    result = {"task": to_json(task)} | task.result({"": own, "blank_image": blank}, None) | {"seconds": 3.0}
    folder = tmp_path / "evals" / "two" / "answers"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    shared = {k: result[k] for k in ("exact_match", "by_kind", "baselines")}
    (tmp_path / "metrics.json").write_text(
        json.dumps(shared | {"recipe": "x", "retrieval_r1": 0.873, "wall_seconds": 391.4})
    )
    spent = {"step": 75.0, "compile": 20.0, "lost": 5.0, "hosts": 0.0}
    (tmp_path / "heartbeat.json").write_text(json.dumps({"goodput": 0.75, "starts": 3, "down": 30.0, "seconds": spent}))
    source = open_source("shapes:?count=30&size=32")
    examples = [source[i] for i in range(30)]
    write_samples(
        tmp_path / "samples.jsonl", examples, [e.answers[0] if i % 3 else "<i>" for i, e in enumerate(examples)]
    )
    return tmp_path


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order, and gathers the words and addresses of a page."""

    VOID = ("meta", "img", "line", "path", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.addresses = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_says_what_the_folder_says(run):
    path = write_report(run)
    assert path == run / "report.html" and path.stat().st_size < 3_000_000
    page = path.read_text()
    read = Balanced(page)
    words = " ".join(" ".join(read.words).split())
    wanted = [
        "first/<b>",
        "2 M parameters",
        "miniature",
        "changed: a=1",
        "83.3 % exact match of 12 answers",
        "87.3 %",
        "<i>",
    ]
    wanted += [
        "6 min 31 s",
        "digit",
        "90.0 %",
        "blank images",
        "most frequent answer",
        "8.3 %",
        "s/decode",
        "30 GFLOP/s",
        "75.0 % of 1 min 40 s were steps that count (goodput), in 3 starts",
        "steps made again after a restart 5.0 s 5.0 %",
    ]
    assert [w for w in wanted if w not in words] == []
    assert "1 k of 2 M" in words and "1e+03" not in page
    assert len(read.addresses) == 24 and all(a.startswith("data:image/png;base64,") for a in read.addresses)
    assert not re.search(r"<script|@import|url\(|https?://", page)
    assert page.count("✓ right") == 16 and page.count("✗ wrong") == 8 and page.count("<svg") == 2


def test_what_is_not_there_yet_is_left_out(run):
    for name in (
        "metrics.json",
        "samples.jsonl",
        "evals/two/answers/result.json",
        "stages/two/log.jsonl",
        "stages/two/summary.json",
    ):
        (run / name).unlink()
    page = write_report(run).read_text()
    Balanced(page)
    assert page.count("<svg") == 1 and "Samples" not in page and "What it answers" not in page


def test_large_images_do_not_make_a_large_page(run):
    rng = np.random.default_rng(0)
    import base64

    big = "data:image/png;base64," + base64.b64encode(rng.bytes(400_000)).decode()
    sample = {"id": "a", "kind": "k", "question": "q", "answers": ["1"], "prediction": "1", "image": big}
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for _ in range(24)))
    path = write_report(run)
    assert path.stat().st_size < 3_000_000 and path.read_text().count("✓ right") == 24


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)


def test_text_is_escaped_and_html_is_not():
    assert "&lt;b&gt;" in table(["<b>"], []) and "<i>x</i>" in table(["a"], [[Raw("<i>x</i>")]])


@pytest.mark.parametrize("value, want", [(1234, "1.23 k"), (7.06e9, "7.06 G"), (12, "12"), (0, "0")])
def test_short(value, want):
    assert short(value) == want


@pytest.mark.parametrize(
    "value, want", [(9.04, "9.0 s"), (391.4, "6 min 31 s"), (59.97, "60.0 s"), (7290, "2 h 01 min")]
)
def test_duration(value, want):
    assert duration(value) == want


def test_a_moving_average_keeps_a_line_and_ticks_surround_the_data():
    np.testing.assert_allclose(_smoothed(np.arange(50.0), 5), np.arange(50.0))
    assert _ticks(0, 5.3) == [0, 2, 4, 6] and _ticks(0.97, 1.02)[0] <= 0.97


def test_a_curve_stays_in_its_frame():
    y = np.exp(-np.arange(300) / 30)
    svg = curve(range(300), y, label="x")
    numbers = [float(v) for v in re.findall(r"[ML](?:[\d.]+) ([\d.]+)", svg)]
    assert len(numbers) == 2 * 240 and 0 <= min(numbers) and max(numbers) <= 210
    assert "nothing was logged" in curve([1], [float("nan")], label="x")


def test_other_answers_have_a_column_only_when_there_are_any():
    assert "other" in heat(["1"], [[3, 1]]) and "other" not in heat(["1"], [[3, 0]])


def test_the_images_of_a_sample_stand_side_by_side(tmp_path):
    import base64
    import io
    from dataclasses import replace

    from PIL import Image

    big, little = open_source("shapes:?count=1&size=600")[0], open_source("shapes:?count=1&size=32")[0]
    write_samples(
        tmp_path / "s.jsonl", [replace(big, media=(*big.media, *little.media)), replace(big, media=())], ["a", "b"]
    )
    two, none = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    picture = Image.open(io.BytesIO(base64.b64decode(two["image"].partition(",")[2])))
    assert picture.size == (256 + 4 + 32, 256) and none["image"] is None
    assert two["question"].endswith("?") and two["answers"] == list(big.answers)
