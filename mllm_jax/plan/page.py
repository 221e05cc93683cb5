"""A plan as one HTML page that stands alone."""

from collections.abc import Iterable

from mllm_jax.chips import GIB
from mllm_jax.evaluation import html
from mllm_jax.evaluation.html import Raw, duration, percent, section, share, short, table, text
from mllm_jax.plan.report import SMALL, Plan, audited, feeding, said, seconds, size

COLOURS = ("#2f6db3", "#4f9d8f", "#8a6fb0", "#d08a3c", "#b23a34", "#8b949e", "#5b7f2b", "#c46b9a")
STYLE = """<style>
.bar { display: flex; height: 1.6rem; border-radius: 6px; overflow: hidden; background: var(--line); margin: .8rem 0 .5rem; }
.bar i { display: block; min-width: 1px; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin-bottom: 1rem; font-size: .88rem; color: var(--soft); }
.key i { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .4rem; vertical-align: -1px; }
</style>"""


def page(p: Plan) -> str:
    title = f"{p.recipe}, stage {p.stage}, on {p.on}"
    shape = ", ".join(f"{k} {n}" for k, n in p.mesh.items() if n > 1) or "one chip"
    head = Raw(f'{STYLE}<header><h1>{text(title)}</h1><p class="note">{p.chips} chips of {p.on.hosts} hosts; mesh {text(shape)}; {p.layout.dtype}, '
               f'quantize {p.layout.quantize}, remat {p.layout.remat}, microbatches {p.layout.microbatches}. '
               f'A step is {p.rows} rows of {p.seq_len:,} positions. '
               f'{short(p.parameters)} parameters, {short(p.trained)} of them train.</p>{_tiles(p)}</header>')
    if not p.fits:
        why = section("It does not fit", f"<p>{text(said(p.refusal))}.</p>",
                      note=f"Parameters and optimizer take {size(p.state_bytes)} of each chip; the rest are activations and temporaries.")
        return html.page(title, head, why)
    return html.page(title, head, _memory(p), _time(p), _collectives(p), _input(p), _operations(p))


def _tiles(p: Plan) -> Raw:
    if not p.fits:
        tiles = [("no", "fits"), (size(p.state_bytes), "of parameters and optimizer on a chip")]
    else:
        e = p.estimate
        tiles = [(size(p.memory.total), f"of {p.on.chip.hbm / GIB:.0f} GiB on each chip: it fits"),
                 (seconds(e.seconds), f"a step, {seconds(e.low)} to {seconds(e.high)}"),
                 (percent(p.mfu(e.seconds)), f"MFU, {percent(p.mfu(e.high))} to {percent(p.mfu(e.low))}"),
                 (f"{p.rows * p.seq_len / p.step_seconds:,.0f}", "tokens/s"),
                 *((f"{p.rows * n / p.step_seconds:,.0f}", f"{k}s/s") for k, n in p.images.items() if n),
                 (p.bound, "is what bounds it")]
        if p.cost is not None:
            tiles.append((f"{p.cost:,.2f}", f"for a million examples, at {p.options.price:g} for a chip and hour"))
    boxes = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in tiles)
    return Raw(f'<div class="tiles">{boxes}</div>')


def _bar(parts: Iterable[tuple[str, float, str]], whole: float) -> Raw:
    """(name, size, how it is written) side by side, of a whole."""
    parts = [(part, COLOURS[k % len(COLOURS)]) for k, part in enumerate(parts)]
    pieces = "".join(f'<i style="width:{100 * size / whole:.2f}%;background:{colour}"></i>' for (_, size, _), colour in parts)
    keys = "".join(f'<span><i style="background:{colour}"></i>{text(name)} {text(written)}</span>' for (name, _, written), colour in parts)
    return Raw(f'<div class="bar">{pieces}</div><div class="key">{keys}</div>')


def _memory(p: Plan) -> Raw:
    kinds = [(k, v, size(v)) for k, v in p.memory.by_kind().items() if v >= SMALL]
    return section("Memory of a chip", _bar(kinds, max(p.on.chip.hbm, p.memory.total)), note=(
        "Arguments and the sum of temporaries are the compiler's; which of these are gradients, and which are activations kept "
        "for the backward pass, is read from its schedule."))


def _time(p: Plan) -> Raw:
    e = p.estimate
    units = [(k, v, f"{seconds(v)}, {percent(v / e.seconds)}") for k, v in e.by_unit().items()]
    rows = [(k, seconds(v), share(v / e.seconds)) for k, v in e.by_kind().items() if v > 1e-4 * e.seconds]
    return section("Time of a step", _bar(units, e.seconds), table(("spent on", "", "of the step"), rows), note=(
        f"The model needs {short(p.model_flops, 'FLOP')}; the program does {e.flops * p.chips / p.model_flops:.2f} times as many, with what it "
        f"computes again. Each chip moves {short(e.hbm_bytes, 'B')} to and from its memory. Right to some 15 %."))


def _collectives(p: Plan) -> Raw:
    found = sorted(p.estimate.traffic.items(), key=lambda kv: -kv[1].bytes)
    if not found:
        return Raw("")
    rows = [(kind, "+".join(axes) + (", between slices" if t.dcn else ""), f"{t.bytes / 1e9:.3f}", seconds(t.busy), seconds(t.exposed),
             f"{t.count:.0f}") for (kind, axes), t in found]
    return section("Between chips", table(("collective", "along", "GB sent by a chip", "wires busy", "core waits", "times"), rows))


def _input(p: Plan) -> Raw:
    lines = [*feeding(p), *audited(p), *(f"assumed: {note}" for note in p.estimate.notes),
             f"compiled in {duration(p.compile_seconds)}"]
    return section("Input, audit, assumptions", "<ul>" + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>")


def _operations(p: Plan, most: int = 20) -> Raw:
    e, peak = p.estimate, p.on.chip.peak
    found = sorted(e.spent.items(), key=lambda kv: -kv[1].seconds)[:most]
    rows = [(Raw(f"<code>{text(name[:40])}</code>"), kind, seconds(s.seconds), percent(s.seconds / e.seconds), f"{s.count:.0f}",
             percent(s.flops / s.seconds / peak) if s.flops else "", Raw(f"<small>{text('/'.join(s.source.split('/')[-3:])[-70:])}</small>"))
            for (kind, name), s in found]
    return section("What takes longest", table(("operation", "kind", "time", "of the step", "times", "of peak", "from"), rows))
