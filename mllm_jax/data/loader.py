"""A stage's data as a stream of batches: mixed, packed, decoded ahead of the step, and exactly resumable.

    each source:  shuffled records for ever -> every n-th for this host -> encode -> [workers] -> without bad ones
    all of them:  mix by weight -> pack -> decode in threads -> batch -> prefetch

The order matters. Hosts take their share before the mixture, for the mixture is a fixed pattern and every n-th of
it may come from one source alone.  Bad examples leave before it too, or they would eat into the weight of
their source.  Worker processes only read and encode, one record to one record, so that the stream does not depend on
their number.  Packing comes before decoding, so that restoring repeats little.

Batch t of a host is a function of (data, seed, shard); the state of an iterator is a small JSON value.
"""

import copy
import hashlib
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from mllm_jax.config import ConfigError
from mllm_jax.data.augment import rng_for
from mllm_jax.data.batch import BatchInfo, Rows, collate, decode_items, describe, mend
from mllm_jax.data.errors import BadExample
from mllm_jax.data.pack import Entry, Packer, RowSpec, row_spec
from mllm_jax.data.sources import open_source
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenize import encode
from mllm_jax.types import record

AHEAD = 2                                           # batches that are ready before they are asked for
_SMALL = 4_096                                      # Grain's shuffle takes 3 ms a record for sources of ten, 6 us from here on
SAMPLED = 9                                         # records that tell whether a source waits for its storage
PATIENCE = 1_000                                    # this many bad examples in a row, and a whole epoch: give up


class Loader:
    """The batches of one host; `iter(loader)` begins at the start, and any number of iterators may be open.

    Args:
      data: a recipe.Data.
      towers: modality -> how it enters the model; `{}` for text alone.
      rows: rows of a batch of this host.
      shard: (index of this host, number of hosts).
      root: folder that relative paths of sources are under.
      exact: reference pixels instead of fast ones.
      open: name, root -> source.

    Raises:
      ConfigError: a source, template or weight that cannot be used, an empty source.
    """

    def __init__(
        self,
        data: Any,
        towers: Mapping[str, Any],
        tokenizer: Any,
        *,
        rows: int,
        shard: tuple[int, int] = (0, 1),
        root: Path | None = None,
        seed: int = 0,
        exact: bool = False,
        open: Callable[[str, Path | None], Any] = open_source,
    ):
        weights = {name: float(w) for name, w in data.sources.items() if w != 0}
        if not weights or min(weights.values()) < 0:
            raise ConfigError(f"data.sources needs weights of at least 0, and one above; got {dict(data.sources)}")
        self.data, self.towers, self.tokenizer = data, towers, tokenizer
        self.rows, self.shard, self.exact = rows, shard, exact
        self.seed = f"{seed}/{data.seed}"
        self.template = Template(data.template, tokenizer)
        self.spec = row_spec(data.seq_len, data.items, towers, tokenizer.pad_token_id)
        self.sources = {name: open(name, root) for name in weights}
        self.weights = weights
        workers = _share(data.workers, weights)
        streams = {name: self._stream(name, source, workers[name]) for name, source in self.sources.items()}
        self.stream = grain.IterDataset.mix(streams, weights)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def _stream(self, name: str, source: Any, workers: int) -> grain.IterDataset:
        if not len(source):
            raise ConfigError(f"the source {name!r} has no records")
        entries = _Entries(name, source, self.template, self.towers, self.spec, self.data.overlong, f"{self.seed}/{name}")
        index, count = self.shard
        threads = min(4, os.cpu_count() or 1) if _waits(entries) else 0
        stream = grain.MapDataset.source(entries)[index::count].to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=32 if threads else 0)
        )
        if workers:
            if not flags.FLAGS.is_parsed():         # Grain reads flags when it starts processes
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=16))
        return _Good(stream, strict=self.data.on_bad_example != "skip", patience=max(PATIENCE, len(source)), name=name)


