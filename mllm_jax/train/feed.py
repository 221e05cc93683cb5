"""From the loader's numpy rows to global arrays, one step ahead of the device.

A thread makes the next batch while the device works on this one.  The iterator's state travels with each
batch, so a checkpoint holds the state after the batch that was last *used*, whatever was read ahead.
"""

import queue
import threading
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from mllm_jax.sharding import positions, put_rows, rows
from mllm_jax.types import Batch, record


@record
class Fed:
    batch: Batch                        # of global arrays
    info: Any                           # data/loader.py BatchInfo of this host
    state: Any                          # of the iterator, after this batch


class Feed:
    """Iterates over `Fed`; close it, or use it in a `with`."""

    def __init__(self, iterator: Any, mesh: Mesh, depth: int = 2):
        self.iterator, self.mesh = iterator, mesh
        self.queue: queue.Queue = queue.Queue(depth)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            while not self.stopping.is_set():
                rows = next(self.iterator)
                self._put(Fed(batch=to_device(rows.batch, self.mesh), info=rows.info, state=self.iterator.get_state()))
        except BaseException as error:  # also StopIteration: whoever reads gets it
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self.stopping.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                pass

    def __iter__(self) -> "Feed":
        return self

    def ready(self) -> bool:
        """Whether the next batch, or an error, is there already."""
        return not self.queue.empty()

    def __next__(self) -> Fed:
        item = self.queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.stopping.set()
        self.thread.join()
        self.iterator.close()


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """This host's rows of a numpy batch -> the global batch, as `lies` says."""
    return jax.tree.map(lambda x, where: put_rows(x, mesh, where), batch, lies(batch, mesh))


def lies(batch: Batch, mesh: Mesh) -> Batch:
    """Where each array of a batch lies: rows are spread over the mesh, and of what is large a row too."""
    along = lambda x: positions(mesh, x.shape)
    where = jax.tree.map(lambda _: rows(mesh), batch)
    large = lambda m: {k: along(x) for k in ("values", "target") if (x := getattr(batch.media[m], k)) is not None}
    return replace(where, media={m: replace(media, **large(m)) for m, media in where.media.items()})


