"""Sequences -> rows of fixed length, several in a row, each with its media.

Sequences are gathered until they are worth some 32 rows, and packed together, the largest first, each into the first
row with room for its positions, its trained positions and its media.  The rows come out in the order of arrival.  The state is therefore
small and exact: where the group began, and how many of its rows are out.  Restoring packs one group again, which is
cheap, because media are still encoded bytes or paths.

Grain has such a packer (`FirstFitPackIterDataset`, with the same state).  It copies features into buffers and cannot
re-base `slot` to the row's fixed layout, so the row would be built a second time from its meta-features; and it takes
sequences as they come, which fills less: 89 % of rows of 2,048 with up to three images of 576 tokens, against 93 % here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample
from mllm_jax.data.layouts import MARK, alone
from mllm_jax.types import Grid, Item, Sequence, record

TRAINED = "trained positions"           # beside the names of modalities


@record
class MediaSpec:
    """The fixed room of one modality in a row.  It is counted in tiles, or in patches where the layout is packed."""

    items: int                          # room for so many tiles or patches
    grid: Grid                          # patches of a tile; packed: (1, 1, 1)
    width: int                          # values of a patch
    route: str
    num_tokens: int                     # positions of a tile; 0 where it has none (route "pool"); packed: 1
    patches: int = 1                    # packed: that become one token
    packed: bool = False
    taps: bool = False                  # some tokens may be means of several
    text: int = 0                       # most tokens of text that is read beside an item

    @property
    def tokens(self) -> int:
        """Media tokens of the row; marks come after them."""
        return self.before(self.items)

    def before(self, used: int) -> int:
        """Number of the first token behind so many tiles or patches."""
        return used * self.num_tokens // self.patches

    def check(self, item: Item, id: str) -> None:
        """Raises ConfigError if the tokens of the item are not where the row will look for them."""
        if not self.packed and item.cut.grid != self.grid:
            raise ConfigError(f"record {id!r} has {item.cut.grid} patches where rows have {self.grid}; use views of one size")
        if self.route != "memory" and item.num_tokens * self.patches != item.room * self.num_tokens:
            raise ConfigError(f"record {id!r} has {item.num_tokens} media tokens for {item.room} patches, where {self.patches} make one; "
                              "a packed layout needs a connector that keeps to that")


@record
class RowSpec:
    """The shape of a row."""

    seq_len: int
    pad: int                            # id at padding
    media: Mapping[str, MediaSpec]
    trained: int | None = None          # most positions with a weight, Data.trained
    blocks: bool = False                # rows say who sees whom, because attention is not causal

    def check(self, sequence: Sequence) -> None:
        """Raises BadExample if the sequence does not fit into an empty row of this shape."""
        if len(sequence) > self.seq_len:
            raise BadExample(sequence.id, "overlong", f"{len(sequence)} positions for a row of {self.seq_len}")
        if self.trained is not None and (count := trained(sequence)) > self.trained:
            raise BadExample(sequence.id, "overtrained", f"{count} trained positions for a row of data.trained={self.trained}")
        for modality, count in rooms(sequence).items():
            spec, items = self.media[modality], [item for item in sequence.items if item.modality == modality]
            if count > spec.items:
                what = f"{modality} patches" if spec.packed else f"{modality}s" if count == len(items) else f"{modality} tiles"
                raise BadExample(sequence.id, "too_many_items", f"{count} {what} for a row of {spec.items}")
            for item in items:
                spec.check(item, sequence.id)


def unit(modality: str, tower: Any) -> str:
    """What the room of a row is counted in: "images", "image tiles" or "image patches"."""
    return f"{modality} patches" if tower.view.packed else f"{modality} tiles" if tower.room > 1 else f"{modality}s"


def row_spec(seq_len: int, items: Mapping[str, int], towers: Mapping[str, Any], pad: int, trained: int | None = None) -> RowSpec:
    """The shape of rows for a model with these towers; an input that `items` does not name has room for one medium.

    Raises:
      ConfigError: `items` names an input that the model does not have, or `trained` is no part of a row.
    """
    if trained is not None and not 1 <= trained <= seq_len:
        raise ConfigError(f"data.trained is {trained}; it counts positions of a row, which has {seq_len}: choose 1 to {seq_len}, or None for all")
    if unknown := set(items) - set(towers):
        raise ConfigError(f"data.items names {', '.join(sorted(unknown))}; the model takes: {', '.join(towers) or 'text only'}")
    media = {}
    for modality, tower in towers.items():
        patches, tokens, room = tower.nominal.grid, prod(tower.num_tokens(tower.nominal.grid)), items.get(modality, tower.room)
        common = {"width": tower.encoder.patch_dim, "route": tower.route,
                  "taps": any(way.layout is not None and way.layout.taps for way in tower.kinds.values()),
                  "text": tower.words.length if tower.words else 0}  # fmt: skip
        if tower.view.packed:
            ratio = prod(patches) // tokens
            media[modality] = MediaSpec(
                items=-(-room // ratio) * ratio, grid=(1, 1, 1), num_tokens=1, patches=ratio, packed=True, **common)
        else:
            media[modality] = MediaSpec(items=room, grid=patches, num_tokens=tokens, **common)
    blocks = any(way.sees != "causal" for tower in towers.values() for way in tower.kinds.values())
    return RowSpec(seq_len=seq_len, pad=pad, media=media, trained=trained, blocks=blocks)


@record
class Entry:
    """A sequence on its way into a row."""

    sequence: Sequence
    epoch: int = 0                      # keys the augmentation of its media, with its id
    dropped: tuple[tuple[str, str], ...] = ()   # (source, reason) of the examples dropped just before it


@record
class Placed:
    """A medium in a row: where its tiles or patches begin among those of its modality, and whose it is."""

    item: Item
    index: int
    segment: int
    number: int                         # among the media of its example
    entry: Entry


@record
class Row:
    """One packed row with media not decoded; arrays have `seq_len` entries."""

    tokens: np.ndarray                  # i32[s]
    targets: np.ndarray                 # i32[s]
    weights: np.ndarray                 # f32[s]
    segments: np.ndarray                # i32[s]
    positions: np.ndarray               # i32[s 3]
    kinds: np.ndarray                   # i32[s]
    blocks: np.ndarray | None           # i32[s]
    slots: Mapping[str, np.ndarray]     # modality -> i32[s]
    taps: Mapping[str, np.ndarray]      # modality -> i32[s 4], of those that may have means of tokens
    mix: Mapping[str, np.ndarray]       # modality -> f32[s 4]
    media: tuple[Placed, ...]
    entries: tuple[Entry, ...]          # in the order of the segments


class Packer(Iterator[Row]):
    """Rows made of `entries`, an iterator of Entry; exactly resumable if `entries` is.

    Args:
      pack: False puts each sequence into a row of its own.
      rows: about as many rows are packed together; more fill better and take more memory.

    Raises:
      BadExample: a sequence that does not fit into an empty row (RowSpec.check).
    """

    def __init__(self, entries: Iterator[Entry], spec: RowSpec, *, pack: bool = True, rows: int = 32):
        self.entries, self.spec, self.pack, self.size = entries, spec, pack, rows
        self._limit = {"": spec.seq_len} | {m: s.items for m, s in spec.media.items()}
        self._limit |= {} if spec.trained is None else {TRAINED: spec.trained}
        self._begin(self._where())

    def __next__(self) -> Row:
        if not self._group:
            self._group = self._fill()
        row = _row(self._group[self._next], self.spec)
        self._next += 1
        if self._next == len(self._group):
            self._begin(self._after, self._ahead)
        return row

    def get_state(self) -> dict[str, Any]:
        return {"entries": self._before, "next": self._next}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.entries.set_state(state["entries"])
        self._begin(state["entries"])
        if state["next"]:
            self._group, self._next = self._fill(), state["next"]

    def _begin(self, before: Any, ahead: Entry | None = None) -> None:
        self._group: list[list[Entry]] = []
        self._next = 0
        self._before, self._after = before, None        # state of `entries` where this group and the next one begin
        self._ahead = ahead                             # was read, and fitted nowhere in the group before

    def _where(self) -> Any:
        return self.entries.get_state() if hasattr(self.entries, "get_state") else None

    def _read(self) -> Entry | None:
        entry, self._ahead = self._ahead, None
        if entry is None:
            entry = next(self.entries, None)
            if entry is not None:
                self.spec.check(entry.sequence)
        return entry

    def _fill(self) -> list[list[Entry]]:
        """The entries of the rows of the next group."""
        if not self.pack:
            entry = self._read()
            if entry is None:
                raise StopIteration
            self._after = self._where()
            return [[entry]]
        gathered: list[tuple[float, int, Entry]] = []
        total: dict[str, int] = {}
        while self._part(total) < self.size and (entry := self._read()) is not None:
            need = _need(entry.sequence, self._limit)
            total = {k: total.get(k, 0) + need.get(k, 0) for k in total | need}
            gathered.append((-self._part(need), len(gathered), entry))
        if not gathered:
            raise StopIteration
        rows = _Rows(self._limit)
        for _, order, entry in sorted(gathered, key=lambda g: g[:2]):
            rows.put(order, entry, grow=True)
        order = len(gathered)
        while True:                     # what is left of the rows is filled in order of arrival
            self._after = self._where()
            entry = self._read()
            if entry is None or not rows.put(order, entry, grow=False):
                self._ahead = entry
                return rows.sorted()
            order += 1

    def _part(self, need: Mapping[str, int]) -> float:
        """Rows that this much is worth."""
        return max((n / self._limit[k] if n else 0.0 for k, n in need.items()), default=0.0)


class _Rows:
    """Open rows: (order of arrival, entry) of each, and the room that is left in it."""

    def __init__(self, limit: Mapping[str, int]):
        self.limit = limit
        self.rows: list[list[tuple[int, Entry]]] = []
        self.room: list[dict[str, int]] = []

    def put(self, order: int, entry: Entry, *, grow: bool) -> bool:
        """Whether the entry found a place: the first row with room, or a new one if the rows may grow."""
        need = _need(entry.sequence, self.limit)
        fits = (i for i, left in enumerate(self.room) if all(left[k] >= n for k, n in need.items()))
        place = next(fits, len(self.rows))
        if place == len(self.rows):
            if not grow:
                return False
            self.rows.append([])
            self.room.append(dict(self.limit))
        self.rows[place].append((order, entry))
        for k, n in need.items():
            self.room[place][k] -= n
        return True

    def sorted(self) -> list[list[Entry]]:
        """By arrival: otherwise the longest examples would always be trained on first."""
        rows = sorted((sorted(row, key=lambda e: e[0]) for row in self.rows), key=lambda row: row[0][0])
        return [[entry for _, entry in row] for row in rows]


def pack(sequences: Iterable[Sequence], spec: RowSpec, *, rows: int = 32) -> Iterator[Row]:
    """Rows of any sequences, without state; for statistics, previews and tests."""
    return Packer((Entry(sequence=s) for s in sequences), spec, rows=rows)


def one_row(sequence: Sequence, spec: RowSpec) -> Row:
    """An unpacked row: one sequence, then padding."""
    spec.check(sequence)
    return _row([Entry(sequence=sequence)], spec)


def blank(row: Row, segments: set[int], spec: RowSpec) -> Row | None:
    """The row without these segments, which become padding; None if nothing is left."""
    if len(segments) == len(row.entries):
        return None
    gone = np.isin(row.segments, list(segments))
    fill = {"tokens": spec.pad, "targets": spec.pad, "weights": 0, "segments": 0, "positions": 0, "kinds": 0}
    arrays = {name: _where(gone, getattr(row, name), value) for name, value in fill.items()}
    return replace(
        row,
        **arrays,
        slots={m: _where(gone, slot, -1) for m, slot in row.slots.items()},
        media=tuple(p for p in row.media if p.segment not in segments),
        entries=tuple(e for i, e in enumerate(row.entries) if i + 1 not in segments),
    )


def _row(entries: list[Entry], spec: RowSpec) -> Row:
    s = spec.seq_len
    tokens, targets = np.full(s, spec.pad, np.int32), np.full(s, spec.pad, np.int32)
    weights, segments, kinds = np.zeros(s, np.float32), np.zeros(s, np.int32), np.zeros(s, np.int32)
    positions = np.zeros((s, 3), np.int32)
    slots = {m: np.full(s, -1, np.int32) for m in spec.media}
    tapped = [m for m, room in spec.media.items() if room.taps]
    taps, mix = {m: np.zeros((s, 4), np.int32) for m in tapped}, {m: np.zeros((s, 4), np.float32) for m in tapped}
    blocks = np.arange(s, dtype=np.int32) if spec.blocks else None
    used, media, at = dict.fromkeys(spec.media, 0), [], 0
    for segment, entry in enumerate(entries, start=1):
        sequence = entry.sequence
        here = slice(at, at + len(sequence))
        tokens[here], targets[here], weights[here] = sequence.tokens, sequence.targets, sequence.weights
        segments[here], positions[here], kinds[here] = segment, sequence.positions, sequence.kinds
        if sequence.blocks is not None:
            blocks[here] = sequence.blocks
        for modality, slot in sequence.slots.items():
            room = spec.media[modality]
            # The row's layout is fixed: tile i has the tokens from i * num_tokens.  Memory slots name the item itself.
            base = used[modality] if room.route == "memory" else room.before(used[modality])
            slots[modality][here] = _moved(slot, base, room.tokens)
            if room.taps:
                own, ones = alone(slot) if sequence.taps is None else (sequence.taps, sequence.mix)
                taps[modality][here], mix[modality][here] = np.maximum(_moved(own, base, room.tokens), 0), ones
        for number, item in enumerate(sequence.items):
            media.append(Placed(item=item, index=used[item.modality], segment=segment, number=number, entry=entry))
            used[item.modality] += item.room
        at += len(sequence)
    return Row(
        tokens=tokens, targets=targets, weights=weights, segments=segments, positions=positions, kinds=kinds,
        blocks=blocks, slots=slots, taps=taps, mix=mix, media=tuple(media), entries=tuple(entries),
    )  # fmt: skip


def _moved(slot: np.ndarray, base: int, marks: int) -> np.ndarray:
    """Slots of a sequence as those of a row: tokens behind `base` others, mark k at marks + k, -1 as it is."""
    return np.where(slot >= 0, slot + base, np.where(slot <= MARK, marks + MARK - slot, -1))


def _need(sequence: Sequence, limit: Mapping[str, int]) -> dict[str, int]:
    """What a sequence takes of a row: positions under "", those that are trained where they are limited, and room of media."""
    return {"": len(sequence)} | ({TRAINED: trained(sequence)} if TRAINED in limit else {}) | rooms(sequence)


def trained(sequence: Sequence) -> int:
    """Positions with a weight."""
    return int(np.count_nonzero(sequence.weights))


def rooms(sequence: Sequence) -> dict[str, int]:
    """Tiles or patches that a sequence takes of a row, by modality."""
    counts: dict[str, int] = {}
    for item in sequence.items:
        counts[item.modality] = counts.get(item.modality, 0) + item.room
    return counts


def _where(gone: np.ndarray, values: np.ndarray, fill: int) -> np.ndarray:
    return np.where(gone.reshape(-1, *[1] * (values.ndim - 1)), np.asarray(fill, values.dtype), values)
