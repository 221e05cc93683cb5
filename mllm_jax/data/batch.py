"""Rows -> Batch: media are decoded here, and nowhere earlier; also the left-padded batch of prompts.

Media values are u8 patches, four times smaller on the way to the device than normalized floats. A medium that turns
out to be broken behind its header takes its example with it: those positions become padding.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, replace
from math import prod
from typing import Any

import numpy as np

from mllm_jax.data.augment import rng_for
from mllm_jax.data.errors import BadExample
from mllm_jax.data.expand import entrance
from mllm_jax.data.pack import MediaSpec, Placed, Row, RowSpec, blank, one_row, rooms, row_spec
from mllm_jax.data.record import read_blob
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenize import encode_prompt
from mllm_jax.types import Batch, Example, Media, Sequence, record

Decoded = tuple[np.ndarray, np.ndarray]             # values u8[n u], coords i32[n 3]
BUCKET = 64                                         # lengths of prompt batches are multiples of this


@record
class BatchInfo:
    """What is in a batch, for the log; sums over its rows."""

    ids: tuple[tuple[str, ...], ...]                # of the examples of each row
    tokens: int                                     # positions that are not padding
    trained: int                                    # of them with a weight
    media: Mapping[str, int]                        # modality -> tiles, or patches where the layout is packed
    squares: int                                    # sum over examples of length^2: what causal attention costs
    frames: Mapping[str, int] = field(default_factory=dict)                 # packed modality -> frames; an image is one
    pairs: Mapping[str, int] = field(default_factory=dict)                  # packed modality -> sum over frames of patches^2
    examples: Mapping[str, int] = field(default_factory=dict)               # source -> examples since the start
    dropped: Mapping[tuple[str, str], int] = field(default_factory=dict)    # (source, reason) -> since the start


@record
class Rows:
    """A batch of this host, in numpy, and what is in it."""

    batch: Batch
    info: BatchInfo


def decode_items(
    placed: Iterable[Placed],
    towers: Mapping[str, Any],
    *,
    exact: bool,
    augment: tuple[Any, ...] = (),
    seed: int = 0,
    map: Callable = map,
) -> list[Decoded | BadExample]:
    """Patches of each medium (tile after tile), or what is wrong with it, in order.

    Args:
      exact: pixels equal to the reference processors; otherwise faster ones, for training.
      augment: changes of the image, keyed by (seed, id of the example, number of the medium, epoch).
      map: `executor.map`, to decode in threads.
    """

    def decode(place: Placed) -> Decoded | BadExample:
        blob, id = place.item.blob, place.entry.sequence.id
        _, tower = entrance(towers, blob.kind, several=sum(i.blob.kind == "image" for i in place.entry.sequence.items) > 1)
        change = None
        if augment:
            # A new generator each time, so that all frames of a video are changed alike.
            change = lambda image: _chain(augment, image, rng_for(seed, f"{id}/{place.number}", place.entry.epoch))
        try:
            return tower.view(read_blob(blob), tower.patch, exact=exact, change=change)
        except BadExample as error:
            return error.of(id)

    return list(map(decode, placed))


def mend(row: Row, decoded: list[Decoded | BadExample], spec: RowSpec) -> tuple[Row | None, list[Decoded]]:
    """The row without the examples that have a broken medium, or None if none is left, and its media."""
    bad = {p.segment for p, d in zip(row.media, decoded, strict=True) if isinstance(d, BadExample)}
    good = [d for p, d in zip(row.media, decoded, strict=True) if p.segment not in bad]
    return (blank(row, bad, spec) if bad else row), good


def collate(rows: list[Row], decoded: list[list[Decoded]], spec: RowSpec) -> Batch:
    """A Batch of numpy arrays; the layout of its media is fixed, so a row without media has room for them too."""
    stack = lambda name: np.stack([getattr(row, name) for row in rows])
    of = lambda name, modality: np.stack([getattr(row, name)[modality] for row in rows])
    media = {}
    for modality, room in spec.media.items():
        media[modality] = _media(
            len(rows), room, slot=of("slots", modality), taps=of("taps", modality) if room.taps else None,
            mix=of("mix", modality) if room.taps else None)
    for r, (row, items) in enumerate(zip(rows, decoded, strict=True)):
        for number, (place, (values, coords)) in enumerate(zip(row.media, items, strict=True), start=1):
            into, here = media[place.item.modality], slice(place.index, place.index + place.item.room)
            into.values[r, here], into.coords[r, here] = values.reshape(into.values[r, here].shape), coords.reshape(into.coords[r, here].shape)
            into.mask[r, here] = True
            if into.item is not None:
                into.item[r, here] = number
            if into.text is not None:
                into.text[r, here, : len(place.item.text)] = place.item.text
    return Batch(
        tokens=stack("tokens"),
        targets=stack("targets"),
        weights=stack("weights"),
        segments=stack("segments"),
        positions=stack("positions"),
        kinds=stack("kinds"),
        blocks=stack("blocks") if spec.blocks else None,
        trained=None if spec.trained is None else np.stack([_trained(row.weights, spec.trained) for row in rows]),
        media=media,
    )


def _trained(weights: np.ndarray, n: int) -> np.ndarray:
    """Positions i32[n] with a weight, then -1."""
    there = np.flatnonzero(weights)
    return np.pad(there, (0, n - len(there)), constant_values=-1).astype(np.int32)


def _media(rows: int, room: MediaSpec, *, full: Callable = np.full, **arrays: np.ndarray | None) -> Media:
    """Room for the media of so many rows, with nothing in it."""
    patches = (rows, room.items) if room.packed else (rows, room.items, prod(room.grid))
    return Media(
        values=full((*patches, room.width), 0, np.uint8),
        coords=full((*patches, 3), 0, np.int32),
        mask=full((rows, room.items), False, bool),
        item=full(patches, 0, np.int32) if room.packed else None,
        text=full((rows, room.items, room.text), -1, np.int32) if room.text else None,
        **arrays,
    )


def blank_batch(rows: int, spec: RowSpec) -> Batch:
    """The Batch that `collate` makes of so many rows, in shapes and types: of one value each, read-only, it takes no memory."""
    full = lambda shape, value, dtype: np.broadcast_to(np.asarray(value, dtype), shape)
    each = lambda *more, dtype=np.int32: full((rows, spec.seq_len, *more), 0, dtype)
    media = {
        modality: _media(rows, room, full=full, slot=each(), taps=each(4) if room.taps else None,
                         mix=each(4, dtype=np.float32) if room.taps else None)
        for modality, room in spec.media.items()}
    return Batch(tokens=each(), targets=each(), weights=each(dtype=np.float32), segments=each(), positions=each(3), kinds=each(),
                 blocks=each() if spec.blocks else None, trained=None if spec.trained is None else full((rows, spec.trained), -1, np.int32),
                 media=media)


def describe(rows: list[Row]) -> BatchInfo:
    """What is in these rows; the counts since the start are the loader's to add."""
    lengths = [len(entry.sequence) for row in rows for entry in row.entries]
    media, frames, pairs = {}, {}, {}
    for item in (place.item for row in rows for place in row.media):
        time, *sides = item.cut.grid
        packed = item.room == time * prod(sides)        # counted in patches
        for counts, n in ((media, item.room), *(((frames, time), (pairs, time * prod(sides) ** 2)) if packed else ())):
            counts[item.modality] = counts.get(item.modality, 0) + n
    return BatchInfo(
        ids=tuple(tuple(entry.sequence.id for entry in row.entries) for row in rows),
        tokens=sum(lengths),
        trained=sum(int(np.count_nonzero(row.weights)) for row in rows),
        media=media,
        squares=sum(n * n for n in lengths),
        frames=frames,
        pairs=pairs,
    )


