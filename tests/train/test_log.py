"""The log: what is written, when the device is asked, and what a restart keeps."""

import io
import json
import resource

import jax
import jax.numpy as jnp
import pytest

from mllm_jax.train.log import Log, counter, duration, to_numbers
from mllm_jax.types import Mean


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Half a second passes between two looks at it."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def mean(total: float, count: float) -> Mean:
    return Mean(total=jnp.float32(total), count=jnp.float32(count))


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def run(folder, steps, *, total=10, stream=None, **kw) -> list[float | None]:
    with Log(folder, total=total, title="align", stream=stream or io.StringIO(), clock=Clock(), **kw) as log:
        return [log.step(n, {"lm/loss": mean(2.0 * n, 2), "grad_norm": 1.0}, tokens_per_s=100.0) for n in steps]


def test_a_mean_is_divided_and_losses_are_added():
    numbers = to_numbers({"a/loss": mean(6, 4), "b/loss": mean(3, 2), "empty": mean(0, 0), "lr": 0.1})
    assert numbers == {"a/loss": 1.5, "b/loss": 1.5, "empty": 0.0, "lr": 0.1, "loss": 3.0}
    assert to_numbers({"a/loss": mean(6, 4), "loss": 7.0})["loss"] == 7.0


def test_every_step_is_written_and_the_loss_of_the_one_before_is_returned(tmp_path):
    assert run(tmp_path, range(1, 5)) == [None, 1.0, 2.0, 3.0]
    written = rows(tmp_path)
    assert [r["step"] for r in written] == [1, 2, 3, 4]
    assert [r["loss"] for r in written] == [1.0, 2.0, 3.0, 4.0]
    assert written[0]["tokens_per_s"] == 100.0
    assert all(a["seconds"] < b["seconds"] for a, b in zip(written, written[1:], strict=False))
    assert list((tmp_path / "tb").iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_lines_that_storage_does_not_take_are_written_when_it_does(tmp_path):
    """The limit on files stands for a quota; the board, whose thread dies of it, does not stop a step either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Log(tmp_path, total=60, title="align", stream=io.StringIO(), clock=Clock()) as log:
        for n in range(1, 61):
            if n == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (log.file.tell() + 20, hard))     # in the middle of a line
            if n == 50:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            log.step(n, {"lm/loss": mean(2.0 * n, 2)}, **{f"rate_{i}": 1.0 for i in range(15)})
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 61))


def test_the_newest_step_is_not_waited_for(tmp_path, monkeypatch):
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(float(tree["loss"])) or get(tree))
    with Log(tmp_path, total=3, title="x", quiet=True) as log:
        for n in (1, 2, 3):
            log.step(n, {"loss": jnp.float32(n)})
            assert fetched == [1.0, 2.0, 3.0][: n - 1]
    assert fetched == [1.0, 2.0, 3.0]


def test_a_restart_drops_later_lines_and_the_clock_goes_on(tmp_path):
    run(tmp_path, range(1, 7))
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 7, "sec')                                 # killed here
    before = rows_until = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()[:4]]
    run(tmp_path, range(5, 9), start=4)
    after = rows(tmp_path)
    assert [r["step"] for r in after] == list(range(1, 9))
    assert after[:4] == before
    assert after[4]["seconds"] > rows_until[-1]["seconds"]


def test_nan_is_null_in_the_file_and_nan_for_the_caller(tmp_path):
    with Log(tmp_path, total=2, title="x", quiet=True) as log:
        log.step(1, {"loss": jnp.float32(jnp.nan)})
        assert (loss := log.flush()) != loss
    assert rows(tmp_path)[0]["loss"] is None


def test_without_a_terminal_a_stage_is_a_few_lines(tmp_path):
    out = io.StringIO()
    run(tmp_path, range(1, 1001), total=1000, stream=out)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert "steps/s" not in lines[0]                    # one step has no rate, and compiling must not count
    assert "1.0 steps/s  12:30 left" in lines[1]        # a step looks twice at this clock: 750 s for 750 steps
    assert "1000/1000" in lines[-1] and "loss 1000.0000" in lines[-1] and "0 s left" in lines[-1]


def test_verbose_says_more_and_quiet_nothing(tmp_path):
    said = {}
    for name, kw in {"verbose": {"verbose": True}, "plain": {}, "quiet": {"quiet": True}}.items():
        out = io.StringIO()
        with Log(tmp_path / name, total=100, title="x", stream=out, **kw) as log:
            log.note("a note")
            log.detail("a detail")
            for n in range(1, 101):
                log.step(n, {"loss": 1.0})
        said[name] = out.getvalue()
    assert "a detail" in said["verbose"] and "a detail" not in said["plain"] and "a note" in said["plain"]
    assert said["verbose"].count("\n") > said["plain"].count("\n") > said["quiet"].count("\n") == 0


def test_a_terminal_sees_one_line_redrawn(tmp_path):
    out = Terminal()
    run(tmp_path, range(1, 11), stream=out)
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().count("\r") == 11             # "starting", and ten steps
    assert "left" in out.getvalue()


def test_an_evaluation_is_counted_on_a_terminal_alone():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        count = counter("answers", stream)
        for done in (0, 2, 4):
            count("blank", done, 4)
    assert terminal.getvalue() == "\r\x1b[2Kanswers/blank 0/4\r\x1b[2Kanswers/blank 2/4\r\x1b[2K" and not file.getvalue()


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    out = io.StringIO()
    assert run(tmp_path / "run", range(1, 4), stream=out) == [None, 1.0, 2.0]
    assert not (tmp_path / "run").exists() and not out.getvalue()


def test_long_stages_write_a_bounded_file(tmp_path):
    with Log(tmp_path, total=12_000, title="x", quiet=True) as log:
        log.board.add_scalar = lambda *_: None
        for n in range(1, 12_001):
            log.step(n, {"loss": 1.0})
    steps = [r["step"] for r in rows(tmp_path)]
    assert len(steps) <= 5_000 and steps[0] == 1 and steps[-1] == 12_000


@pytest.mark.parametrize(("seconds", "text"), [(45.2, "45 s"), (200, "3:20"), (7500, "2:05:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text
