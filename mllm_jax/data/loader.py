"""A stage's data as a stream of batches: mixed, packed, decoded ahead of the step, and exactly resumable.

    a shard:      each source:  shuffled records for ever -> every n-th for this shard -> encode -> [workers] -> without bad ones
                  all of them:  mix by weight -> pack
    a batch:      so many rows of each shard -> decode in threads -> batch -> prefetch

The order matters. Shards take their part before the mixture, for the mixture is a fixed pattern and every n-th of
it may come from one source alone.  Bad examples leave before it too, or they would eat into the weight of
their source.  Worker processes only read and encode, one record to one record, so that the stream does not depend on
their number.  Packing comes before decoding, so that restoring repeats little.

Row r of the batch always comes from shard r // (rows / shards), whichever host wants it.  So batch t is a function of (data, seed,
shards), the state of a shard is a small JSON value that any host goes on from, and hosts may come and go.  A host that wants
some rows of a shard reads and packs all of it, and decodes its own.
"""

import copy
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import grain

from mllm_jax.config import ConfigError
from mllm_jax.data.batch import BatchInfo, Rows, collate, decode_items, describe, mend
from mllm_jax.data.entries import PATIENCE, Entries, Good, share, waits
from mllm_jax.data.errors import BadExample
from mllm_jax.data.pack import Packer, row_spec
from mllm_jax.data.sources import open_source
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenize import power

AHEAD = 2                                           # batches that are ready before they are asked for


class Loader:
    """The batches of one host; `iter(loader)` begins at the start, and any number of iterators may be open.

    Args:
      data: a recipe.Data.
      towers: modality -> how it enters the model; `{}` for text alone.
      rows: rows of the whole batch, of all hosts.
      mine: which of them this host wants, in rising order; None: all.
      shards: parts that the stream is divided into; a state says its own number, and goes on with that.
      root: folder that relative paths of sources are under.
      exact: reference pixels instead of fast ones.
      open: name, root -> source.

    Raises:
      ConfigError: a source, template or weight that cannot be used, an empty source, shards that do not divide the rows.
    """

    def __init__(
        self,
        data: Any,
        towers: Mapping[str, Any],
        tokenizer: Any,
        *,
        rows: int,
        mine: Iterable[int] | None = None,
        shards: int = 1,
        root: Path | None = None,
        seed: int = 0,
        exact: bool = False,
        open: Callable[[str, Path | None], Any] = open_source,
    ):
        weights = {name: float(w) for name, w in data.sources.items() if w != 0}
        if not weights or min(weights.values()) < 0:
            raise ConfigError(f"data.sources needs weights of at least 0, and one above; got {dict(data.sources)}")
        check_shards(shards, rows)
        power(data.reduction)
        self.data, self.towers, self.tokenizer = data, towers, tokenizer
        self.rows, self.mine, self.shards, self.exact = rows, tuple(range(rows) if mine is None else mine), shards, exact
        self.seed = f"{seed}/{data.seed}"
        self.template = Template(data.template, tokenizer)
        self.spec = row_spec(data.seq_len, data.items, towers, tokenizer.pad_token_id, data.trained)
        self.sources = {name: open(name, root) for name in weights}
        self.weights = weights
        for name, source in self.sources.items():
            if not len(source):
                raise ConfigError(f"the source {name!r} has no records")
        # Where there are workers, what a record may do to a process it does to one of them.
        reading = lambda name: bool(data.workers) or waits(self.entries(name))
        self.threads = {name: min(4, os.cpu_count() or 1) if reading(name) else 0 for name in weights}

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def entries(self, name: str) -> "Entries":
        how = self.data.overlong, self.data.reduction
        return Entries(name, self.sources[name], self.template, self.towers, self.spec, *how, f"{self.seed}/{name}")


def check_shards(shards: int, rows: int) -> None:
    """Raises ConfigError if a batch cannot have as many rows of each shard."""
    if shards < 1 or rows % shards:
        raise ConfigError(f"data.shards is {shards} and must divide the {rows} rows of a batch; choose one of "
                          f"{', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)}")


class BatchIterator(Iterator[Rows]):
    """Yields Rows for ever.  Close it, or use it in a `with`; otherwise it closes when it is collected."""

    def __init__(self, loader: Loader):
        self.loader = loader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[Future] = deque()
        self._begin(loader.shards)

    def _begin(self, shards: int) -> None:
        self._batches = _Batches(self.loader, shards)
        self._state = self._batches.get_state()     # behind the last batch returned, not the last one made
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
        return rows

    def get_state(self) -> dict[str, Any]:
        """A JSON value: the next batch will be the one after the last that was returned.

        It holds the shards that this host reads; `merge` puts those of all hosts together.
        """
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken, by hosts of any number: it must hold all shards that this one reads."""
        _stop(self._ahead)
        if state["shards"] != self._batches.count:
            self.close.detach()
            self._batches.close()
            self._begin(state["shards"])
        self._batches.set_state(state)
        self._state = self._batches.get_state()


def merge(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all hosts as one; hosts that share a shard have the same of it."""
    states = list(states)
    return {"shards": states[0]["shards"], "of": {k: shard for state in states for k, shard in state["of"].items()}}


