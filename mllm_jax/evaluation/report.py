"""A run as one page, `report.html`: what was trained, what it can do, and what it costs.

Everything is read from the run's folder, so the page can be made again at any time, and of a run that is not
finished; parts whose files are not there are left out.  No script, no font and no picture from elsewhere.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.evaluation import html
from mllm_jax.evaluation.charts import curve, heat
from mllm_jax.evaluation.html import Cell, Raw, duration, percent, section, share, short, table, text
from mllm_jax.evaluation.metrics import exact_match

SAMPLES = 24
IMAGE_BYTES = 2_000_000                 # of all samples together, so that the page stays below 3 MB
BASELINES = {
    "most_frequent": "most frequent answer",
    "shuffled_image": "images shuffled",
    "blank_image": "blank images",
}
CAUSES = {
    "step": "steps that count", "start": "starting: imports, weights, first batch", "restore": "reading a checkpoint", "compile": "compiling",
    "data": "waiting for data", "hosts": "waiting for other processes", "save": "saving", "evaluate": "evaluation",
    "finish": "samples, export, report", "lost": "steps made again after a restart",
}
Tree = Mapping[str, Any]


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the folder of a run; its path.

    Raises:
      ConfigError: the folder holds no run.
    """
    run_dir = Path(run_dir)
    recipe = _read(run_dir / "recipe.json")
    if recipe is None:
        raise ConfigError(f"{run_dir} holds no run: there is no recipe.json; train one with "
                          f"`mllm-jax train RECIPE --out {run_dir}`")
    metrics = _read(run_dir / "metrics.json") or {}
    stages = {name: _stage(run_dir, name) for name in recipe["config"].get("stages", {})}
    results = {
        (path.parent.parent.name, path.parent.name): _read(path)
        for stage in stages for path in sorted(run_dir.glob(f"evals/{stage}/*/result.json"))}
    answers = next((r for r in reversed(results.values()) if "exact_match" in r), {})
    parts = [
        _header(recipe, metrics, stages, answers),
        _kinds(metrics, answers),
        _confusion(answers),
        _curves(stages),
        _costs(stages),
        _time(_read(run_dir / "heartbeat.json") or {}),
        _others(results),
        _samples(_lines(run_dir / "samples.jsonl")),
        _details(recipe, stages),
    ]
    path = run_dir / "report.html"
    path.write_text(html.page(recipe["name"], *filter(None, parts)))
    return path


def _stage(run_dir: Path, name: str) -> dict[str, Any]:
    folder = run_dir / "stages" / name
    return {"log": _lines(folder / "log.jsonl"), "summary": _read(folder / "summary.json") or {}}


def _header(recipe: Tree, metrics: Tree, stages: Tree, answers: Tree) -> Raw:
    config = recipe["config"]
    total = max((s["summary"].get("total_params", 0) for s in stages.values()), default=0)
    facts = [
        f"{len(stages)} stages: {', '.join(stages)}",
        *([f"{short(total)} parameters"] if total else []),
        f"from {config['paper']}" if config.get("paper") else "",
        "miniature (--tiny)" if recipe.get("tiny") else "",
        f"changed: {', '.join(recipe['overrides'])}" if recipe.get("overrides") else "",
    ]
    tiles = []
    if (hit := metrics.get("exact_match", answers.get("exact_match"))) is not None:
        n = f" of {answers['n']:,} answers" if "n" in answers else ""
        tiles.append((percent(hit), f"exact match{n}"))
    baselines = {k: v for k, v in (metrics.get("baselines") or answers.get("baselines") or {}).items() if v is not None}
    if baselines:
        best = max(baselines, key=baselines.get)
        tiles.append((percent(baselines[best]), f"best baseline: {BASELINES.get(best, best)}"))
    if metrics.get("retrieval_r1") is not None:
        tiles.append((percent(metrics["retrieval_r1"]), "image to text, recall at 1"))
    wall = metrics.get("wall_seconds") or sum(s["summary"].get("seconds", 0) for s in stages.values())
    if wall:
        tiles.append((duration(wall), "wall time, with compilation" if metrics.get("wall_seconds") else "wall time of the stages"))
    boxes = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in tiles)
    return Raw(f'<header><h1>{text(recipe["name"])}</h1><p class="note">{text(" · ".join(filter(None, facts)))}</p>'
               f'<div class="tiles">{boxes}</div></header>')


