"""The records of one source for ever, encoded, of which a shard takes every n-th: shuffled, read by threads or processes, without bad ones.

Worker processes only read and encode, one record to one record, so that the stream does not depend on their number.
"""

import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from mllm_jax.config import ConfigError
from mllm_jax.data.augment import rng_for
from mllm_jax.data.errors import BadExample
from mllm_jax.data.pack import Entry, RowSpec
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenize import encode
from mllm_jax.types import record

SMALL = 4_096                                      # Grain's shuffle takes 3 ms a record for sources of ten, 6 us from here on
SAMPLED = 9                                         # records that tell whether a source waits for its storage
PATIENCE = 1_000                                    # this many bad examples in a row, and a whole epoch: give up
LIVES = 3                                           # times that the workers of a source may die at one record


class WorkersLost(RuntimeError):
    """The processes that read a source die again and again."""


@record
class Dropped:
    source: str
    error: BadExample
    tolerated: bool


class Entries:
    """The records of a source for ever, encoded: number p is record `order(p % n)` of epoch p // n.

    A bad record is a value, Dropped, because an exception would end Grain's iterator for good.
    """

    def __init__(
        self, name: str, source: Any, template: Template, towers: Mapping[str, Any], spec: RowSpec, overlong: str, reduction: str, seed: str
    ):
        self.name, self.source, self.template, self.towers, self.spec = name, source, template, towers, spec
        self.overlong, self.reduction, self.seed = overlong, reduction, seed
        self._permutation = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, p: int) -> Entry | Dropped:
        epoch, k = divmod(p, len(self.source))
        record = self.order(epoch, k)
        try:
            example = self.source[record]
            sequence = encode(
                example,
                template=self.template,
                tokenizer=self.template.tokenizer,
                towers=self.towers,
                overlong=self.overlong,
                reduction=self.reduction,
                max_len=self.spec.seq_len,
                max_trained=self.spec.trained,
                rng=rng_for(self.seed, example.id, epoch) if len(example.captions) > 1 else None,
            )
            self.spec.check(sequence)
            return Entry(sequence=replace(sequence, source=self.name), epoch=epoch)
        except BadExample as error:
            big = error.reason in ("overlong", "overtrained", "too_many_items")
            return Dropped(source=self.name, error=error.of(str(record)), tolerated=big and self.overlong == "drop")

    def order(self, epoch: int, k: int) -> int:
        # Hashed: with seed + epoch the second epoch of one seed would be the first of the next.
        seed = int.from_bytes(hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=4).digest(), "big")
        n = len(self.source)
        if n > SMALL:                  # no list of a billion numbers
            return index_shuffle(k, max_index=n - 1, seed=seed, rounds=4)
        done, order = self._permutation
        if done != epoch:
            order = np.random.default_rng(seed).permutation(n)
            self._permutation = epoch, order
        return int(order[k])


def waits(entries: Entries) -> bool:
    """Whether reading these is, for a fifth of the time, waiting for storage: what threads can hide.

    Where it is not they only fight for the interpreter: a batch of first/digits took twice the processor time with them.
    """
    entries[0]                          # what a source does once is not what it does each time
    began, worked = time.perf_counter(), time.thread_time()
    for p in range(1, SAMPLED):
        entries[p]
    return time.perf_counter() - began > 1.25 * (time.thread_time() - worked)


class Good(grain.IterDataset):
    """Entries of one shard without the dropped ones, which are counted on the next entry so that no count is lost."""

    def __init__(self, entries: Entries, index: int, count: int, *, workers: int, threads: int, strict: bool, patience: int):
        super().__init__()
        self.entries, self.index, self.count = entries, index, count
        self.workers, self.threads, self.strict, self.patience = workers, threads, strict, patience

    def __iter__(self) -> "_GoodIterator":
        return _GoodIterator(self)

    def records(self, start: int) -> grain.DatasetIterator:
        """All entries of the shard from this one on."""
        stream = grain.MapDataset.source(self.entries)[self.index + start * self.count :: self.count].to_iter_dataset(
            grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=8 * self.threads)
        )
        if self.workers:
            if not flags.FLAGS.is_parsed():         # Grain reads flags when it starts processes
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=16)
            stream = stream.mp_prefetch(options, worker_init_fn=_end_with_parent)
        return stream.__iter__()


def _end_with_parent(*_: int) -> None:
    """Called in a worker: it would wait for ever for a run that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class _GoodIterator(grain.DatasetIterator):
    """Its state is how many records were read, whoever reads them: so workers may change in number, and be replaced when they die."""

    def __init__(self, rule: Good):
        super().__init__()
        self.rule, self.read = rule, 0
        self.records: grain.DatasetIterator | None = None

    def __next__(self) -> Entry:
        dropped: list[tuple[str, str]] = []
        while True:
            element = self._next()
            if isinstance(element, Entry):
                return replace(element, dropped=tuple(dropped))
            if self.rule.strict and not element.tolerated:
                raise element.error
            dropped.append((element.source, element.error.reason))
            if len(dropped) >= self.rule.patience:
                raise ConfigError(f"the last {len(dropped)} records of {self.rule.entries.name!r} were all bad; the last: {element.error}")

    def _next(self) -> Entry | Dropped:
        for life in range(1, LIVES + 1):
            try:
                if self.records is None:
                    self.records = self.rule.records(self.read)
                element = next(self.records)
                self.read += 1
                return element
            except RuntimeError as error:           # Grain's, which has no class of its own
                if "terminated unexpectedly" not in str(error):
                    raise
                self.close()
                said = str(error)
            print(f"a worker that reads {self.rule.entries.name!r} has died ({life} of {LIVES} times at this record); "
                  "reading goes on with new ones", file=sys.stderr, flush=True)
        code = re.search(r"exit code (-?\d+)", said)
        raise WorkersLost(f"the workers that read {self.rule.entries.name!r} die at its record {self.read}, the last with exit code "
                          f"{code[1] if code else '?'} (-9: often for want of memory); lower data.workers, 0 reads in the run's own process")

    def get_state(self) -> dict[str, Any]:
        return {"read": self.read}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.close()
        self.read = state["read"]

    def close(self) -> None:
        """Of the records; they are opened again when the next one is asked for."""
        records, self.records = self.records, None
        if records is not None:
            records.close()


def share(workers: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Processes for each source, by weight; a source without one is read in this process."""
    exact = {name: workers * weight / sum(weights.values()) for name, weight in weights.items()}
    share = {name: int(x) for name, x in exact.items()}
    for name in sorted(exact, key=lambda n: share[n] - exact[n])[: workers - sum(share.values())]:
        share[name] += 1
    return share
