"""Every recipe in full size on chips of every kind: does its heaviest stage fit, how fast is it, and what bounds it?

    python benchmarks/plan_recipes.py                       what docs/plans.jsonl has not yet, small recipes first; then docs/plans.md
    python benchmarks/plan_recipes.py --whole               the same layouts with machine code, where there is none yet
    python benchmarks/plan_recipes.py --recipes projector/llava_15 --topologies v5e:8x8 2*v5e:8x8 --out plans.jsonl --page plans.md
    python benchmarks/plan_recipes.py --print               only the tables

The step that `train` runs is compiled for the topology (mllm_jax/plan).  The batch is the recipe's, or where that does not divide
over the chips, even with rows split in pieces of 512 positions, the next larger one that does.  A pair takes half a minute, with
machine code one to ten minutes, so they are kept as they are made (plans.py), and those that are missing are said to be missing.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import plans  # noqa: E402
from benchmarks.plans import Job, Row, key  # noqa: E402

FILE, PAGE = ROOT / "docs" / "plans.jsonl", ROOT / "docs" / "plans.md"
TOPOLOGIES = ("v5e:8x8", "v5p:4x4x4", "v6e:8x8", "2*v5e:8x8", "v4:4x4x4", "v5e:16x16")
POSITIONS = 8192                        # of rows and of patches that a chip of 16 GiB works on at once, to begin with
LONGEST = 4                             # times as much is worked on of a row before it is split over chips
SHORTEST = 512                          # positions of a row that a chip has, where rows are split because they are few
KEEP = "qkv+attention+mlp"              # what layers keep where there is room


def job_of(recipe: str, topology: str, tiny: bool = False) -> Job:
    slices, _, name = topology.rpartition("*")
    return {"recipe": recipe, "topology": name, "slices": int(slices or 1)} | ({"tiny": True} if tiny else {})


def one(job: Job) -> Row:
    """The plan of the heaviest stage, under a layout that fits, if there is one."""
    from mllm_jax.config import load, override
    from mllm_jax.plan.topology import topology

    if found := job.get("found"):
        return whole(job, found)
    on, recipe = topology(job["topology"], job["slices"]), load(job["recipe"], tiny=job.get("tiny", False))
    stage = heaviest(recipe)
    paper = recipe.stages[stage].data.batch_size
    rows, words = choose(recipe, stage, on)
    recipe = override(recipe, f"stages.{stage}.data.batch_size={rows}")
    for made in attempts(job["recipe"], recipe, stage, on, words):
        if made.fits:
            break
    return plans.summary(made) | {"paper_rows": paper}


def whole(job: Job, row: Row) -> Row:
    """The same with machine code, under the layout that was found."""
    from mllm_jax.config import load
    from mllm_jax.launch import layouts
    from mllm_jax.plan.report import Options, plan
    from mllm_jax.plan.topology import topology

    stage, base = row["stage"], layouts.find("auto", "tpu")
    on = topology(job["topology"], job["slices"])
    recipe = load(job["recipe"], f"stages.{stage}.data.batch_size={row['rows']}", tiny=job.get("tiny", False))
    layout = replace(base, mesh=row["mesh"] | {"data": row["mesh"]["data"] // on.slices}, slices=on.slices, remat=row["remat"],
                     microbatches=row["microbatches"])
    return plans.summary(plan(job["recipe"], recipe, stage, on, layout, Options(measure=0))) | {"paper_rows": row["paper_rows"]}


def attempts(name: str, recipe: Any, stage: str, on: Any, words: Sequence[str]) -> Iterator[Any]:
    """Plans, one after another: of what `plan --search` finds best, and then of these layouts, which are small in other ways."""
    from mllm_jax.launch import layouts
    from mllm_jax.plan.passes import quick
    from mllm_jax.plan.report import Options
    from mllm_jax.plan.search import Wanted, search

    options = Options(measure=0)
    if "context" not in words[0]:               # else that is known already
        found = search(name, recipe, stage, on, layouts.find("auto", "tpu"), options, Wanted(most=2, jobs=1))
        yield from (c.plan for c in found if c.plan)
    for each in words:
        yield quick(name, recipe, stage, on, layouts.find(each, "tpu"), options)


def heaviest(recipe: Any) -> str:
    """The stage with most work for a row; a batch of more rows goes over more chips, or in parts."""
    import jax

    from mllm_jax.data.pack import row_spec
    from mllm_jax.sharding import Layout
    from mllm_jax.train.adapters import model_of, trained_of
    from mllm_jax.train.flops import full_counts, step_flops
    from mllm_jax.train.state import Blueprint

    def work(name: str) -> float:
        stage, model, layout = recipe.stages[name], model_of(recipe, name), Layout()
        trained = trained_of(stage, Blueprint(model, layout, layout.make_mesh(jax.devices("cpu")[:1])).shapes)
        data = stage.data
        spec = row_spec(data.seq_len, data.items, model.inputs, 0, data.trained)
        return step_flops(model, trained, full_counts(1, spec, model.inputs))

    return max(reversed(recipe.stages), key=work)


def choose(recipe: Any, stage: str, on: Any) -> tuple[int, list[str]]:
    """(rows of the batch, layouts in words, the best first); chips of a slice share the parameters, and rows that are few or long."""
    from mllm_jax.data.pack import row_spec
    from mllm_jax.train.adapters import model_of

    data, model, chips = recipe.stages[stage].data, model_of(recipe, stage), len(on.devices)
    spec = row_spec(data.seq_len, data.items, model.inputs, 0, data.trained)
    patches = sum(room.items * (1 if model.inputs[m].view.packed else math.prod(model.inputs[m].nominal.grid)) for m, room in spec.media.items())
    length, at_once = data.seq_len + patches, POSITIONS * on.chip.hbm / 2**34
    splits = [1]
    while kept(model) < math.inf and data.seq_len % (4 * splits[-1]) == 0 and data.seq_len >= 2 * splits[-1] * SHORTEST:
        splits.append(2 * splits[-1])
    fitting = [c for c in splits if length <= c * LONGEST * at_once] or splits[-1:]
    context = next((c for c in fitting if data.batch_size % (chips // c) == 0), fitting[0])
    groups = chips // context
    rows = -(-data.batch_size // groups)
    parts = [m for m in range(1, rows + 1) if rows % m == 0]
    first = next((k for k, m in enumerate(parts) if rows // m * length <= context * at_once), len(parts) - 1)
    name = "auto:" + (f"mesh.context={context}," if context > 1 else "")
    out = [f"{name}remat=full,microbatches={m}" for m in dict.fromkeys((parts[first], parts[(first + len(parts)) // 2], parts[-1]))]
    # As long as what layers keep takes less than a third of a chip, nothing but the cheap rest is computed again.
    if kept(model) * rows // parts[first] * data.seq_len < context * on.chip.hbm / 3:
        out.insert(0, f"{name}remat={KEEP},microbatches={parts[first]}")
    return rows * groups, out


def kept(model: Any) -> float:
    """Bytes that the layers of the decoder keep of a position under KEEP, in bfloat16 (nn/remat.py); inf where there is no decoder."""
    from mllm_jax.train.adapters import plain

    cfg = getattr(plain(model), "decoder", None)
    if cfg is None:
        return math.inf
    groups = (cfg.kv_heads or cfg.heads) / cfg.heads
    return 2 * cfg.depth * ((2 + 2 * groups) * cfg.width + (1 + cfg.gated) * cfg.mlp)


def tables(rows: Mapping[str, Row], recipes: Sequence[str], topologies: Sequence[str], tiny: bool = False) -> Iterator[str]:
    """Markdown: an overview of all pairs, then each that there is."""
    found = {(r, t): rows.get(key(job_of(r, t, tiny))) for r in recipes for t in topologies}
    there = [row for row in found.values() if row]
    fit = [row for row in there if row.get("fits")]
    coded = sum(bool(row.get("machine_code")) for row in fit)
    versions = sorted({f"jax {row['jax']}, libtpu {row['libtpu']}" for row in there}) or ["nothing compiled"]
    yield (f"{len(there)} of {len(found)} pairs were compiled ({'; '.join(versions)}), {coded} of them to machine code; {len(fit)} fit. "
           "A cell is estimated MFU, and memory of a chip in GiB; – is not compiled yet.")
    yield ""
    yield f"| recipe, stage | {' | '.join(t.replace('*', ' x ') for t in topologies)} |"
    yield f"| --- | {' | '.join('---:' for _ in topologies)} |"
    for r in recipes:
        stage = next((found[r, t]["stage"] for t in topologies if found[r, t] and "stage" in found[r, t]), "")
        yield f"| {f'{r} {stage}'.strip()} | {' | '.join(_cell(found[r, t]) for t in topologies)} |"
    yield ""
    yield "| recipe | on | rows (paper's) x positions | layout | HBM, GiB | step | MFU | bound by | compiled in |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: | --- | ---: |"
    for (r, t), row in found.items():
        if row:
            yield f"| {r} | {t.replace('*', ' x ')} | {' | '.join(_details(row))} |"
    yield from _findings(found)


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if "error" in row:
        return "error"
    return f"{100 * row['mfu']:.0f} %, {row['hbm_gib']:.1f}" if row["fits"] else "does not fit"


def _details(row: Row) -> tuple[str, ...]:
    if "error" in row:
        return ("", "", "", "", "", row["error"].replace("|", "/"), "")
    paper = "" if row["paper_rows"] == row["rows"] else f" ({row['paper_rows']:,})"
    rows = f"{row['rows']:,}{paper} x {row['seq_len']:,}"
    mesh = " ".join(f"{k}={n}" for k, n in row["mesh"].items() if n > 1) or "one chip"
    layout = ", ".join([mesh, f"remat {row['remat']}"] + ([f"{row['microbatches']} parts"] if row["microbatches"] > 1 else []))
    took = f"{row['compile_seconds']} s{'' if row.get('machine_code') else ', no machine code'}"
    if not row["fits"]:
        return rows, layout, "", "", "", row["refusal"].replace("|", "/"), took
    second = row["units"].get(row["bound"])
    bound = row["bound"] if second is None else f"{row['bound']} {100 * second / row['step']:.0f} %"
    return rows, layout, f"{row['hbm_gib']:.2f}", _seconds(row["step"]), f"{100 * row['mfu']:.1f} %", bound, took


def _seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 1 else f"{1e3 * s:.3g} ms"


def _findings(found: Mapping[tuple[str, str], Row | None]) -> Iterator[str]:
    """What the audit saw, and what XLA warned of."""
    lines = [f"- {r}, {t}: {re.sub(r'[<|>]', ' ', what)}" for (r, t), row in found.items() if row
             for what in [*[x for x in row.get("replicated", ()) if "/" in x][:3], *row.get("warnings", ())[:2]]]       # of a known jax operation
    if lines:
        yield from ("", "Replicated tensors above 1 MiB, and warnings of XLA:", "", *lines)


def main() -> None:
    if plans.alone(one):
        return
    from mllm_jax.config import load, recipe_names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", metavar="NAME", help="chapter/system, with knobs after a colon; all by default")
    parser.add_argument("--topologies", nargs="*", default=TOPOLOGIES, metavar="NAME", help="v5e:8x8, or 2*v5e:8x8 for two slices")
    parser.add_argument("--tiny", action="store_true", help="the small versions")
    parser.add_argument("--whole", action="store_true", help="machine code for the plans that have none")
    plans.add_arguments(parser, FILE, PAGE)
    args = parser.parse_args()
    sizes = {name: load(name).params or 0 for name in args.recipes or recipe_names()}
    recipes = sorted(sizes, key=sizes.get)
    made = lambda: list(tables(plans.read(args.out), recipes, args.topologies, args.tiny))
    if args.print:
        print("\n".join(made()))
    else:
        todo = [job_of(r, t, args.tiny) for t in args.topologies for r in recipes]
        rows = plans.read(args.out) if args.whole else {}
        anew = {k: {"found": row} for k, row in rows.items() if row.get("fits") and not row.get("machine_code")}
        todo = [job for job in todo if not args.whole or key(job) in anew]
        plans.make(Path(__file__), todo, args.out, args.jobs, 60 * args.limit, args.again, anew)
        plans.put(args.page, made())


if __name__ == "__main__":
    main()
