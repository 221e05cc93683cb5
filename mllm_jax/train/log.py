"""The log of a stage: JSONL and TensorBoard files, and one line on the screen.

Here, and nowhere else, a `Mean` becomes a number.  The numbers of step n - 1 are fetched when step n has been
dispatched, so that the device never waits for the log; `Log.step` therefore returns the loss of the step
before.  Only process 0 writes.
"""

import contextlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from mllm_jax.train.ledger import Ledger, duration
from mllm_jax.types import Mean

LINES = 4                               # lines of progress where no terminal redraws one
BEAT = 300.0                            # s; and one line so often at least, which says that the run is alive
MAX_ROWS = 5_000                        # of log.jsonl; a longer stage writes every second step, every third, ...


class Log:
    """A context; `step` once a step, then the files hold what happened.

        with Log(folder, total=1000, title="align") as log:
            for n in range(1, 1001):
                state, means = train_step(state, batch)
                loss = log.step(n, means, tokens_per_s=rate)         # that of step n - 1, None at first

    `ledger` learns of every step.  `start` steps are already done: lines of later steps, which a killed run left behind, are removed, and
    the clock goes on from the last line that stays.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        title: str,
        verbose: bool = False,
        quiet: bool = False,
        start: int = 0,
        ledger: Ledger | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.ledger = ledger
        self.folder, self.total, self.start, self.clock = Path(folder), total, start, clock
        self.writes = jax.process_index() == 0
        self.every = -(-total // MAX_ROWS)
        self.verbose, self.quiet = verbose, quiet or not self.writes
        self.bar = Bar(title, total, stream or sys.stderr, lines=20 if verbose else LINES, start=start, clock=clock)
        self.pending: tuple[int, Mapping[str, Any], dict[str, float], float] | None = None

    def __enter__(self) -> "Log":
        earlier = self._keep_until_start() if self.writes else 0.0
        self.began = self.clock() - earlier
        if self.writes:
            self._open()
            if not self.quiet:
                self.bar.begin()
        return self

    def _open(self) -> None:
        self.file = open(self.folder / "log.jsonl", "ab", buffering=0)
        self.rest = b""                 # of lines that storage has not taken yet
        self.board = self._new_board(self.start)

    def back_to(self, start: int) -> None:
        """Forgets the lines after step `start`, if the newest checkpoint could not be read and an older one was."""
        if start != self.start and self.writes:
            self.file.close()
            self.board.close()
            self.start = start
            self._keep_until_start()
            self._open()

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            if self.writes:
                with self.file:
                    if self.rest:       # raises if storage fails still
                        self.file.write(self.rest)
                if _works(self.board):
                    self.board.close()
            if not self.quiet:
                self.bar.close()

    @property
    def seconds(self) -> float:
        """Since the stage began, without the time between a kill and the restart."""
        return self.clock() - self.began

    def step(self, step: int, means: Mapping[str, Any], **rates: float) -> float | None:
        """Keeps the numbers of `step` (steps done, from 1) and writes those of the one before; returns its loss."""
        loss = self.flush()
        self.pending = (step, means, rates, self.seconds)
        return loss

    def flush(self) -> float | None:
        """Writes the step that is still pending and returns its loss; waits for the device."""
        if self.pending is None:
            return None
        (step, means, rates, seconds), self.pending = self.pending, None
        numbers = to_numbers(means) | rates
        if self.writes and (step % self.every == 0 or step in (self.start + 1, self.total)):
            row = {"step": step, "seconds": round(seconds, 3)} | numbers
            # JSON has no NaN; a reader finds null there.
            finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
            self.rest += json.dumps(finite, allow_nan=False).encode() + b"\n"
            with contextlib.suppress(OSError):      # storage that fails for a while: the next step tries again
                self.rest = self.rest[self.file.write(self.rest):]
            self._show(step, numbers)
        if self.ledger is not None:
            self.ledger.beat(step, self.total, numbers)
            numbers = numbers | {"goodput": self.ledger.goodput}
        if not self.quiet:
            self.bar.update(step, numbers)
        return numbers.get("loss")

    def _show(self, step: int, numbers: Mapping[str, float]) -> None:
        """On the board, which is for looking at: what its storage does not take is lost, and the run goes on."""
        with contextlib.suppress(OSError):
            if not _works(self.board):
                self.board = self._new_board(step - 1)
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    def _new_board(self, start: int) -> Any:
        # Imported here: it costs a quarter of a second and only process 0 needs it.
        from tensorboardX import SummaryWriter

        # Its thread ends when it cannot write, and with a short queue a step would wait for it for ever.
        return SummaryWriter(str(self.folder / "tb"), purge_step=start + 1 if start else None, max_queue=1_000)

    def note(self, text: str) -> None:
        """A line for the reader, above the bar."""
        if not self.quiet:
            self.bar.line(text)

    def detail(self, text: str) -> None:
        """A line that only `-v` shows."""
        if self.verbose:
            self.note(text)

    def summary(self, values: Mapping[str, Any]) -> None:
        """summary.json of the stage."""
        if self.writes:
            (self.folder / "summary.json").write_text(json.dumps(values, indent=2) + "\n")

    def _keep_until_start(self) -> float:
        """Drops the lines after step `start`; the seconds of the last one that stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        if not path.exists():
            return 0.0
        kept, seconds = [], 0.0
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:                            # half a line, written while being killed
                break
            if row["step"] <= self.start:
                kept.append(line)
                seconds = row["seconds"]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        return seconds


