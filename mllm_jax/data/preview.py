"""A packed batch as one HTML page: what the model sees, and what it is trained on.

Everything is read back from the Batch alone: pictures are joined from the patches, text is decoded from the ids.
A mistake in cutting, packing or masking is therefore visible, which a page made of the examples would hide.
"""

import base64
import html
import io
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax.data.batch import Rows
from mllm_jax.data.pack import unit
from mllm_jax.data.views import join
from mllm_jax.types import KINDS

_COLOURS = ("#3b6ea5", "#a5563b", "#4b8b3b", "#7a4b9a", "#a58a1f", "#2f8a8a")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1.2rem; color: #1c1f23;
  background: #fafaf8; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } p.note { color: #5b626b; margin: .2rem 0 1.2rem; }
section.row { background: #fff; border: 1px solid #dcdcd6; border-radius: 8px; padding: 1rem 1.2rem;
  margin: 0 0 1.2rem; }
section.row > header { display: flex; gap: .9rem; align-items: center; flex-wrap: wrap; margin-bottom: .8rem; }
section.row h2 { font-size: 1.05rem; margin: 0; } .facts { color: #5b626b; font-size: .88rem; }
.bar { display: flex; height: .9rem; border-radius: 4px; overflow: hidden; background: #e9e9e4; margin-bottom: .9rem; }
.bar span { display: block; border-right: 1px solid #fff; box-sizing: border-box; }
article { border-left: 4px solid var(--c); padding: .1rem 0 .2rem .9rem; margin: 0 0 .9rem; }
article h3 { font-size: .85rem; font-weight: 600; color: var(--c); margin: 0 0 .2rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13.5px/1.7 ui-monospace, monospace; }
mark { background: #ffe9a8; border-radius: 3px; padding: .1em 0; color: inherit; }
.special { color: #98a0a8; }
.media { display: flex; width: max-content; gap: .6rem; align-items: center; margin: .3rem 0; white-space: normal;
  padding: .3rem .7rem .3rem .5rem; border: 1px solid #dcdcd6; border-radius: 6px; background: #f4f6f8; }
.media img { display: block; width: 112px; height: auto; image-rendering: pixelated; border-radius: 3px; }
small { color: #5b626b; font: 12px/1.4 system-ui, sans-serif; }
.strip { display: flex; flex-wrap: wrap; gap: .6rem; }
.strip .media { flex-direction: column; align-items: flex-start; }
table { border-collapse: collapse; font-size: .88rem; } td, th { text-align: left; padding: .15rem .9rem .15rem 0; }
.bad { color: #a02020; }
"""


def preview(rows: Rows, tokenizer: Any, towers: Mapping[str, Any], *, title: str = "A packed batch") -> str:
    """A self-contained HTML page of the rows: segments, text with the trained tokens marked, media and their slots."""
    batch, info = rows.batch, rows.info
    size = batch.tokens.size
    facts = [
        f"{batch.tokens.shape[0]} rows of {batch.tokens.shape[1]} positions",
        f"{info.tokens / size:.1%} filled",
        f"{info.trained} of {info.tokens} tokens trained ({info.trained / max(1, info.tokens):.1%})",
        *(f"{np.sum(m.mask)} of {m.mask.size} {name} {'slots' if m.item is None else 'patches'} used" for name, m in batch.media.items()),
    ]
    body = [f"<h1>{html.escape(title)}</h1>", f'<p class="note">{" · ".join(facts)}<br>'
            '<mark>marked</mark> tokens are predicted with a weight in the loss; a segment sees itself only.</p>',
            _counts(info)]  # fmt: skip
    for b in range(batch.tokens.shape[0]):
        body.append(_row(rows, b, tokenizer, towers))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _counts(info: Any) -> str:
    lines = [f"<tr><td>{html.escape(name)}</td><td>{count} examples</td></tr>" for name, count in info.examples.items()]
    for (name, reason), count in info.dropped.items():
        lines.append(f'<tr class="bad"><td>{html.escape(name)}</td><td>{count} dropped: {reason}</td></tr>')
    return f"<table>{''.join(lines)}</table><br>" if lines else ""


def _row(rows: Rows, b: int, tokenizer: Any, towers: Mapping[str, Any]) -> str:
    batch = rows.batch
    segments, trained = batch.segments[b], np.zeros(batch.tokens.shape[1], bool)
    # A weight stands where the prediction is made; what is marked is the token that is predicted.
    trained[1:] = batch.weights[b, :-1] > 0
    length, real = len(segments), int(np.sum(segments > 0))
    spans = [(s, list(group)) for s, group in groupby(range(length), key=lambda i: segments[i]) if s > 0]
    bar = "".join(
        f'<span style="width:{100 * len(at) / length:.2f}%;background:{_colour(i)}" title="{len(at)} positions"></span>'
        for i, (_, at) in enumerate(spans)
    )
    ids = rows.info.ids[b] if b < len(rows.info.ids) else ()
    facts = [
        "1 segment" if len(spans) == 1 else f"{len(spans)} segments",
        f"{real} of {length} positions ({real / length:.0%})",
        f"{np.sum(batch.weights[b] > 0)} trained",
        *(f"{np.sum(m.mask[b])} of {m.mask.shape[1]} {unit(name, towers[name])}" for name, m in batch.media.items()),
    ]
    out = [
        f'<section class="row"><header><h2>Row {b}</h2><span class="facts">{" · ".join(facts)}</span></header>'
        f'<div class="bar">{bar}</div>'
    ]
    for i, (_, at) in enumerate(spans):
        name = html.escape(ids[i]) if i < len(ids) else ""
        out.append(
            f'<article style="--c:{_colour(i)}"><h3>{name} · {len(at)} positions from {at[0]}</h3>'
            f'<div class="text">{_text(batch, b, at, trained, tokenizer, towers)}</div></article>'
        )
    beside = [
        _medium(name, _picture(media, b, i, towers[name]), i, "beside the row")
        for name, media in batch.media.items() if towers[name].route != "splice"
        for i in np.flatnonzero(media.mask[b])
    ]  # fmt: skip
    return "".join(out) + (f'<div class="strip">{"".join(beside)}</div>' if beside else "") + "</section>"


def _text(batch: Any, b: int, at: list[int], trained: np.ndarray, tokenizer: Any, towers: Mapping[str, Any]) -> str:
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    # Runs of: media tokens, or text of one marking; a byte-level character may need several tokens to be readable.
    owner = {i: _owner(batch, b, i, towers) for i in at}
    kinds = {number: kind for kind, number in KINDS.items()}
    kind = lambda i: owner[i] and kinds[int(batch.kinds[b, i])]         # a video is an item of the input "image"
    out = []
    for (name, shown, mark, plain), group in groupby(
        at, key=lambda i: (owner[i], kind(i), bool(trained[i]), batch.tokens[b, i] not in special)
    ):
        where = list(group)
        if name is not None:
            media, tower = batch.media[name], towers[name]
            tiles, slots, marks = _tiles(media, b, media.slot[b, where], tower)
            note = f"{len(where)} tokens at {where[0]}-{where[-1]}" + (f", slots {slots.min()}-{slots.max()}" if len(slots) else "") + (
                f"; learned marks: {marks}" if marks else "")
            several = len(tiles) > 1
            pictures = "".join(_medium(shown, _picture(media, b, i, tower), i, "" if several else note) for i in tiles)
            out.append(f'<span class="strip">{pictures}</span><small>{note}</small>' if several else
                       pictures or f'<span class="special">{name} mark</span>')
            continue
        ids = batch.tokens[b, where].tolist()
        if plain:
            text = html.escape(tokenizer.decode(ids)).replace("\n", '<span class="special">⏎</span>\n')
        else:
            same = len(set(ids)) == 1 < len(ids)
            text = f"{tokenizer.decode(ids[:1])} x {len(ids)}" if same else tokenizer.decode(ids)
            text = f'<span class="special">{html.escape(text)}</span>'
        out.append(f"<mark>{text}</mark>" if mark else text)
    return "".join(out)


def _owner(batch: Any, b: int, i: int, towers: Mapping[str, Any]) -> str | None:
    """The modality of which a token stands at position i."""
    return next((name for name, media in batch.media.items() if media.slot[b, i] >= 0 and towers[name].route == "splice"), None)


def _tiles(media: Any, b: int, slots: np.ndarray, tower: Any) -> tuple[list[int], np.ndarray, int]:
    """(tiles, or items where packed, that these slots are of, in the order of the text; the slots of tokens; how many are marks)."""
    patches = tower.nominal.grid
    each, tokens, room = int(np.prod(patches)), int(np.prod(tower.num_tokens(patches))), media.mask.shape[1]
    real = slots[slots < (room * tokens if media.item is None else room * tokens // each)]
    tiles = real // tokens if media.item is None else media.item[b, real * (each // tokens)]
    return list(dict.fromkeys(tiles.tolist())), real, len(slots) - len(real)


def _picture(media: Any, b: int, tile: int, tower: Any) -> np.ndarray:
    """u8[h w 3] of a tile, or of an item of the packed layout; of a video the first moment."""
    which = tile if media.item is None else media.item[b] == tile
    values, coords = media.values[b, which], media.coords[b, which]
    first = coords[:, 0] == coords[:, 0].min()
    return join(values[first], coords[first], tower.patch)


def _medium(name: str, pixels: np.ndarray, item: int, note: str) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    data = base64.b64encode(out.getvalue()).decode()
    size = f"{pixels.shape[1]}x{pixels.shape[0]} pixels"
    return (
        f'<span class="media"><img alt="{name} {item}" src="data:image/png;base64,{data}">'
        f"<small>{name} {item}<br>{size}{'<br>' + note if note else ''}</small></span>"
    )


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]
