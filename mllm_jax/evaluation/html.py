"""HTML that stands alone: escaping, tables, and a page with its style inside, for light, dark and paper."""

from collections.abc import Iterable, Sequence
from html import escape


class Raw(str):
    """Text that is HTML already."""


def text(value: object) -> str:
    return value if isinstance(value, Raw) else escape(str(value))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: bool = True) -> Raw:
    """A table whose first column is text and, with `numbers`, whose others are aligned at the right."""
    kind = "numbers" if numbers else "words"
    top = "".join(h if isinstance(h, Cell) else f"<th>{text(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(c if isinstance(c, Cell) else f"<td>{text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return Raw(f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


class Cell(str):
    """A whole `<td>` or `<th>`."""


def share(value: float, note: str = "") -> Cell:
    """A cell with a part of one as percent, and a bar of that length behind it."""
    inside = f"{percent(value)}{f' &nbsp;<small>{text(note)}</small>' if note else ''}"
    return Cell(f'<td class="share" style="--part:{100 * value:.1f}%"><span>{inside}</span></td>')


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def short(value: float, unit: str = "") -> str:
    """Three digits and a prefix: 12.3 k, 4.56 G."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def section(title: str, *body: str, note: str = "") -> Raw:
    lead = f'<p class="note">{text(note)}</p>' if note else ""
    return Raw(f"<section><h2>{text(title)}</h2>{lead}{''.join(body)}</section>")


def page(title: str, *body: str) -> str:
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{text(title)}</title><style>{STYLE}</style></head><body><main>{"".join(body)}</main></body></html>\n')


STYLE = """
:root { color-scheme: light dark; --back: #fbfbf9; --card: #fff; --ink: #1d2126; --soft: #626a73; --line: #dfdfd9; --main: #2f6db3;
  --tint: #d6e4f4; --good: #2d7d46; --bad: #b23a34; --heat: 47, 109, 179; }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --card: #1d2126; --ink: #e7e9ec; --soft: #9aa3ad; --line: #363c44;
  --main: #74aae6; --tint: #24415f; --good: #6cc287; --bad: #ef8a83; --heat: 116, 170, 230; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -.01em; } h2 { font-size: 1.15rem; margin: 0 0 .5rem; } h3 { font-size: .95rem; margin: 0; }
section { margin: 2.4rem 0 0; } .note { color: var(--soft); margin: .1rem 0 .8rem; max-width: 52rem; } small { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin-top: 1.4rem; }
.tile, .card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: .8rem 1rem; } .tile b { display: block; font-size: 1.55rem; font-weight: 600; line-height: 1.25; }
.tile span { color: var(--soft); font-size: .86rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; font-size: .84rem; text-align: left; vertical-align: bottom; }
th, td { padding: .34rem .8rem .34rem 0; border-bottom: 1px solid var(--line); }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; padding: .34rem 0 .34rem .8rem; white-space: nowrap; }
.numbers th.share, .numbers td.share { text-align: left; padding-left: 1.6rem; } td.share { min-width: 11rem; }
td.share span { display: block; padding: .05rem .4rem; border-radius: 3px;
  background: linear-gradient(to right, var(--tint) var(--part), transparent var(--part)); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .9rem; }
figure { margin: 0; padding: .8rem .9rem .5rem; } figcaption { display: flex; justify-content: space-between; gap: .6rem; align-items: baseline; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .raw { stroke: var(--main); opacity: .3; } svg .line { stroke: var(--main); stroke-width: 1.8; }
svg path { fill: none; } .heat { border-collapse: separate; border-spacing: 2px; width: auto; }
.heat td, .heat th { border: 0; padding: 0; width: 2.5rem; height: 1.9rem; text-align: center; vertical-align: middle; border-radius: 3px; }
.heat td { background: rgba(var(--heat), var(--a)); } .heat th.side { width: auto; padding-right: .6rem; text-align: right; }
.heat td.none { color: var(--line); } .heat td.strong { color: #fff; }
@media (prefers-color-scheme: dark) { .heat td.strong { color: #0d1116; } }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr)); gap: .9rem; }
.card { overflow: hidden; break-inside: avoid; display: flex; flex-direction: column; }
.card .picture { background: var(--back); border-bottom: 1px solid var(--line); }
.card img { display: block; width: 100%; height: 8.5rem; object-fit: contain; image-rendering: pixelated; }
.card div.words { padding: .6rem .8rem .8rem; overflow-wrap: anywhere; } .card p { margin: .2rem 0; }
.card .kind { display: flex; justify-content: space-between; font-size: .8rem; color: var(--soft); }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .6rem; margin: .4rem 0 0; font-size: .92rem; }
.card dt { color: var(--soft); } .card dd { margin: 0; white-space: pre-wrap; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--main); }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; font-size: .8rem;
  line-height: 1.4; }
@media print { :root { --back: #fff; } main { max-width: none; padding: 0; } body { font-size: 11pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, .tile, tr, .heat { break-inside: avoid; } h2, .note { break-after: avoid; } .tiles { grid-template-columns: repeat(4, 1fr); }
  .scroll { overflow: visible; } .tile b { font-size: 14pt; } table { font-size: 8pt; } th { font-size: 7.5pt; } section { margin-top: 1.4rem; }
  .numbers th:not(:first-child), .numbers td:not(:first-child) { padding-left: .3rem; } td.share { min-width: 7rem; }
  .cards { grid-template-columns: repeat(4, 1fr); } .charts { grid-template-columns: repeat(3, 1fr); } details { display: none; } }
"""
