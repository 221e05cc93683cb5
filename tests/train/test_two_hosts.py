"""Two processes of one run: what stops one stops both, at the same step, with the right exit code, and nothing hangs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm_jax.config import RESTART
from mllm_jax.data.entries import Entries
from mllm_jax.hosts import Lockstep
from tests.conftest import FAST, ROOT

STEPS = 90


def records(folder: Path, pictured: int = -1) -> None:
    """Questions about no picture, but for one; the answer to another one is missing."""
    said = lambda i: [{"from": "human", "value": f"What is {i}?" + "<image>" * (i == pictured)},
                      {"from": "gpt", "value": "" if i == 0 else f"It is {i}."}]
    one = lambda i: {"id": f"r{i}", "conversations": said(i)} | ({"image": "pipe.jpg"} if i == pictured else {})
    (folder / "talk.json").write_text(json.dumps([one(i) for i in range(400)]))


def start(folder: Path, *options: str) -> list[subprocess.Popen]:
    """The command that a user gives on each of two machines, with two devices each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    data = "stages.align.data"
    command = [sys.executable, "-m", "mllm_jax.cli", "train", "projector/llava_15", "--tiny", "--stages", "align", "--out", "run",
               "--save-every", "10", *options, f"{data}.sources={{'llava:talk.json': 1.0}}", f"{data}.template=plain",
               f"{data}.batch_size=4", f"{data}.seq_len=96", f"{data}.pack=False", f"{data}.items={{'image': 1}}",
               f"stages.align.steps={STEPS}"]
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {FAST}", "PYTHONPATH": str(ROOT), "MLLM_JAX_HEARTBEAT": "10",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [subprocess.Popen(command, cwd=folder, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for i in range(2)]


def end(hosts: list[subprocess.Popen], codes: list[int]) -> list[str]:
    """The last line of each on stderr."""
    try:
        errors = [h.communicate(timeout=120)[1] for h in hosts]
    finally:
        for h in hosts:
            h.kill()
    assert [h.returncode for h in hosts] == codes, "\n".join(errors)[-4000:]
    assert not any("Traceback" in e for e in errors), errors
    return [e.splitlines()[-1] if e else "" for e in errors]


def test_what_stops_one_process_stops_both_at_the_same_step(tmp_path: Path):
    records(tmp_path)
    log = tmp_path / "run" / "stages" / "align" / "log.jsonl"
    saved = lambda: sorted(int(p.name) for p in (log.parent / "checkpoints").glob("[0-9]*") if p.name.isdigit())

    def until(lines: int) -> None:
        limit = time.monotonic() + 100
        while not (log.exists() and log.read_bytes().count(b"\n") >= lines) and time.monotonic() < limit:
            time.sleep(0.01)

    hosts = start(tmp_path, "--profile", "2:1")
    until(3)
    hosts[1].send_signal(signal.SIGTERM)        # one machine alone is taken back
    lines = end(hosts, [RESTART] * 2)
    [done] = saved()[-1:]
    assert 3 <= done < STEPS
    assert lines == [f"mllm-jax train: asked to stop: stage align is saved at step {done} of {STEPS}; run again to go on"] * 2

    hosts = start(tmp_path)
    until(done + 2)
    hosts[1].kill()                             # and one is gone without a word: the other does not wait for it
    lines = end(hosts, [RESTART, -signal.SIGKILL])
    assert lines[0] == ("mllm-jax: signal 6 ended this process: another process has died or cannot be reached; "
                        "run again to go on from the last checkpoint")

    # Started again both go on from there, until one of them reads the record that is bad.
    lines = end(start(tmp_path), [1, 1])
    [mine] = [i for i, line in enumerate(lines) if line.startswith("mllm-jax train: record 'talk/0/r0' is bad (empty_answer)")]
    assert lines[1 - mine] == lines[mine].replace("train: record", f"train: process {mine} stopped: record")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and done < len(steps) < STEPS
    assert saved()[-1] == max(done, len(steps) // 10 * 10)      # a bad record saves nothing, for one process as for two

    # The time of all three starts is accounted for, and both processes traced the second step of the first.
    beat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert beat["starts"] == 3 and 0 < beat["goodput"] < 1 and beat["seconds"]["restore"] > 0 and beat["stage"] == "align"
    traced = sorted((log.parent / "profile").rglob("*.xplane.pb"))
    assert [path.relative_to(log.parent / "profile").parts[0] for path in traced] == ["process-0", "process-1"]


def test_a_process_that_hangs_ends_all_and_leaves_the_stacks_of_each(tmp_path: Path):
    """A picture that is a pipe is read for ever: that process waits for data, the other one for that process."""
    order = Entries("", range(400), None, {}, None, "raise", "token", "0/0/llava:talk.json").order
    records(tmp_path, pictured=order(0, 9))     # of the first process, and not among those by which a source is timed
    os.mkfifo(tmp_path / "pipe.jpg")
    hosts = start(tmp_path, "--patience", "8")
    lines = end(hosts, [RESTART] * 2)
    for i, line in enumerate(lines):
        assert "stands still for" in line and f"-process-{i}.txt; run again to go on" in line
        [path] = (tmp_path / "run" / "stacks").glob(f"*-process-{i}.txt")
        text = path.read_text()
        assert ("this process is at 'data'" in text.splitlines()[0]) == ("in encode" in text) == (i == 1)
        assert "train_stage" in text


def test_a_single_process_waits_for_nobody():
    with pytest.raises(KeyError, match="mine"), Lockstep() as lockstep:
        assert lockstep.meet(True) and not lockstep.meet(False)
        raise KeyError("mine")