def dropped(state: Mapping[str, Any]) -> dict[str, int]:
    """"source/reason" -> examples that were left out since the start."""
    total: dict[str, int] = {}
    for shard in state["of"].values():
        _add(total, {f"{source}/{reason}": count for source, reason, count in shard["dropped"]})
    return total


class _Shard:
    """One part of the stream: its rows, and what went into them."""

    def __init__(self, loader: Loader, index: int, count: int, beside: int):
        data = loader.data
        self.name = str(index)
        workers = share(data.workers, loader.weights)
        streams = {}
        for name, source in loader.sources.items():
            streams[name] = Good(
                loader.entries(name), index, count, workers=workers[name], threads=-(-loader.threads[name] // beside),
                strict=data.on_bad_example != "skip", patience=max(PATIENCE, len(source)))
        self.entries = grain.IterDataset.mix(streams, loader.weights).__iter__()
        self.packer = Packer(self.entries, loader.spec, pack=data.pack and not loader.template.pairs)
        self.examples: dict[str, int] = {}
        self.dropped: dict[tuple[str, str], int] = {}

    def get_state(self) -> dict[str, Any]:
        return {
            "stream": self.packer.get_state(),
            "examples": dict(self.examples),
            "dropped": [[source, reason, count] for (source, reason), count in self.dropped.items()],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.packer.set_state(state["stream"])
        self.examples = dict(state["examples"])
        self.dropped = {(source, reason): count for source, reason, count in state["dropped"]}

    def close(self) -> None:
        self.entries.close()
        # Let go while the interpreter is whole: Grain's iterators close themselves again when they are deleted.
        self.entries = self.packer = None


class _Batches(Iterator[Rows]):
    """Batches as they are made, in one background thread."""

    def __init__(self, loader: Loader, count: int):
        self.loader, self.count, self.each = loader, count, loader.rows // count
        here = sorted({row // self.each for row in loader.mine})
        self.shards = {k: _Shard(loader, k, count, len(here)) for k in here}
        self.pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")

    def __next__(self) -> Rows:
        loader, data = self.loader, self.loader.data
        skip, mine = data.on_bad_example == "skip", set(loader.mine)
        made: dict[int, list] = {k: [] for k in self.shards}
        while lacking := [(k, n) for k, rows in made.items() for n in range(len(rows), self.each)]:
            packed = [(k, next(self.shards[k].packer), k * self.each + n) for k, n in lacking]
            # A row of another host counts here only where a broken one would leave its place to the next.
            wanted = [skip or number in mine for _, _, number in packed]
            places = [place for (_, row, _), want in zip(packed, wanted) if want for place in row.media]
            decoded = iter(
                decode_items(places, loader.towers, exact=loader.exact, augment=data.augment, seed=loader.seed, map=self.pool.map)
            )
            for (k, row, _), want in zip(packed, wanted):
                items = [next(decoded) for _ in row.media] if want else []
                bad = {p.segment: d for p, d in zip(row.media, items) if isinstance(d, BadExample)}
                for error in bad.values():
                    if not skip:
                        raise error
                shard = self.shards[k]
                for segment, entry in enumerate(row.entries, start=1):
                    _add(shard.dropped, _tally(entry.dropped))
                    if segment in bad:
                        _add(shard.dropped, {(entry.sequence.source, bad[segment].reason): 1})
                    else:
                        _add(shard.examples, {entry.sequence.source: 1})
                if want:
                    row, items = mend(row, items, loader.spec)
                if row is not None:
                    made[k].append((row, items))
        rows, media = zip(*(made[number // self.each][number % self.each] for number in loader.mine))
        info: BatchInfo = replace(describe(rows), examples=self._sum("examples"), dropped=self._sum("dropped"))
        return Rows(batch=collate(rows, media, loader.spec), info=info)

    def _sum(self, what: str) -> dict:
        total: dict = {}
        for shard in self.shards.values():
            _add(total, getattr(shard, what))
        return total

    def get_state(self) -> dict[str, Any]:
        return {"shards": self.count, "of": {shard.name: shard.get_state() for shard in self.shards.values()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for shard in self.shards.values():
            shard.set_state(state["of"][shard.name])

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()
        self.pool.shutdown(wait=False, cancel_futures=True)


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
