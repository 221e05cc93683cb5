"""Finds a run that stands still, and ends it so that it can be started again.

A hung collective, a file system that never answers or a worker that is stuck raise nothing.  A thread of each process looks at
the ledger, whose clock moves with every step.  If it stands still, the stacks of all threads of this process are
written into the run's folder, the other processes are told to do the same, and all end with the code that restarts.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from mllm_jax.config import RESTART
from mllm_jax.hosts import heard, shout
from mllm_jax.train.ledger import Ledger

QUICK = {"step", "data", "hosts"}       # causes that begin anew with every step; the others may take
SLOW = 4                                # times as long
HUNG = "hung"


class Watchdog:
    """A context.  `patience`: seconds that a step may take."""

    def __init__(self, ledger: Ledger, folder: Path, patience: float):
        self.ledger, self.folder, self.patience = ledger, folder / "stacks", patience
        self.every = min(10.0, patience / 10)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(self.every):
            still = self.ledger.clock() - self.ledger.since
            if still > self.patience * (1 if self.ledger.cause in QUICK else SLOW):
                me = f"process {jax.process_index()} stands still for {still:.0f} s at {self.ledger.cause!r}"
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    shout(HUNG, me)
                self._end(me)
            with contextlib.suppress(jax.errors.JaxRuntimeError):       # the coordinator is gone, and this process will be soon
                if others := heard(HUNG):
                    self._end("; ".join(others))

    def _end(self, why: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-process-{jax.process_index()}.txt"
        with open(path, "w") as file:
            file.write(f"{why}; this process is at {self.ledger.cause!r}, {self.ledger.place}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(f"mllm-jax train: {why}; the stacks of its threads are in {path}; run again to go on", file=sys.stderr, flush=True)
        if jax.process_index() == 0 and jax.process_count() > 1:
            time.sleep(3 * self.every)  # with the coordinator the others would end before they have heard
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(RESTART)
