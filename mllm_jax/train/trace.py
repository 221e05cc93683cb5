"""A profile of a few steps, for `xprof`: what the devices and the host did, to the operation.

`xprof --logdir runs/NAME/stages/STAGE/profile` shows it.  Every process writes what it saw, so that a slow host can be told from
the others: one page for all hosts, or a folder for each process where several are on one host, since files have a host's name.
The first steps of a program are unlike the rest; begin at 10 or later.
"""

import platform
from pathlib import Path
from typing import Any

import jax

from mllm_jax.hosts import gather


class Trace:
    """Records the steps `first`, `first` + 1, ... of a stage; nothing if `wanted` is None."""

    def __init__(self, wanted: tuple[int, int] | None, folder: Path):
        self.first, count = wanted or (0, 0)
        self.last, self.folder, self.open = self.first + count - 1, folder, False

    def before(self, step: int, running: Any) -> None:
        """`running`: outputs of the step before, which is let finish, as it would be in the picture."""
        if step == self.first:
            jax.block_until_ready(running)
            hosts = gather(platform.node())
            folder = self.folder if len(set(hosts)) == len(hosts) else self.folder / f"process-{jax.process_index()}"
            folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(folder))
            self.open = True

    def after(self, step: int, running: Any) -> None:
        if self.open and step == self.last:
            jax.block_until_ready(running)
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self.open:
            self.open = False
            jax.profiler.stop_trace()