def prompt_batch(
    examples: Iterable[Example],
    *,
    template: str | Template,
    tokenizer: Any,
    towers: Mapping[str, Any],
    seq_len: int | None = None,
    items: Mapping[str, int] | None = None,
    rows: int | None = None,
    exact: bool = True,
    map: Callable = map,
) -> Batch:
    """Prompts of different lengths, one a row, padded at the left so that all of them end at the last position.

    Padding has segment 0; positions count from 0 at the first token of each prompt.

    Args:
      seq_len: length of the rows; None takes the longest prompt, rounded up to a multiple of 64, so that a
        program is compiled for few lengths.
      items: room for tiles or patches of media; None takes the most that a prompt has, at least one.
      rows: rows of the batch; those after the examples are padding alone (a ragged last batch).

    Raises:
      BadExample: a fault of an example, or one that does not fit.
    """
    template = template if isinstance(template, Template) else Template(template, tokenizer)
    with_model = {"template": template, "tokenizer": tokenizer, "towers": towers}
    sequences = [encode_prompt(example, max_len=seq_len, **with_model) for example in examples]
    if seq_len is None:
        longest = max((len(s) for s in sequences), default=1)
        seq_len = -(-longest // BUCKET) * BUCKET
    if items is None:
        items = {m: max(1, *(rooms(s).get(m, 0) for s in sequences)) for m in towers}
    spec = row_spec(seq_len, items, towers, tokenizer.pad_token_id)
    placed = [_to_the_right(one_row(s, spec), len(s)) for s in sequences]
    decoded = []
    for row in placed:
        decoded.append(decode_items(row.media, towers, exact=exact, map=map))
        for item in decoded[-1]:
            if isinstance(item, BadExample):
                raise item
    for _ in range(len(placed), rows or 0):
        placed.append(_empty(spec))
        decoded.append([])
    return collate(placed, decoded, spec)


def _to_the_right(row: Row, length: int) -> Row:
    by = len(row.tokens) - length
    arrays = ("tokens", "targets", "weights", "segments", "positions", "kinds", *(["blocks"] if row.blocks is not None else []))
    return replace(
        row,
        **{name: np.roll(getattr(row, name), by, axis=0) for name in arrays},
        **{name: {m: np.roll(x, by, axis=0) for m, x in getattr(row, name).items()} for name in ("slots", "taps", "mix")},
    )


def _empty(spec: RowSpec) -> Row:
    none = np.zeros(0, np.int32)
    nothing = Sequence(
        id="", source="", tokens=none, targets=none, weights=none, kinds=none,
        positions=np.zeros((0, 3), np.int32), blocks=None,
    )  # fmt: skip
    return replace(one_row(nothing, spec), entries=())


def _chain(changes: tuple[Any, ...], image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    for change in changes:
        image = change(image, rng)
    return image
