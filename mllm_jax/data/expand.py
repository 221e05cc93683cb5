"""Ids with placeholders -> a Sequence: what stands in the row for each medium, where, and who sees it.

    ids        <s>  a   <image>  b                          from the template
    pieces              "<img>" Run(0 1 2 3) "</img>"       from the layout of the tower
    tokens     <s>  a   <img>   <image> x 4   </img>   b
    slots      -1  -1    -1     0  1  2  3     -1     -1

Media are not decoded; their headers are read, so that a missing or broken file is found before it is packed.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample
from mllm_jax.data.layouts import MARK, Plain, alone, on_grid
from mllm_jax.data.templates import Stand, Template
from mllm_jax.data.tokenizer import placeholder
from mllm_jax.data.words import tokens_of
from mllm_jax.types import KINDS, Blob, Example, Grid, Item, Run, record
from mllm_jax.types import Sequence as Tokens


@record
class Entry:
    """A medium on its way into a row: its item, the tower that takes it, and what stands for it."""

    item: Item
    tower: Any
    pieces: tuple[str | Run, ...]       # of its layout, without the text that merges with what stands around it
    stand: Stand                        # that text, and the placeholder


def plan(
    example: Example, used: Sequence[int], template: Template, towers: Mapping[str, Any], texts: Sequence[str],
) -> tuple[Entry, ...]:
    """What the media of an example will be, from their headers.

    Args:
      used: indices of the media of the example, in the order of the text.
      texts: what stands beside each of them, for a tower that reads it.

    Raises:
      BadExample: a medium is missing or broken.
      ConfigError: a medium that no tower takes, a layout that does not fit the tower.
    """
    kinds = [example.media[i].kind for i in used]
    ways = [entrance(towers, kind, several=kinds.count("image") > 1) for kind in kinds]
    return tuple(_entry(_item(example.media[i], *way, text), way[1], template) for i, way, text in zip(used, ways, texts, strict=True))


def _entry(item: Item, tower: Any, template: Template) -> Entry:
    kind, lead, tail = item.blob.kind, "", ""
    if template.pairs or tower.route == "memory":
        return Entry(item=item, tower=tower, pieces=(), stand=Stand(kind, kind))
    layout = tower.layout or Plain()
    pieces = layout(item.cut, tower.num_tokens(item.cut.grid))
    if isinstance(pieces[0], str) and template.merges(pieces[0])[0]:
        lead, *pieces = pieces
    if isinstance(pieces[-1], str) and template.merges(pieces[-1])[1]:
        *pieces, tail = pieces
    return Entry(item=item, tower=tower, pieces=tuple(pieces), stand=Stand(kind, layout.token or kind, lead, tail))


def expand(
    example: Example, ids: np.ndarray, weights: np.ndarray, entries: Sequence[Entry], template: Template, towers: Mapping[str, Any],
) -> tuple[Tokens, int]:
    """The sequence, and how many of its positions must stay together with its media when it is cut.

    Args:
      ids: i32[n] with a placeholder for each medium, or for none if the template is of pairs.
      weights: f32[n] of these ids.

    Raises:
      BadExample: the placeholders are not as many as the media.
    """
    places = []
    for kind in {} if template.pairs else dict.fromkeys(entry.stand.token for entry in entries):
        token, id = placeholder(template.tokenizer, kind)
        here, own = np.flatnonzero(ids == id), [i for i, entry in enumerate(entries) if entry.stand.token == kind]
        if len(here) != len(own):
            raise BadExample("", "placeholders", f"the template left {len(here)} of {token} for {len(own)} {kind}s")
        places += zip(here.tolist(), own)
    line, at, before = _Line(template), 0, {}
    starts = []                         # of the tokens of each item among those of its input
    for entry in entries:
        starts.append(before.get(entry.item.modality, 0))
        before[entry.item.modality] = starts[-1] + entry.item.num_tokens
    for place, i in sorted(places):
        line.text(ids[at:place], weights[at:place])
        line.medium(entries[i], starts[i], ids[place : place + 1])
        at = place + 1
    line.text(ids[at:], weights[at:])
    return line.sequence(example, tuple(entry.item for entry in entries), _sees(towers)), line.end


def entrance(towers: Mapping[str, Any], kind: str, *, several: bool = False) -> tuple[str, Any]:
    """(input of the model, its tower for this kind of media); of `several` images it may see "images".

    Raises:
      ConfigError: the model takes no such media.
    """
    if kind in towers:
        tower = towers[kind]
        return kind, tower.kinds["images" if several and kind == "image" and "images" in tower.also else ""]
    for name, tower in towers.items():
        if kind in tower.also:
            return name, tower.kinds[kind]
    takes = ", ".join([*towers, *(k for tower in towers.values() for k in tower.also if k in KINDS)]) or "text only"
    raise ConfigError(f"the data has {kind}s and the model takes {takes}; choose another source")


def _item(blob: Blob, name: str, tower: Any, text: str) -> Item:
    cut = tower.view.look(blob, tower.patch)
    room = prod(cut.grid) if tower.view.packed else cut.tiles
    if tower.route == "memory" and cut.tiles > 1:
        raise ConfigError(f"an {blob.kind} of {cut.tiles} tiles cannot be read from memory, which has one tile an item; use another view")
    words = tower.words and tokens_of(text, tower.words)
    return Item(modality=name, blob=blob, cut=cut, room=room, num_tokens=cut.tiles * prod(tower.num_tokens(cut.grid)), text=words)


def _sees(towers: Mapping[str, Any]) -> set[str]:
    return {way.sees for tower in towers.values() for way in tower.kinds.values()}


class _Line:
    """Pieces side by side: `at` positions so far, `next` the position number of the one to come."""

    def __init__(self, template: Template):
        self.template = template
        self.at, self.next, self.end = 0, 0, 0
        self.tokens: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.runs: list[tuple[slice, str, int, Run, bool]] = []         # where, input, number of its kind, run, whether it sees itself
        self.items: list[tuple[int, str, int]] = []                     # of route "memory": where the reading begins, input, item

    def text(self, ids: np.ndarray, weights: np.ndarray | None = None) -> None:
        places = np.repeat(np.arange(len(ids), dtype=np.int32)[:, None], 3, axis=1)
        self._add(ids, np.zeros(len(ids), np.float32) if weights is None else weights, places)

    def medium(self, entry: Entry, start: int, id: np.ndarray) -> None:
        """What stands for an item whose tokens begin with number `start`; `id` fills the places of media tokens."""
        item, tower = entry.item, entry.tower
        if tower.route == "memory":     # the text after the placeholder reads this item
            self.items.append((self.at, item.modality, sum(name == item.modality for _, name, _ in self.items)))
            self.text(id)
            return
        layout, grid = tower.layout or Plain(), tower.num_tokens(item.cut.grid)
        for piece in entry.pieces:
            if isinstance(piece, str):
                self.text(self.template.piece(piece))
                continue
            where = slice(self.at, self.at + len(piece.slots))
            run = _rebased(piece, start, [MARK - tower.marks.index(name) for name in layout.marks])
            self.runs.append((where, item.modality, KINDS[piece.kind or item.blob.kind], run, tower.sees == "item"))
            self._add(np.repeat(id, len(run.slots)), np.zeros(len(run.slots), np.float32), _places(piece, tower.place, grid))
        self.end = self.at

    def sequence(self, example: Example, items: tuple[Item, ...], sees: set[str]) -> Tokens:
        tokens, s = np.concatenate(self.tokens).astype(np.int32), self.at
        weights = np.append(np.concatenate(self.weights)[1:], 0.0).astype(np.float32)
        kinds = np.zeros(s, np.int32)
        slots = {item.modality: np.full(s, -1, np.int32) for item in items}
        blocks = np.arange(s, dtype=np.int32) if sees != {"causal"} and sees else None
        for where, name, kind, run, together in self.runs:
            kinds[where], slots[name][where] = kind, run.slots
            if together:
                blocks[where] = where.start
        for at, name, item in self.items:
            slots[name][at:] = item
        if "prefix" in sees:            # the position that predicts the first token of the answer is the last one of it
            blocks[: np.argmax(weights > 0) + 1 if weights.any() else s] = 0
        taps = mix = None
        if any(run.taps is not None for *_, run, _ in self.runs):
            taps, mix = alone(np.full(s, -1, np.int32))
            for where, _, _, run, _ in self.runs:
                taps[where], mix[where] = alone(run.slots) if run.taps is None else (run.taps, run.mix)
        return Tokens(
            id=example.id, source=example.source, tokens=tokens,
            targets=np.append(tokens[1:], self.template.tokenizer.pad_token_id).astype(np.int32), weights=weights,
            kinds=kinds, positions=np.concatenate(self.positions), blocks=blocks, slots=slots, items=items, taps=taps, mix=mix,
        )  # fmt: skip

    def _add(self, ids: np.ndarray, weights: np.ndarray, places: np.ndarray) -> None:
        self.tokens.append(ids)
        self.weights.append(weights)
        self.positions.append(self.next + places)
        self.at += len(ids)
        self.next += int(places.max(initial=-1)) + 1


def _rebased(run: Run, start: int, marks: list[int]) -> Run:
    """The run with slots of all the items of its input, and marks as the tower counts them."""
    def move(x: np.ndarray) -> np.ndarray:
        out = x + start
        for k, mark in enumerate(marks):
            out[x == MARK - k] = mark
        return out.astype(np.int32)

    return Run(slots=move(run.slots), taps=None if run.taps is None else move(run.taps), mix=run.mix)


def _places(run: Run, place: str, grid: Grid) -> np.ndarray:
    """i32[n 3]: positions of the tokens of a run, counted from its first."""
    n = len(run.slots)
    if run.places is not None:
        return run.places
    if place == "one":
        return np.zeros((n, 3), np.int32)
    if place == "row":
        return np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
    if (run.slots < 0).any():
        raise ConfigError("a layout with marks has no grid of positions; use place='row', or give its runs places")
    return on_grid(run.slots, grid)