class BatchIterator(Iterator[Rows]):
    """Yields Rows for ever.  Close it, or use it in a `with`; otherwise it closes when it is collected."""

    def __init__(self, loader: Loader):
        self.loader = loader
        self._batches = _Batches(loader)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[Future] = deque()
        self._state = self._batches.get_state()     # behind the last batch returned, not the last one made
        self._examples: dict[str, int] = {}
        self._dropped: dict[tuple[str, str], int] = {}
        self.close = weakref.finalize(self, _close, self._thread, self._ahead, self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __next__(self) -> Rows:
        if not self.close.alive:
            raise ValueError("this iterator was closed, or stopped by a bad example; make another")
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._thread.submit(_make, self._batches))
        try:
            rows, self._state = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        _add(self._examples, rows.info.examples)
        _add(self._dropped, rows.info.dropped)
        return replace(rows, info=replace(rows.info, examples=dict(self._examples), dropped=dict(self._dropped)))

    def get_state(self) -> dict[str, Any]:
        """A JSON value: the next batch will be the one after the last that was returned."""
        return {
            "workers": self.loader.data.workers,
            "shard": list(self.loader.shard),
            "examples": dict(self._examples),
            "dropped": [[source, reason, count] for (source, reason), count in self._dropped.items()],
            "stream": self._state,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
          ConfigError: it was taken with another number of workers or hosts.
        """
        for name, here in (("workers", self.loader.data.workers), ("shard", list(self.loader.shard))):
            if state[name] != here:
                raise ConfigError(f"the data was stopped with {name}={state[name]} and cannot go on with {here}; restore that number")
        _stop(self._ahead)
        self._batches.set_state(state["stream"])
        self._state = state["stream"]
        self._examples = dict(state["examples"])
        self._dropped = {(source, reason): count for source, reason, count in state["dropped"]}


class _Batches(Iterator[Rows]):
    """Batches as they are made, in one background thread; `info` counts this batch alone."""

    def __init__(self, loader: Loader):
        self.loader = loader
        data = loader.data
        self.entries = loader.stream.__iter__()
        self.packer = Packer(self.entries, loader.spec, pack=data.pack and not loader.template.pairs)
        self.pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")

    def __next__(self) -> Rows:
        loader, rows, media = self.loader, [], []
        examples: dict[str, int] = {}
        dropped: dict[tuple[str, str], int] = {}
        while len(rows) < loader.rows:
            packed = [next(self.packer) for _ in range(loader.rows - len(rows))]
            places = [place for row in packed for place in row.media]
            data = loader.data
            decoded = iter(
                decode_items(places, loader.towers, exact=loader.exact, augment=data.augment, seed=loader.seed, map=self.pool.map)
            )
            for row in packed:
                mine = [next(decoded) for _ in row.media]
                bad = {p.segment: d for p, d in zip(row.media, mine, strict=True) if isinstance(d, BadExample)}
                for error in bad.values():
                    if data.on_bad_example != "skip":
                        raise error
                for segment, entry in enumerate(row.entries, start=1):
                    _add(dropped, _tally(entry.dropped))
                    if segment in bad:
                        _add(dropped, {(entry.sequence.source, bad[segment].reason): 1})
                    else:
                        _add(examples, {entry.sequence.source: 1})
                row, mine = mend(row, mine, loader.spec)
                if row is not None:
                    rows.append(row)
                    media.append(mine)
        info: BatchInfo = replace(describe(rows), examples=examples, dropped=dropped)
        return Rows(batch=collate(rows, media, loader.spec), info=info)

    def get_state(self) -> dict[str, Any]:
        return self.packer.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.packer.set_state(state)

    def close(self) -> None:
        self.entries.close()
        # Let go while the interpreter is whole: Grain's iterators close themselves again when they are deleted.
        self.entries = self.packer = None
        self.pool.shutdown(wait=False, cancel_futures=True)


@record
class _Dropped:
    source: str
    error: BadExample
    tolerated: bool


class _Entries:
    """The records of a source for ever, encoded: number p is record `order(p % n)` of epoch p // n.

    A bad record is a value, _Dropped, because an exception would end Grain's iterator for good.
    """

    def __init__(
        self, name: str, source: Any, template: Template, towers: Mapping[str, Any], spec: RowSpec, overlong: str, seed: str
    ):
        self.name, self.source, self.template, self.towers, self.spec = name, source, template, towers, spec
        self.overlong, self.seed = overlong, seed
        self._permutation = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, p: int) -> Entry | _Dropped:
        epoch, k = divmod(p, len(self.source))
        record = self._order(epoch, k)
        try:
            example = self.source[record]
            sequence = encode(
                example,
                template=self.template,
                tokenizer=self.template.tokenizer,
                towers=self.towers,
                overlong=self.overlong,
                max_len=self.spec.seq_len,
                rng=rng_for(self.seed, example.id, epoch) if len(example.captions) > 1 else None,
            )
            self.spec.check(sequence)
            return Entry(sequence=replace(sequence, source=self.name), epoch=epoch)
        except BadExample as error:
            big = error.reason in ("overlong", "too_many_items")
            return _Dropped(source=self.name, error=error.of(str(record)), tolerated=big and self.overlong == "drop")

    def _order(self, epoch: int, k: int) -> int:
        # Hashed: with seed + epoch the second epoch of one seed would be the first of the next.
        seed = int.from_bytes(hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=4).digest(), "big")
        n = len(self.source)
        if n > _SMALL:                  # no list of a billion numbers
            return index_shuffle(k, max_index=n - 1, seed=seed, rounds=4)
        done, order = self._permutation
        if done != epoch:
            order = np.random.default_rng(seed).permutation(n)
            self._permutation = epoch, order
        return int(order[k])


def _waits(entries: _Entries) -> bool:
    """Whether reading these is, for a fifth of the time, waiting for storage: what threads can hide.

    Where it is not they only fight for the interpreter: a batch of first/digits took twice the processor time with them.
    """
    entries[0]                          # what a source does once is not what it does each time
    began, worked = time.perf_counter(), time.thread_time()
    for p in range(1, SAMPLED):
        entries[p]
    return time.perf_counter() - began > 1.25 * (time.thread_time() - worked)


class _Good(grain.IterDataset):
    """Entries without the dropped ones, which are counted on the next entry so that no count is lost."""

    def __init__(self, parent: grain.IterDataset, *, strict: bool, patience: int, name: str):
        super().__init__(parent)
        self.strict, self.patience, self.name = strict, patience, name

    def __iter__(self) -> "_GoodIterator":
        return _GoodIterator(self._parent.__iter__(), self)


class _GoodIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, rule: _Good):
        super().__init__(parent)
        self.rule = rule

    def __next__(self) -> Entry:
        dropped: list[tuple[str, str]] = []
        while True:
            element = next(self._parent)
            if isinstance(element, Entry):
                return replace(element, dropped=tuple(dropped))
            if self.rule.strict and not element.tolerated:
                raise element.error
            dropped.append((element.source, element.error.reason))
            if len(dropped) >= self.rule.patience:
                raise ConfigError(f"the last {len(dropped)} records of {self.rule.name!r} were all bad; the last: {element.error}")

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


def _share(workers: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Processes for each source, by weight; a source without one is read in this process."""
    exact = {name: workers * weight / sum(weights.values()) for name, weight in weights.items()}
    share = {name: int(x) for name, x in exact.items()}
    for name in sorted(exact, key=lambda n: share[n] - exact[n])[: workers - sum(share.values())]:
        share[name] += 1
    return share


def _make(batches: _Batches) -> tuple[Rows, Any]:
    rows = next(batches)
    return rows, copy.deepcopy(batches.get_state())


def _stop(ahead: deque) -> None:
    """Forgets the batches that are being made; the thread is idle afterwards."""
    for future in ahead:
        future.cancel()
    wait(ahead)
    ahead.clear()


def _close(thread: ThreadPoolExecutor, ahead: deque, batches: _Batches) -> None:
    _stop(ahead)
    thread.shutdown()
    batches.close()


def _add(total: dict, more: Mapping) -> None:
    for key, count in more.items():
        total[key] = total.get(key, 0) + count


def _tally(keys: tuple) -> dict:
    return {key: keys.count(key) for key in dict.fromkeys(keys)}
