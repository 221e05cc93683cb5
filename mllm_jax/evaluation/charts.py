"""Drawings of the report: a curve as inline SVG, and a table of counts as a heat map."""

import math
from collections.abc import Sequence

import numpy as np

from mllm_jax.evaluation.html import Raw, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 370, 210, 44, 10, 10, 26
POINTS = 240                            # more of them are averaged in groups


def curve(steps: Sequence[float], values: Sequence[float], *, label: str) -> Raw:
    """What was logged, faintly, and its moving average, over steps; a logarithmic axis where values span 30-fold."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    keep = np.isfinite(y)
    x, y = _thinned(x[keep], y[keep])
    if not len(x):
        return Raw('<p class="note">nothing was logged</p>')
    smooth = _smoothed(y, len(y) // 20 + 1)
    log = y.min() > 0 and y.max() / y.min() > 30
    low, high = (y.min(), np.quantile(y, 0.995) if log else max(y.max(), y.min() + 1e-9))
    low = low if log or low > 0.4 * high else min(low, 0.0)
    place = (lambda v: np.log10(np.maximum(v, 1e-12))) if log else (lambda v: v)
    ticks = _decades(low, high) if log else _ticks(low, high)
    bottom, top = place(np.float64(ticks[0])), place(np.float64(ticks[-1]))
    first, last = x[0], max(x[-1], x[0] + 1)
    at_x = lambda v: LEFT + np.clip((v - first) / (last - first), 0, 1) * (WIDTH - LEFT - RIGHT)
    at_y = lambda v: TOP + (top - place(np.clip(v, ticks[0], ticks[-1]))) / max(top - bottom, 1e-12) * (HEIGHT - TOP - BOTTOM)
    path = lambda v: "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(at_x(x), at_y(v), strict=True))
    rows = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(np.float64(t)):.1f}" y2="{at_y(np.float64(t)):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{at_y(np.float64(t)) + 4:.1f}" text-anchor="end">{t:.4g}</text>' for t in ticks)
    anchor = lambda t: "end" if at_x(t) > WIDTH - 40 else "middle"         # or it would be cut off at the border
    columns = "".join(
        f'<text x="{at_x(t):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor(t)}">{t:,.0f}</text>'
        for t in _ticks(first, last, 5) if t <= last + 0.02 * (last - first))
    return Raw(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}"><title>{text(label)}</title>{rows}{columns}'
        f'<path class="raw" d="{path(y)}"/><path class="line" d="{path(smooth)}"/></svg>')


def heat(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Raw:
    """Counts with truth down and prediction across; shades are parts of a row.  The last column is for all else."""
    names = [*labels, "other"] if any(row[-1] for row in counts) else list(labels)
    head = "<tr><th></th>" + "".join(f"<th>{text(n)}</th>" for n in names) + "</tr>"
    body = ""
    for label, row in zip(labels, counts, strict=True):
        total = max(sum(row), 1)
        kind = lambda n, total=total: "none" if not n else "strong" if n / total > 0.5 else "some"
        cells = "".join(
            f'<td class="{kind(n)}" style="--a:{(n / total) ** 0.6:.2f}">{n or "·"}</td>' for n in row[: len(names)])
        body += f'<tr><th class="side">{text(label)}</th>{cells}</tr>'
    return Raw(f'<div class="scroll"><table class="heat"><thead>{head}</thead><tbody>{body}</tbody></table></div>')


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])


def _smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of up to `window` points on both sides; fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    reach = np.minimum(np.minimum(at, len(y) - 1 - at), window)
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def _ticks(low: float, high: float, n: int = 4) -> list[float]:
    """Round numbers around [low, high], about n of them."""
    raw = max(high - low, 1e-12) / n
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    return [round(k * step, 12) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    each = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [10.0**k for k in each]