def _works(board: Any) -> bool:
    """Whether the thread that writes for a board is there."""
    return board.file_writer.event_writer._worker.is_alive()


def to_numbers(means: Mapping[str, Any]) -> dict[str, float]:
    """Means and scalars, still on the device, as floats.

    Where there is no "loss", it is the sum of the losses of the objectives ("lm/loss", ...).
    """
    arrays = {k: (m.total, m.count) if isinstance(m, Mean) else m for k, m in means.items()}
    out = {}
    for name, value in jax.device_get(arrays).items():
        if isinstance(value, tuple):
            total, count = map(float, value)
            out[name] = total / count if count else 0.0
        else:
            out[name] = float(np.asarray(value))
    losses = [v for k, v in out.items() if k.endswith("/loss")]
    return out if "loss" in out or not losses else out | {"loss": sum(losses)}


class Bar:
    """One line of progress: redrawn on a terminal, a few lines elsewhere."""

    def __init__(self, title: str, total: int, stream: TextIO, *, lines: int, start: int = 0, clock: Callable[[], float]):
        self.title, self.total, self.stream, self.clock = title, total, stream, clock
        self.redraws = stream.isatty()
        self.marks = {start + 1, total, *(round(total * i / lines) for i in range(1, lines + 1))}
        # (step, time) of late; from the first step on, so that compiling does not count.
        self.recent: deque[tuple[int, float]] = deque(maxlen=33)
        self.drawn = -math.inf
        self.text = ""

    def begin(self) -> None:
        """Says on a terminal that something happens, until the first step is done."""
        if self.redraws:
            self.text = f"{self.title:<12} starting"
            self._draw()

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        now = self.clock()
        self.recent.append((step, now))
        quick = now - self.drawn < (0.1 if self.redraws else BEAT)
        if quick and (step != self.total if self.redraws else step not in self.marks):
            return
        (first, then), self.drawn = self.recent[0], now
        loss = f"  loss {numbers['loss']:.4f}" if "loss" in numbers else ""
        speed = ""
        if step > first:
            seconds = (now - then) / (step - first)
            speed = f"  {1 / seconds:.1f} steps/s" if 0 < seconds <= 1 else f"  {seconds:.1f} s/step"
            speed += f"  {duration((self.total - step) * seconds)} left"
        # Shares of the time and of the chips, for whoever pays for them; on a terminal the line is for the impatient.
        speed += "".join(f"  {k} {100 * numbers[k]:.0f} %" for k in ("mfu", "goodput") if k in numbers and not self.redraws)
        done = round(16 * step / self.total)
        self.text = f"{self.title:<12} {'━' * done}{'╌' * (16 - done)} {step}/{self.total}{loss}{speed}"
        self._draw()

    def _draw(self) -> None:
        self.stream.write(f"\r\x1b[2K{self.text}" if self.redraws else self.text + "\n")
        self.stream.flush()

    def line(self, text: str) -> None:
        """A line above the bar."""
        again = self.text if self.redraws else ""
        self.stream.write((f"\r\x1b[2K{text}\n{again}") if self.redraws else text + "\n")
        self.stream.flush()

    def close(self) -> None:
        if self.redraws and self.text:
            self.stream.write("\n")
            self.stream.flush()


def counter(title: str, stream: TextIO | None = None) -> Callable[[str, int, int], None]:
    """A function of (name of a pass, examples done, all) that counts on one line of a terminal and wipes it at the end.

    Elsewhere it says nothing: an evaluation ends with its own lines.
    """
    stream = stream or sys.stderr

    def count(name: str, done: int, total: int) -> None:
        if stream.isatty() and jax.process_index() == 0:
            what = "/".join(filter(None, (title, name)))
            stream.write("\r\x1b[2K" + (f"{what:<12} {done}/{total}" if done < total else ""))
            stream.flush()

    return count