def _kinds(metrics: Tree, answers: Tree) -> Raw | None:
    kinds = metrics.get("by_kind") or answers.get("by_kind")
    if not kinds:
        return None
    baselines = metrics.get("baselines") or answers.get("baselines") or {}
    names = [b for b in dict.fromkeys([*BASELINES, *baselines]) if baselines.get(b) is not None]
    each, table_of = answers.get("baselines_by_kind", {}), answers.get("kinds", {})

    def row(kind: str, value: float) -> list[object]:
        more = table_of.get(kind, {})
        interval = f"{100 * more['low']:.0f}–{100 * more['high']:.0f}" if "low" in more else ""
        others = [percent(each[b][kind]) if kind in each.get(b, {}) else "–" for b in names]
        return [kind or "(no kind)", f"{more['n']:,}" if "n" in more else "–", share(value, interval), *others]

    all_kinds: list[object] = [Raw("<b>all kinds</b>"), f"{answers['n']:,}" if "n" in answers else "–"]
    if (hit := metrics.get("exact_match", answers.get("exact_match"))) is not None:
        low, high = answers.get("ci95", (None, None))
        all_kinds.append(share(hit, f"{100 * low:.0f}–{100 * high:.0f}" if low is not None else ""))
        all_kinds += [percent(baselines[b]) for b in names]
    rows = [row(kind, value) for kind, value in kinds.items()]
    rows += [all_kinds] if len(all_kinds) > 2 else []
    origin = answers.get("most_frequent_from")
    source = answers.get("task", {}).get("source")
    note = f"Exact match{f' on {source}' if source else ''}; the interval is 95 %, by bootstrap. "
    if "most_frequent" in names:
        note += f"The most frequent answer of each kind comes from {origin or 'the answers'}. "
    if "shuffled_image" in names or "blank_image" in names:
        note += "Shuffled: the same model is shown another example's images. Blank: grey ones of the same size."
    head = ["kind", "examples", Cell('<th class="share">this model</th>'), *(BASELINES.get(b, b) for b in names)]
    return section("What it answers", table(head, rows), note=note)


def _confusion(answers: Tree) -> Raw | None:
    found = answers.get("confusion")
    if not found:
        return None
    kinds = ", ".join(answers.get("task", {}).get("confusion", ()))
    note = f"Truth down, prediction across{f', over the kinds {kinds}' if kinds else ''}; shades are parts of a row."
    return section("What it confuses", heat(found["labels"], found["counts"]), note=note)


def _curves(stages: Tree) -> Raw | None:
    figures = []
    for name, stage in stages.items():
        points = [(line["step"], line["loss"]) for line in stage["log"] if isinstance(line.get("loss"), (int, float))]
        if points:
            last = stage["summary"].get("loss_last", points[-1][1])
            label = f"loss of stage {name} over steps"
            change = f"{points[0][1]:.3g} → {last:.3g}"
            figures.append(f"<figure><figcaption><h3>{text(name)}</h3><small>{change}</small></figcaption>"
                           f"{curve(*zip(*points, strict=True), label=label)}</figure>")
    if not figures:
        return None
    note = "Over steps; faint: as logged, strong: moving average."
    return section("Loss", Raw(f'<div class="charts">{"".join(figures)}</div>'), note=note)


def _costs(stages: Tree) -> Raw | None:
    done = {name: stage["summary"] for name, stage in stages.items() if stage["summary"]}
    if not done:
        return None

    def row(name: str, s: Tree) -> list[object]:
        busy = max(s.get("seconds", 0) - s.get("compile_seconds", 0), 1e-9)
        rate = lambda key, unit="": short(s.get(f"{key}_per_s") or s.get(key, 0) / busy, unit)
        params = f"{short(s.get('trained_params', 0))} of {short(s.get('total_params', 0))}"
        return [name, f"{s.get('steps', 0):,}", duration(s.get("seconds", 0)), duration(s.get("compile_seconds", 0)), params,
                rate("examples"), rate("tokens"), rate("images"), short(s.get("flops_per_s", 0), "FLOP/s"),
                *([percent(s["mfu"])] if "mfu" in s else [])]

    head = ["stage", "steps", "time", "of it compiling", "trained parameters"]
    head += ["examples/s", "tokens/s", "images/s", "useful work", *(["MFU"] if any("mfu" in s for s in done.values()) else [])]
    dropped = {f"{name}: {what}": n for name, s in done.items() for what, n in s.get("dropped", {}).items() if n}
    more = table(["dropped examples", "count"], dropped.items()) if dropped else ""
    return section("What it cost", table(head, [row(*item) for item in done.items()]), more,
                   note="Tokens and FLOPs are of positions and images really present, not of padding.")


