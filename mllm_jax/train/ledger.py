"""Where the wall time of a run goes, by cause, over all of its starts; and its heartbeat.

Goodput is the part of the time in which steps were made that count.  The clock is always on exactly one cause, so causes add up
to the time that the process was up.  Steps behind the checkpoint that a restart goes on from are made again: their time moves
from "step" to "lost".  The time between a kill and the next start is "down", and no part of goodput: nobody may have had, or
paid for, the machines.

`heartbeat.json` in the run's folder holds all of this, is replaced every half a minute by process 0, and tells a watcher that
the run is alive, what it does and how far it is.  After a kill at most that half a minute is not accounted for.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# In the order of a report.  "data": the devices have nothing to do, for want of a batch; "hosts": the same, for another process;
# "finish": samples, export and report.
CAUSES = ("step", "start", "restore", "compile", "data", "hosts", "save", "evaluate", "finish", "lost")
BEAT = 30.0                             # s between two heartbeats; a file on a bucket takes a tenth of one
SAID = ("loss", "lr", "rows_per_s", "examples_per_s", "tokens_per_s", "images_per_s", "mfu")


class Ledger:
    """The clock of a process, with what earlier starts of the run left in `path`.

        with ledger.on("compile"):
            program = compile()

    `spent`: seconds since the process began, before this was made.  Without a path nothing is read or written.
    """

    def __init__(self, path: Path | None = None, *, spent: float = 0.0, every: float = BEAT,
                 clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time):
        self.path, self.every, self.clock, self.now = path, every, clock, now
        earlier = _read(path)
        self.seconds = dict.fromkeys(CAUSES, 0.0) | earlier.get("seconds", {})
        self.worked = earlier.get("worked", {})         # seconds of "step" of each stage
        # And so many of them when a step was saved.
        self.marks = {stage: {int(k): v for k, v in at.items()} for stage, at in earlier.get("marks", {}).items()}
        self.starts = earlier.get("starts", 0) + 1
        self.down = earlier.get("down", 0.0)
        if "time" in earlier:
            self.down += max(now() - spent - earlier["time"], 0.0)
        self.cause, self.since = "start", clock() - spent
        self.stage = ""
        self.place: dict[str, Any] = {}
        self.written = -math.inf

    @contextlib.contextmanager
    def on(self, cause: str) -> Iterator[None]:
        """Time inside is this cause's."""
        before = self.turn(cause)
        try:
            yield
        finally:
            self.turn(before)

    def turn(self, cause: str) -> str:
        """From now on time is this cause's; the one before."""
        before, now = self.cause, self.clock()
        self.seconds[before] += now - self.since
        if before == "step" and self.stage:
            self.worked[self.stage] += now - self.since
        self.cause, self.since = cause, now
        return before

    def begin(self, stage: str, step: int) -> None:
        """A stage goes on behind this step, which is 0 or saved; what was made beyond it was lost."""
        self.turn(self.cause)           # what has gone by until now is not of this stage
        kept = {k: v for k, v in self.marks.get(stage, {}).items() if k <= step}
        worked = max(kept.values(), default=0.0)
        lost = self.worked.get(stage, 0.0) - worked
        self.seconds["step"] -= lost
        self.seconds["lost"] += lost
        self.marks[stage], self.worked[stage] = kept, worked
        self.stage = stage

    def saved(self, step: int) -> None:
        """A restart can go on from this step."""
        self.turn(self.cause)
        self.marks[self.stage][step] = self.worked[self.stage]

    def beat(self, step: int, total: int, numbers: Mapping[str, float]) -> None:
        """Steps done of the stage, and what is known of the last one."""
        finite = {k: numbers[k] for k in SAID if k in numbers and math.isfinite(numbers[k])}
        self.place = {"stage": self.stage, "step": step, "steps": total} | finite
        if self.clock() - self.written >= self.every:
            self.write()

    def write(self) -> None:
        """heartbeat.json, now; it is whole at any time."""
        self.turn(self.cause)
        self.written = self.clock()
        if self.path is None:
            return
        said = {"time": self.now(), "pid": os.getpid(), "doing": self.cause, **self.place, **self.summary(),
                "worked": self.worked, "marks": self.marks}
        temporary = self.path.with_suffix(".tmp")
        with contextlib.suppress(OSError):      # storage that fails for a while; the next beat comes soon
            temporary.write_text(json.dumps(said, indent=1) + "\n")
            temporary.replace(self.path)

    def summary(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        self.turn(self.cause)
        return {"goodput": round(self.goodput, 4), "starts": self.starts, "down": round(self.down, 2),
                "seconds": {k: round(v, 3) for k, v in self.seconds.items()}}

    def line(self) -> str:
        """"goodput 45 % of 3:22: step 1:30, start 1:29, compile 18 s", as far as a cause took a hundredth of the time."""
        spent = sorted(((k, v) for k, v in self.seconds.items() if v >= 0.01 * self.up), key=lambda item: -item[1])
        return f"goodput {100 * self.goodput:.0f} % of {duration(self.up)}: " + ", ".join(f"{k} {duration(v)}" for k, v in spent)

    @property
    def goodput(self) -> float:
        return self.seconds["step"] / max(self.up, 1e-9)

    @property
    def up(self) -> float:
        """Seconds that processes of the run were there."""
        return sum(self.seconds.values())


def duration(seconds: float) -> str:
    """"45 s", "3:20" (minutes), "2:05:00"."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60}:{s % 60:02d}" if s < 3600 else f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"


def _read(path: Path | None) -> dict[str, Any]:
    """What is in the file of an earlier start; nothing if there is none, or if a machine went down while it was written."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text()) if path is not None else {}
    return {}
