"""What a stage's data looks like, and the row length and room for media that fit it.

Lengths are those of real sequences, after template, tokenizer and connector, and the fill of rows is that of really
packing them: an estimate from mean lengths is wrong where it matters, at the long end.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field, replace
from typing import Any

import numpy as np

from mllm_jax.data.errors import BadExample
from mllm_jax.data.pack import RowSpec, pack, rooms, row_spec, unit
from mllm_jax.data.pack import trained as trained_of
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenize import encode
from mllm_jax.types import Sequence, record

LENGTHS = (64, 77, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768)
MOST_DROPPED = 0.03
MOST_FULL, ROUND = 0.99, 64             # what a limit of trained positions may cost, and of what it is a multiple
_WIDTH = 44                             # characters of the longest bar


@record
class Measured:
    """A sample of one source."""

    name: str
    records: int                        # in the whole source
    weight: float
    sequences: tuple[Sequence, ...]
    sizes: tuple[tuple[int, int], ...] = ()             # (height, width) of images
    bad: Mapping[str, int] = field(default_factory=dict)        # reason -> examples
    first_bad: Mapping[str, str] = field(default_factory=dict)  # reason -> the message of the first


def measure(
    name: str, source: Any, weight: float, *, template: Template, towers: Mapping[str, Any], seq_len: int,
    limit: int = 1000,
) -> Measured:  # fmt: skip
    """The sequences of up to `limit` examples, evenly spread over the source, not cut and not packed.

    `seq_len` matters for pairs alone, whose template fills a row.
    """
    sequences, sizes = [], []
    bad: Counter[str] = Counter()
    first_bad: dict[str, str] = {}
    for i in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)).tolist():
        try:
            example = source[i]
            sequence = encode(
                example, template=template, tokenizer=template.tokenizer, towers=towers,
                max_len=seq_len if template.pairs else None,
            )  # fmt: skip
            sizes += [item.cut.size for item in sequence.items if item.blob.kind == "image"]
            sequences.append(sequence)
        except BadExample as error:
            bad[error.reason] += 1
            first_bad.setdefault(error.reason, str(error))
    return Measured(
        name=name, records=len(source), weight=weight, sequences=tuple(sequences), sizes=tuple(sizes), bad=bad,
        first_bad=first_bad,
    )  # fmt: skip


def report(
    measured: list[Measured], towers: Mapping[str, Any], *, seq_len: int, items: Mapping[str, int], pad: int,
    trained: int | None = None,
) -> Iterator[str]:
    """Lines of text: histograms for each source, then what rows would hold, then a recommendation."""
    for one in measured:
        yield f"{one.name}: {one.records} records, weight {one.weight:g}; {len(one.sequences)} measured"
        for reason, count in one.bad.items():
            yield f"  bad: {count} x {reason}, for example {one.first_bad[reason]}"
        if not one.sequences:
            continue
        yield from histogram("positions of an example", [len(s) for s in one.sequences])
        yield f"  trained: {sum(map(trained_of, one.sequences)) / sum(len(s) for s in one.sequences):.1%} of the positions"
        for modality, tower in towers.items():
            yield from histogram(f"{unit(modality, tower)} of an example", _rooms(one.sequences, modality), whole=not tower.view.packed)
        if one.sizes:
            yield from histogram("shorter side of an image, pixels", [min(size) for size in one.sizes])
        if films := [item.cut for s in one.sequences for item in s.items if item.blob.kind == "video"]:
            yield from histogram("seconds of a video", [round(len(cut.seconds) * cut.every) for cut in films])
            yield from histogram("moments of a video that are seen", [len(cut.seconds) for cut in films])
        yield ""
    sample = mixed(measured)
    if not sample:
        yield "nothing could be measured"
        return
    if all(s.items and not any((slot >= 0).any() for slot in s.slots.values()) for s in sample) and len({len(s) for s in sample}) == 1:
        yield f"Every example fills a row of its own ({len(sample[0])} positions); there is nothing to pack."
        return
    advice = recommend(sample, towers)
    yield f"Rows of the mixture ({len(sample)} examples, packed):"
    yield f"  {'seq_len':>8} {'media':>12} {'dropped':>8} {'filled':>8} {'examples a row':>15}"
    specs = {f"{n}": row_spec(n, _room_for(sample, n, towers), towers, pad) for n in _around(advice[0])}
    specs[f"now {seq_len}"] = row_spec(seq_len, items, towers, pad, trained)
    for label, spec in specs.items():
        dropped, filled, each = fill(sample, spec)
        media = " ".join(f"{m}={s.items}" for m, s in spec.media.items()) or "none"
        yield f"  {label:>8} {media:>12} {dropped:>8.1%} {filled:>8.1%} {each:>15.1f}"
    room = "".join(f" data.items.{m}={n}" for m, n in advice[1].items())
    most = recommend_trained(sample, row_spec(*advice, towers, pad))
    yield f"Recommended: data.seq_len={advice[0]}{room}" + (f" data.trained={most}" if most else "")


def recommend(sequences: Iterable[Sequence], towers: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """(row length, items of each modality): the best filled row that drops less than 3 % of these sequences.

    Rows of up to four times the shortest possible one are tried; a longer one must fill at least 1 % more.
    """
    sequences = list(sequences)
    enough = np.quantile([len(s) for s in sequences], 1 - MOST_DROPPED, method="higher")
    lengths = [n for n in LENGTHS if n >= enough] or [int(enough)]
    best: tuple[float, int, dict[str, int]] | None = None
    for n in [n for n in lengths if n <= 4 * lengths[0]]:
        items = _room_for(sequences, n, towers)
        dropped, filled, _ = fill(sequences, row_spec(n, items, towers, 0))
        if dropped < MOST_DROPPED and (best is None or filled > best[0] + 0.01):
            best = filled, n, items
    if best is None:                    # the 3 % that are too long and those with too many media are not the same
        longest = max(len(s) for s in sequences)
        n = next((n for n in LENGTHS if n >= longest), longest)
        return n, _room_for(sequences, n, towers)
    return best[1], best[2]


def recommend_trained(sequences: Iterable[Sequence], spec: RowSpec) -> int | None:
    """The most trained positions of a row: as many as nearly every row has, if rows of them alone are filled as well.

    None where that is no less than three quarters of a row: then nothing is saved by a limit.
    """
    sequences = [s for s in sequences if _fits(s, spec)]
    counts = [int(np.count_nonzero(row.weights)) for row in pack(sequences, spec)]
    filled = fill(sequences, spec)[1]
    for part in (0.9, 0.97, 1.0):
        most = -(-int(np.quantile(counts, part, method="higher")) // ROUND) * ROUND
        dropped, full, _ = fill(sequences, replace(spec, trained=min(most, spec.seq_len)))
        if dropped <= 1 - MOST_FULL and full >= filled * MOST_FULL:
            return most if most <= 0.75 * spec.seq_len else None
    return None


def fill(sequences: Iterable[Sequence], spec: RowSpec) -> tuple[float, float, float]:
    """(part of the sequences that does not fit a row, part of the positions that is filled, examples of a row)."""
    sequences = list(sequences)
    fitting = [s for s in sequences if _fits(s, spec)]
    dropped = len(sequences) - len(fitting)
    rows = list(pack(fitting, spec))
    if not rows:
        return 1.0, 0.0, 0.0
    real = sum(len(s) for s in fitting)
    return dropped / (dropped + len(fitting)), real / (len(rows) * spec.seq_len), len(fitting) / len(rows)


def _fits(sequence: Sequence, spec: RowSpec) -> bool:
    try:
        spec.check(sequence)
    except BadExample:
        return False
    return True


def mixed(measured: list[Measured]) -> list[Sequence]:
    """Sequences of all sources in the proportion of their weights, interleaved as training would."""
    usable = [one for one in measured if one.sequences]
    if not usable:
        return []
    scale = min(len(one.sequences) / one.weight for one in usable)
    placed = []
    for one in usable:
        count = max(1, round(scale * one.weight))
        placed += [((i + 0.5) / count, one.name, i, one.sequences[i]) for i in range(min(count, len(one.sequences)))]
    return [sequence for *_, sequence in sorted(placed, key=lambda p: p[:3])]


def histogram(title: str, values: list[int], *, whole: bool = False) -> Iterator[str]:
    """Lines with bars: one for each value if `whole`, otherwise at most ten ranges between the extremes.

    Ranges are equally wide, or where the values differ by more than a factor of ten, each wider by the same factor.
    """
    values = np.asarray(values)
    low, middle, high, most = (int(np.quantile(values, q, method="nearest")) for q in (0, 0.5, 0.95, 1))
    yield f"  {title}: {low} to {most}, median {middle}, 95 % up to {high}"
    if low == most:
        return
    if whole and most - low < 12:
        edges = np.arange(low, most + 2)
        labels = [str(edge) for edge in edges[:-1]]
    else:
        wide = -(-(most + 1 - low) // 10)
        even = np.append(np.arange(low, most + 1, wide), most + 1)
        edges = np.unique(np.round(np.geomspace(low, most + 1, 11)).astype(int)) if 0 < 10 * low < most else even
        labels = [f"{a}" if b - a == 1 else f"{a}-{b - 1}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    counts, _ = np.histogram(values, edges)
    for label, count in zip(labels, counts, strict=True):
        bar = "#" * max(int(count > 0), round(_WIDTH * count / counts.max()))
        yield f"    {label:>12} {count:>6} {bar}".rstrip()


def _around(n: int) -> list[int]:
    at = LENGTHS.index(n) if n in LENGTHS else None
    return [n] if at is None else list(LENGTHS[max(0, at - 1) : at + 3])


def _room_for(sequences: list[Sequence], n: int, towers: Mapping[str, Any]) -> dict[str, int]:
    """Media that a full row of n positions holds: for the mean share of them, and for nearly every single example."""
    positions = sum(len(s) for s in sequences)
    room = {}
    for modality in towers:
        counts = _rooms(sequences, modality)
        each = int(np.quantile(counts, 1 - MOST_DROPPED, method="higher"))
        room[modality] = max(1, each, int(np.ceil(n * sum(counts) / positions)))
    return room


def _rooms(sequences: Iterable[Sequence], modality: str) -> list[int]:
    return [rooms(s).get(modality, 0) for s in sequences]