def _time(beat: Tree) -> Raw | None:
    """Where the wall time went, over all starts of the run."""
    spent = {k: v for k, v in beat.get("seconds", {}).items() if v > 0}
    total = sum(spent.values())
    if not total:
        return None
    rows = [[CAUSES.get(k, k), duration(v), share(v / total)] for k, v in sorted(spent.items(), key=lambda kv: -kv[1])]
    starts, down = beat.get("starts", 1), beat.get("down", 0)
    note = f"{percent(beat['goodput'])} of {duration(total)} were steps that count (goodput)"
    if starts > 1:
        note += f", in {starts} starts; between them no process was there for {duration(down)}, which is not counted"
    return section("Where the time went", table(["", "time", Cell('<th class="share">share</th>')], rows), note=note + ".")


def _others(results: Mapping[tuple[str, str], Tree]) -> Raw | None:
    """The numbers of the evaluations that do not have a section of their own."""
    names = {f"{a}_to_{b}_r{k}": f"{a} → {b}, R@{k}" for a, b in (("image", "text"), ("text", "image")) for k in (1, 5, 10)}
    names |= {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "exact_match": "exact match"}
    rows = []
    for (stage, name), result in results.items():
        about = f"{result['n']:,} examples" + (f", pools of {result['pool']:,}" if "pool" in result else "")
        for key, label in names.items():
            if key in result:
                rows.append([stage, name, label, share(result[key]), about])
        if "perplexity" in result:
            rows.append([stage, name, "perplexity", f"{result['perplexity']:.4g}", f"{about}, {result['tokens']:,.0f} tokens"])
    return section("All evaluations", table(["stage", "evaluation", "metric", "value", "of"], rows, numbers=False)) if rows else None


def _samples(samples: Sequence[Tree]) -> Raw | None:
    if not samples:
        return None
    cards, right, room = [], 0, IMAGE_BYTES
    for s in samples[:SAMPLES]:
        hit = bool(exact_match(s["prediction"], s["answers"]))
        right += hit
        image = s.get("image") or ""
        picture = ""
        if image.startswith("data:image/") and len(image) <= room:
            room -= len(image)
            picture = f'<div class="picture"><img src="{text(image)}" alt="{text(s["id"])}"></div>'
        mark = '<span class="right">✓ right</span>' if hit else '<span class="wrong">✗ wrong</span>'
        truth = " / ".join(dict.fromkeys(s["answers"]))
        cards.append(
            f'<article class="card">{picture}<div class="words"><p class="kind"><span>{text(s.get("kind", ""))}</span>{mark}</p>'
            f'<p>{text(s["question"])}</p><dl><dt>model</dt><dd>{text(s["prediction"] or "(nothing)")}</dd>'
            f'<dt>truth</dt><dd>{text(truth)}</dd></dl></div></article>')
    return section("Samples", Raw(f'<div class="cards">{"".join(cards)}</div>'),
                   note=f"{right} of these {len(cards)} are right.")


def _details(recipe: Tree, stages: Tree) -> Raw:
    versions = recipe.get("versions", {})
    layout = recipe.get("layout", "")
    if not isinstance(layout, str):
        mesh = " × ".join(f"{axis} {'rest' if n == -1 else n}" for axis, n in layout.get("mesh", {}).items())
        mesh = f"{layout['slices']} slices of {mesh}" if layout.get("slices", 1) > 1 else mesh
        layout = ", ".join(filter(None, [mesh, layout.get("dtype"), f"{layout.get('microbatches', 1)} microbatch(es)"]))
    rows = [["layout", layout], *([name, version] for name, version in versions.items())]
    config = json.dumps(recipe["config"], indent=1)
    return section("How it was made", table(["", ""], rows, numbers=False),
                   Raw(f"<details><summary>the whole recipe, as a value</summary><pre>{text(config)}</pre></details>"))


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line that is being written is left out."""
    if not path.exists():
        return []
    whole = path.read_text()
    return [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines() if line.strip()]
