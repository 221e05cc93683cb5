"""Where the time goes: causes add up to the time that was there, over restarts, and a watcher can read it at any time."""

import io
import json

import jax.numpy as jnp
import pytest

from mllm_jax.train.ledger import CAUSES, Ledger
from mllm_jax.train.log import Log


class Clock:
    def __init__(self, now: float = 100.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ledger(path, clock, **kw) -> Ledger:
    return Ledger(path, clock=clock, now=clock, **kw)


def test_every_second_has_one_cause(clock):
    it = ledger(None, clock, spent=3)
    clock.now += 1
    with it.on("compile"):
        clock.now += 5
        with it.on("save"):
            clock.now += 0.5
        clock.now += 2
    it.turn("step")
    clock.now += 8.5
    summary = it.summary()
    assert {k: v for k, v in summary["seconds"].items() if v} == {"start": 4, "compile": 7, "save": 0.5, "step": 8.5}
    assert it.line() == "goodput 42 % of 20 s: step 8 s, compile 7 s, start 4 s, save 0 s"
    assert set(summary["seconds"]) == set(CAUSES) and it.up == 20 and summary["goodput"] == 0.425


def test_steps_behind_the_checkpoint_are_lost_when_they_are_made_again(tmp_path, clock):
    """Saved after 4 s of steps, killed after 7 s: the 3 s are lost, and the 60 s without a process are no one's."""
    path = tmp_path / "heartbeat.json"
    first = ledger(path, clock, every=0)
    first.begin("align", 0)
    first.turn("step")
    clock.now += 4
    first.saved(4)
    clock.now += 3
    first.beat(7, 10, {"loss": 1.5, "rows_per_s": 2.0, "secret": 1.0})
    clock.now += 60
    second = ledger(path, clock, spent=2)       # its process began two seconds ago
    second.begin("align", 4)
    second.turn("step")
    clock.now += 6
    got = second.summary()
    assert {k: v for k, v in got["seconds"].items() if v} == {"step": 10, "start": 2, "lost": 3}
    assert got["starts"] == 2 and got["down"] == 58 and got["goodput"] == round(10 / 15, 4)


def test_a_checkpoint_that_was_skipped_loses_what_came_after_the_one_before(tmp_path, clock):
    it = ledger(None, clock)
    it.begin("align", 0)
    it.turn("step")
    for step in (5, 10):
        clock.now += 5
        it.saved(step)
    it.begin("align", 5)                        # 10 cannot be read
    assert it.seconds["step"] == 5 and it.seconds["lost"] == 5 and it.marks == {"align": {5: 5.0}}
    it.begin("instruct", 0)                     # another stage has its own marks
    clock.now += 1
    assert it.summary()["seconds"]["step"] == 6 and it.seconds["lost"] == 5


def test_a_heartbeat_says_where_the_run_is_and_is_written_now_and_then(tmp_path, clock):
    path = tmp_path / "heartbeat.json"
    it = ledger(path, clock, every=30)
    it.begin("align", 0)
    it.turn("step")
    seen = []
    for step in range(1, 101):
        clock.now += 1
        it.beat(step, 100, {"loss": 1.0 / step, "mfu": float("nan"), "grad_norm": 2.0})
        seen.append(json.loads(path.read_text())["step"])
    assert sorted(set(seen)) == [1, 31, 61, 91]
    said = json.loads(path.read_text())
    assert said["stage"] == "align" and said["steps"] == 100 and said["doing"] == "step" and said["time"] == 191
    assert said["loss"] == 1.0 / 91 and "mfu" not in said and said["goodput"] == 1.0
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_that_broke_off_begins_anew(tmp_path, clock):
    path = tmp_path / "heartbeat.json"
    path.write_text('{"time": 1')
    assert ledger(path, clock).starts == 1


def test_where_no_terminal_is_a_line_says_every_five_minutes_that_the_run_is_alive(tmp_path, clock):
    out = io.StringIO()
    it = ledger(tmp_path / "heartbeat.json", clock)
    it.begin("align", 0)
    it.turn("step")
    with Log(tmp_path / "align", total=100_000, title="align", stream=out, clock=clock, ledger=it) as log:
        for n in range(1, 101):
            clock.now += 60
            log.step(n, {"loss": jnp.float32(2.0)}, mfu=0.421)
    lines = out.getvalue().splitlines()
    assert len(lines) == 20
    assert "11/100000" in lines[2] and lines[2].endswith("left  mfu 42 %  goodput 100 %")
