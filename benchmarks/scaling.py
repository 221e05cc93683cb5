"""From 16 chips to 6,144: what each chip sends along every axis of the mesh, and how fast a step stays.

    python benchmarks/scaling.py                    what docs/scaling.jsonl has not yet; then docs/scaling.md and docs/scaling.svg
    python benchmarks/scaling.py --chips 16 64 --out scaling.jsonl --page scaling.md --plot scaling.svg
    python benchmarks/scaling.py --print            only the table

LLaVA-1.5 of 7 billion parameters, stage 2, rows of 4,096 positions with 4 images, as many as chips, on slices of v5p.  Compiled as
`train` runs it, without machine code (mllm_jax/plan/passes.py), and kept as they are made (plans.py).
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import plans  # noqa: E402
from benchmarks.plans import Job, Row, key  # noqa: E402

FILE, PAGE, PLOT = (ROOT / "docs" / f"scaling.{kind}" for kind in ("jsonl", "md", "svg"))
RECIPE, STAGE = "projector/llava_15", "instruct"
SHAPE = {"seq_len": 4096, "items.image": 4}
REMAT = "qkv+attention+mlp"
SLICES = {16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8", 1024: "v5p:8x8x16", 6144: "v5p:16x16x24"}
# Ways to use n chips, each a mesh of data, fsdp and tensor; those that a number of chips does not allow are left out.
WAYS = {
    "fsdp": lambda n: (1, n, 1),
    "data x fsdp 64": lambda n: (n // 64, 64, 1),
    "fsdp x tensor 4": lambda n: (1, n // 4, 4),
    "data x fsdp 64 x tensor 4": lambda n: (n // 256, 64, 4),
    "data x fsdp 16": lambda n: (n // 16, 16, 1),
    "data x fsdp 256": lambda n: (n // 256, 256, 1),
}
WIDTH = 4096                            # of the decoder, which is what fsdp splits
COLOURS = ("#2f6db3", "#d08a3c", "#4f9d8f", "#b23a34", "#8a6fb0", "#8b949e")


def jobs(chips: Sequence[int], flags: str = "auto") -> Iterator[tuple[int, str, Job]]:
    """(chips, way, what to plan); two ways may be one mesh."""
    for n in chips:
        for way, mesh_of in WAYS.items():
            mesh = mesh_of(n)
            if math.prod(mesh) == n and WIDTH % mesh[1] == 0:
                yield n, way, {"topology": SLICES[n], "mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)), "flags": flags}


def one(job: Job) -> Row:
    from mllm_jax.config import load
    from mllm_jax.launch import layouts
    from mllm_jax.plan.passes import quick
    from mllm_jax.plan.report import Options
    from mllm_jax.plan.topology import topology

    on = topology(job["topology"])
    shape = SHAPE | {"batch_size": len(on.devices)}
    recipe = load(RECIPE, *(f"stages.{STAGE}.data.{field}={value}" for field, value in shape.items()))
    words = ",".join([f"auto:remat={REMAT},flags={job['flags']}", *(f"mesh.{axis}={n}" for axis, n in job["mesh"].items())])
    return plans.summary(quick(RECIPE, recipe, STAGE, on, layouts.find(words, "tpu"), Options(measure=0)))


def table(rows: Mapping[str, Row], todo: Sequence[tuple[int, str, Job]]) -> Iterator[str]:
    """Markdown: a program in a line, with the bytes that a chip sends along each axis."""
    axes = ("data", "fsdp", "tensor")
    yield "| chips | mesh | HBM, GiB | sent along data, fsdp, tensor, GB | wires busy | core waits | step | MFU |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for n, job in {key(job): (n, job) for n, _, job in todo}.values():
        mesh = " ".join(f"{k}={size}" for k, size in job["mesh"].items() if size > 1)
        row = rows.get(key(job))
        if why := plans.lacks(row):
            yield f"| {n:,} | {mesh} | {why} | | | | | |"
            continue
        sent, busy, waits = sent_along(row)
        yield (f"| {n:,} | {mesh} | {row['hbm_gib']:.1f} | {', '.join(f'{sent[a]:.1f}' for a in axes)} | {1e3 * busy:.0f} ms | "
               f"{1e3 * waits:.0f} ms | {1e3 * row['step']:.0f} ms | {100 * row['mfu']:.1f} % |")


def sent_along(row: Row) -> tuple[Counter, float, float]:
    """({axis: GB that a chip sends}, s of the wires, s that the core waits); what goes along two axes counts to the last."""
    sent: Counter[str] = Counter()
    for _, axes, _, gigabytes, *_ in row["sent"]:
        sent[axes.split("+")[-1]] += gigabytes
    return sent, sum(x[4] for x in row["sent"]), sum(x[5] for x in row["sent"])


def plot(rows: Mapping[str, Row], todo: Sequence[tuple[int, str, Job]]) -> str:
    """MFU over chips, a line for each way, as SVG; for light and dark pages."""
    width, height, left, right, top, bottom = 760, 380, 52, 190, 16, 44
    lines: dict[str, list[tuple[int, float]]] = {}
    for n, way, job in todo:
        if (row := rows.get(key(job))) and row.get("fits"):
            lines.setdefault(way, []).append((n, 100 * row["mfu"]))
    chips = sorted({n for n, *_ in todo})
    worst, best = (f(v for line in lines.values() for _, v in line) for f in (min, max)) if lines else (0, 100)
    low, high = 10 * math.floor(worst / 10), 10 * math.ceil(best / 10)
    low -= 10 * (low == high)
    first, last = math.log2(chips[0]), math.log2(chips[-1])
    x = lambda n: left + (math.log2(n) - first) / max(last - first, 1e-9) * (width - left - right)
    y = lambda v: top + (high - v) / (high - low) * (height - top - bottom)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="13">',
           "<style>text { fill: #626a73 } .grid { stroke: #9aa3ad; stroke-opacity: .35 } path { fill: none; stroke-width: 2 }</style>"]
    for v in range(low, high + 1, 10 if high - low > 20 else 5):
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
                   f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v} %</text>')
    out += [f'<text x="{x(n):.1f}" y="{height - 24}" text-anchor="middle">{n:,}</text>' for n in chips]
    out.append(f'<text x="{(left + width - right) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
               "chips of v5p, a row of 4,096 positions for each</text>")
    # Names beside the ends of lines, pushed apart where they would touch.
    at = 0.0
    for way, points in sorted(lines.items(), key=lambda kv: -kv[1][-1][1]):
        colour = COLOURS[list(WAYS).index(way)]
        out.append(f'<path d="M{"L".join(f"{x(n):.1f} {y(v):.1f}" for n, v in points)}" stroke="{colour}"/>')
        out += [f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3.5" fill="{colour}"/>' for n, v in points]
        at = max(at + 18, y(points[-1][1]) + 4)
        out.append(f'<text x="{width - right + 12}" y="{at:.1f}" style="fill:{colour}">{way}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    if plans.alone(one):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", type=int, default=list(SLICES), choices=list(SLICES), metavar="N", help="16, 64, 256, 1024, 6144")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--plot", type=Path, default=PLOT, metavar="FILE", help="where the plot is written (docs/scaling.svg)")
    parser.add_argument("--flags", default="auto", metavar="SETS", help="flags of XLA's compiler (docs/performance.md); none hides no collective")
    plans.add_arguments(parser, FILE, PAGE)
    args = parser.parse_args()
    todo = [x for x in jobs(args.chips, args.flags) if x[1] in args.ways]
    made = lambda: list(table(plans.read(args.out), todo))
    if args.print:
        print("\n".join(made()))
        return
    order = sorted(todo, key=lambda x: list(WAYS).index(x[1]))
    plans.make(Path(__file__), [job for *_, job in order], args.out, args.jobs, 60 * args.limit, args.again)
    plans.put(args.page, made())
    args.plot.write_text(plot(plans.read(args.out), todo))


if __name__ == "__main__":
    main()
