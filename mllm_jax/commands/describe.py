"""`mllm-jax describe`: one system from top to bottom, with the shapes of one stage.

Everything is asked of the recipe and of the model, which is traced and never built: a 13B model takes
a few seconds and no memory.
"""

import argparse
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_jax.commands import common
from mllm_jax.commands.compare import line as brief
from mllm_jax.config import items, load

HELP = """Print the shapes, sizes and work of a recipe.

Every shape from the disk to the loss, the parameters of each part, operations and memory of a step, and the
files to read, in order.

examples:
  mllm-jax describe first/digits
  mllm-jax describe projector/llava_15:size=13b --stage align
  mllm-jax describe contrastive/siglip stages.contrastive.data.batch_size=1024
"""

# The host's part of the line, the same for every recipe; what a recipe chooses stands between.
HOST = ("types", "data.datasets", "data.templates", "data.tokenize", "data.pack", "data.loader", "train.feed")
DEVICE = ("train.state", "train.step", "train.optimizer", "train.loop")
# Width and height of images of different shapes; how several images are seen in the words of a line.
SIZES = ((100, 80), (640, 480), (800, 800), (1000, 500), (300, 900))
WAYS = {"images": "image of several"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="chapter/system, with knobs after a colon")
    parser.add_argument("overrides", nargs="*", metavar="path.to.field=value", help="changes of single fields")
    parser.add_argument("--stage", metavar="NAME", help="whose shapes (default: the last stage)")
    parser.add_argument("--tiny", action="store_true", help="of the small version")


def run(args: argparse.Namespace) -> int:
    common.start(args, platform="cpu")
    recipe = load(args.recipe, *args.overrides, tiny=args.tiny)
    print("\n".join(describe(args.recipe, recipe, args.stage)))
    return 0


def describe(name: str, recipe: Any, stage: str | None = None) -> Iterator[str]:
    """The lines of the page.

    Raises:
      ConfigError: no such stage.
    """
    stage = recipe.stage_name(stage, called=name)
    stages = {s: Planned(recipe, s) for s in recipe.stages}
    total, active = (max(getattr(p, x) for p in stages.values()) for x in ("total", "active"))
    sparse = f", of which a token uses {number(active)}" if active < total else ""
    yield f"{name} ({recipe.paper}): {number(total)} parameters{sparse}, stages: {', '.join(recipe.stages)}"
    yield ""
    yield f"The straight line, in stage {stage}"
    yield ""
    yield from table(line(recipe, stages[stage]), indent=" ")
    yield ""
    yield "Parameters: all, and those that train in each stage"
    yield ""
    yield from table(parameters(stages), indent=" ", right=range(1, 2 + len(stages)))
    yield ""
    yield "Work and memory of a step, when every row is full and every position is trained that may be"
    yield ""
    yield from table(work(stages), indent=" ", right=range(1, 1 + len(stages)))
    yield ""
    if rows := list(by_size(stages[stage])):
        yield "Tokens of an image of so many pixels"
        yield ""
        yield from table(rows, indent=" ", right=range(1, 1 + len(SIZES)))
        yield ""
    yield "Read, in this order"
    yield ""
    yield from table(files(name, recipe, stages[stage]), indent=" ", right=(0,))


class Planned:
    """A stage's model, traced: shapes of parameters, of what flows, and of the optimizer's state."""

    def __init__(self, recipe: Any, name: str):
        import jax

        from mllm_jax.data.pack import row_spec
        from mllm_jax.sharding import Layout
        from mllm_jax.train.adapters import model_of, trained_of
        from mllm_jax.train.flops import full_counts, step_flops
        from mllm_jax.train.optimizer import build
        from mllm_jax.train.state import Blueprint

        self.stage = stage = recipe.stages[name]
        self.model = stage.model or recipe.model
        layout, whole = Layout(), model_of(recipe, name)
        self.blueprint = Blueprint(whole, layout, layout.make_mesh(jax.devices()[:1]))
        self.sizes = {k: math.prod(v.shape) for k, v in self.blueprint.shapes.items()}
        self.total = sum(self.sizes.values())
        self.active = round(sum(n * used(self.model, k) for k, n in self.sizes.items()))
        self.trained = trained_of(stage, self.sizes)
        ours = {k: v for k, v in self.blueprint.shapes.items() if k in self.trained}
        state = jax.eval_shape(build(stage.optimizer, stage.steps, ours).init, ours)
        self.state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        self.state_bytes += 4 * self.trained_size if stage.ema is not None else 0
        self.rows, self.seq = stage.data.batch_size, stage.data.seq_len
        self.spec = row_spec(self.seq, stage.data.items, self.towers, 0, stage.data.trained)
        self.items = {m: room.items for m, room in self.spec.media.items()}
        self.ways = {WAYS.get(kind) or kind or m: way for m, t in self.towers.items() for kind, way in t.kinds.items()}
        self.tokens = {label: tokens_of(way, way.nominal) for label, way in self.ways.items()}
        self.flops = step_flops(whole, self.trained, full_counts(self.rows, self.spec, self.towers))

    @property
    def towers(self) -> Mapping[str, Any]:
        return self.model.inputs

    @property
    def trained_size(self) -> int:
        return sum(self.sizes[k] for k in self.trained)

    def parts(self) -> dict[str, list[str]]:
        """{part of the model: paths of its parameters}, in the model's own order."""
        out: dict[str, list[str]] = {}
        for path in self.sizes:
            first, *rest = path.split("/")
            depth = 3 if first == "inputs" and rest[1:2] and rest[1] in ("encoder", "connector", "marks") else 2
            part = "/".join(path.split("/")[:depth]) if first in ("inputs", "project") else first
            out.setdefault(part, []).append(path)
        order = ["inputs", "decoder", "text", "project"]
        place = lambda part: order.index(first) if (first := part.split("/")[0]) in order else len(order)
        return dict(sorted(out.items(), key=lambda kv: (place(kv[0]), kv[0].endswith("/connector"))))


def tokens_of(tower: Any, cut: Any) -> int:
    """Positions of a row that a medium takes that is cut so, without text; one where it stands beside the row."""
    from mllm_jax.data.layouts import Plain
    from mllm_jax.types import Run

    if tower.route != "splice":
        return int(tower.route == "memory")
    pieces = (tower.layout or Plain())(cut, tower.num_tokens(cut.grid))
    return sum(len(piece.slots) for piece in pieces if isinstance(piece, Run))


def batch_of(p: Planned) -> Any:
    """A batch of the stage, as the model is given it: shapes, and no data."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from mllm_jax.data.batch import blank_batch

    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), blank_batch(p.rows, p.spec))
    return replace(batch, draws=jax.ShapeDtypeStruct((p.rows,), jnp.uint32))


def line(recipe: Any, p: Planned) -> Iterator[tuple[str, ...]]:
    """(where, step, shape, what it is), from the file to the update."""
    import jax

    from mllm_jax.nn.param import merge
    from mllm_jax.objectives import Auxiliary, Matching
    from mllm_jax.sharding import Layout, use

    stage, batch = p.stage, batch_of(p)
    shape = lambda x, letter="f": f"{letter}[{' '.join(map(str, x.shape))}]"
    weights = ", ".join(f"{k} {v:g}" for k, v in stage.data.sources.items())
    yield "host", "source", "", weights
    for label, tower in p.ways.items():
        cut = tower.nominal
        t, rows, columns = cut.grid
        grid = f"{rows} x {columns} patches of {tower.patch} x {tower.patch}" + (f", {t} times" if t > 1 else "")
        tiles = f"{cut.tiles} {'frames' if cut.frames > 1 else 'tiles'} of " if cut.tiles > 1 else ""
        example = "; of a picture of 640x480" if tower.view.packed or tiles and cut.frames == 1 else ""
        what = f"{brief(tower.view)}: {tiles}{grid}{example}"
        yield "", f"view of {label}", f"u8[{cut.tiles * t * rows * columns} {tower.encoder.patch_dim}]", what
    tokenizer = getattr(p.model, "tokenizer", recipe.tokenizer)
    yield "", "encode", f"i32[up to {p.seq}]", f"template {stage.data.template}, tokenizer {tokenizer}" + "".join(
        f"; {n} token{'s' * (n > 1)} for each {m}" for m, n in p.tokens.items() if n)
    room = ", ".join(room_of(n, m, p.towers[m]) for m, n in p.items.items())
    packs = "several examples a row" if stage.data.pack else "one example a row"
    yield "", "pack", shape(batch.tokens, "i32"), f"{packs}, room for {room or 'no media'} in each"

    model = lambda f: lambda params, batch: f(merge(p.blueprint.graph, params), batch)
    with use(Layout()):
        trace = lambda f: jax.eval_shape(model(f), p.blueprint.shapes, batch)
        out = trace(lambda model, batch: model(batch))
        where = "device"
        if hasattr(p.model, "decoder"):
            x = trace(lambda model, batch: model.decoder.embed(batch.tokens))
            yield where, "embed", shape(x), f"{p.model.decoder.vocab} tokens; the places of media hold any id"
            where = ""
        for m, tower in p.towers.items():
            if tower.connector is None:
                vector = trace(lambda model, batch, m=m: model.inputs[m].embed(batch.media[m]))
                yield where, tower_name(tower), shape(vector), f"{tower.encoder.depth} layers, pooled by {tower.encoder.pool}"
            else:
                f = trace(lambda model, batch, m=m: model.inputs[m].encoder(batch.media[m])).tokens
                yield where, tower_name(tower), shape(f), f"{tower.encoder.run_depth} of {tower.encoder.depth} layers run"
            if tower.connector is not None and tower.route != "pool":
                f = trace(lambda model, batch, m=m: model.inputs[m](batch.media[m])).tokens
                to = "connector" + ("" if tower.route == "memory" else ", to the width of the decoder")
                yield "", type(tower.connector).__name__.removesuffix("Config"), shape(f), to
            where = ""
        if hasattr(p.model, "decoder"):
            routes = {tower.route: tower for tower in p.towers.values()}
            if "splice" in routes:
                yield "", "splice", shape(x), "by slot, where slot >= 0"
            if "memory" in routes:
                yield "", "memory", "", reading(p.model.decoder, routes["memory"])
            yield "", "decoder", shape(out.hidden), sight(p.model)
        elif out.pairs is not None:
            former, pairs = p.model.tower.connector, out.pairs.logits.shape[1]
            n, layers = former.queries, f"{former.depth} layers"
            first = f"{layers}; {n} queries, the text alone, the text behind the queries"
            yield "", "first pass", f"f[{p.rows} {n + 2 * p.seq} {former.width}]", first
            for m, e in out.embeds.items():
                yield "", f"project {m}", shape(e), "unit vectors"
            yield "", "second pass", f"f[{pairs * p.rows} {n + p.seq} {former.width}]", f"{layers}; {n} queries and a text: a true pair, two false"
        else:
            text = trace(lambda model, batch: model.text(model.text.embed(batch.tokens), batch)[0])
            yield "", "text tower", shape(text), f"{p.model.text.depth} layers; the vector is that of the last position"
            for m, e in out.embeds.items():
                yield "", f"project {m}", shape(e), "unit vectors"
        for name, objective in stage.objectives.items():
            if isinstance(objective, Auxiliary):
                what = f"{objective.name} of the layers that have one, in the mean, times {objective.weight:g}"
            elif isinstance(objective, Matching):
                what = f"{out.pairs.logits.shape[1]} pairs of each row, of which the first is true"
            elif objective.whole:
                what = f"{p.rows} x {p.rows} similarities; every other row is a negative"
            else:
                which = "only where trained" if (n := stage.data.trained) is None else f"at the trained positions of a row, up to {n}"
                what = f"over {out.unembed.shape[1]} tokens, {which}, a chunk of positions at a time"
            yield "", type(objective).__name__, "total, count", f"{name}/loss: {what}"
    trained = {k: v for k, v in p.blueprint.shapes.items() if k in p.trained}
    yield "", type(stage.optimizer).__name__, f"{len(trained)} arrays", f"train_step: lr {stage.optimizer.lr:g}, {stage.steps} steps"
    yield "host", "log", "", ", ".join(f"{n}/loss = total / count" for n in stage.objectives)


def room_of(n: int, modality: str, tower: Any) -> str:
    """The room of a row in what it is counted in, "3 images" or "5 image tiles"."""
    from mllm_jax.data.pack import unit

    what = unit(modality, tower)
    return f"{n} {what.removesuffix('s') if n == 1 else what}"


def sight(model: Any) -> str:
    """How many layers the decoder has, and what a position sees in them."""
    d, sees = model.decoder, {way.sees for tower in model.inputs.values() for way in tower.kinds.values()}
    sparse = [m for i in range(d.depth) if (m := getattr(d.cycle[i % len(d.cycle)], "mlp", None))]
    near = [w for i in range(d.depth) if (w := getattr(d.cycle[i % len(d.cycle)], "window", None))]
    return f"{d.depth} layers; sees {'earlier positions' if d.causal else 'all'} of its segment" + (
        f", in {len(near)} layers the last {near[0]} alone" if near else "") + (
        f"; {len(sparse)} layers have {sparse[0].experts} experts, {sparse[0].top_k} for a token" if sparse else "") + (
        ", and all of its own image" if "item" in sees else "") + (", and all before the answer one another" if "prefix" in sees else "")


def used(model: Any, path: str) -> float:
    """The part of a parameter that one token uses: less than 1 of experts."""
    match = re.fullmatch(r"decoder/blocks/(\d+)/mlp/experts/.*", path)
    return model.decoder.cycle[int(match[1])].mlp.top_k / model.decoder.cycle[int(match[1])].mlp.experts if match else 1.0


def reading(decoder: Any, tower: Any) -> str:
    """How many layers read the media beside the row, and what a position sees of them."""
    readers = sum(getattr(decoder.cycle[i % len(decoder.cycle)], "reads", None) is not None for i in range(decoder.depth))
    each = math.prod(tower.num_tokens(tower.nominal.grid))
    return f"beside the row; {readers} layers read, a position the {each} tokens of the last item before it"


def tower_name(tower: Any) -> str:
    return type(tower.encoder).__name__.removesuffix("Config")


def parameters(stages: Mapping[str, Planned]) -> Iterator[tuple[str, ...]]:
    yield "", "all", *stages
    last = list(stages.values())[-1]
    parts = {part: None for p in stages.values() for part in p.parts()}
    of = lambda p, part: p.parts().get(part, [])
    for part in parts:
        whole = max(sum(p.sizes[k] for k in of(p, part)) for p in stages.values())
        trains = (sum(p.sizes[k] for k in of(p, part) if k in p.trained) for p in stages.values())
        yield part, number(whole), *(number(n) if n else "-" for n in trains)
    yield "total", number(last.total), *(number(p.trained_size) for p in stages.values())


def work(stages: Mapping[str, Planned]) -> Iterator[tuple[str, ...]]:
    each = lambda f: map(f, stages.values())
    gib = lambda n: f"{n / 2**30:.2f} GiB" if n >= 2**27 else f"{n / 2**20:.1f} MiB"
    yield "", *stages
    yield "rows x positions", *each(lambda p: f"{p.rows} x {p.seq}")
    for m in {m: None for p in stages.values() for m, n in p.tokens.items() if n}:
        yield f"tokens of one {m}", *each(lambda p, m=m: str(p.tokens.get(m) or "-"))
    yield "floating point operations", *each(lambda p: short(p.flops))
    yield "of them for each position", *each(lambda p: short(p.flops / (p.rows * p.seq)))
    yield "parameters in float32", *each(lambda p: gib(4 * p.total))
    yield "gradients", *each(lambda p: gib(4 * p.trained_size))
    yield "optimizer state", *each(lambda p: gib(p.state_bytes))


def by_size(p: Planned) -> Iterator[tuple[str, ...]]:
    """Tokens by width and height, of inputs that do not give all images as many."""
    counts = {m: [tokens_of(t, t.view.plan(height, width, t.patch)) for width, height in SIZES] for m, t in p.towers.items()}
    if varying := {m: found for m, found in counts.items() if len(set(found)) > 1}:
        yield "", *(f"{width}x{height}" for width, height in SIZES)
        for m, found in varying.items():
            yield m, *map(str, found)


def files(name: str, recipe: Any, p: Planned) -> Iterator[tuple[str, str]]:
    """(lines, path) of the files that make this system, in the order of the line; each once."""
    from mllm_jax import config
    from mllm_jax.data.datasets import DATASETS
    from mllm_jax.data.sources import FORMATS

    formats = {DATASETS[s].format if s in DATASETS else s.partition(":")[0] for s in p.stage.data.sources}
    readers = sorted({FORMATS[f].__module__ for f in formats if f in FORMATS})
    chapter = name.partition(":")[0].removeprefix("configs/").removesuffix(".py")
    chosen = {kind: [] for kind in ("data", "encoders", "connectors", "decoders", "models", "nn", "objectives", "evaluation")}
    for module in modules_of([p.model, p.stage]):
        kind = module.split(".")[1]
        if kind in chosen and module not in chosen[kind]:
            chosen[kind].append(module)
    layers = []
    for module in (*chosen["encoders"], *chosen["decoders"], *chosen["models"], *chosen["nn"]):
        layers += [m for m in uses(module) if m.startswith("mllm_jax.nn.") and m not in layers]
    host = [f"mllm_jax.{m}" for m in HOST]
    order = ["mllm_jax.configs." + chapter.replace("/", "."), "mllm_jax.recipe", *host[:2], *readers, *chosen["data"], *host[2:],
             *chosen["models"], *chosen["encoders"], *chosen["connectors"], *chosen["decoders"], *layers,
             *chosen["objectives"], *(f"mllm_jax.{m}" for m in DEVICE), *chosen["evaluation"]]
    root = Path(config.__file__).parents[1]
    total = 0
    for module in dict.fromkeys(order):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin)
        lines = len(path.read_text().splitlines())
        total += lines
        yield str(lines), str(path.relative_to(root) if path.is_relative_to(root) else path)
    yield str(total), "lines in all"


def modules_of(nodes: list[Any]) -> Iterator[str]:
    """The modules of ours whose configurations a value is made of."""
    for node in nodes:
        if inspect.isclass(node) or type(node).__module__ == "builtins" and items(node) is None:
            continue
        if type(node).__module__.startswith("mllm_jax."):
            yield type(node).__module__
        yield from modules_of(list((items(node) or {}).values()))


def uses(module: str) -> Iterator[str]:
    """The modules of ours that a module imports, directly or through those of nn/."""
    seen: list[str] = []
    todo = [module]
    while todo:
        for value in vars(importlib.import_module(todo.pop())).values():
            found = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            if isinstance(found, str) and found.startswith("mllm_jax.nn.") and found not in seen:
                seen.append(found)
                todo.append(found)
    yield from seen


def number(n: int) -> str:
    """712,345 · 21.0M · 7.06B."""
    if n < 1e6:
        return f"{n:,}"
    return f"{n / 1e6:.1f}M" if n < 1e9 else f"{n / 1e9:.2f}B"


def short(x: float) -> str:
    """"950", "12.3k", "4.5M", "7.1G": three digits and a letter."""
    for letter in ("", "k", "M", "G", "T", "P", "E"):
        if abs(x) < 999.5 or letter == "E":
            return f"{x:.3g}{letter}"
        x /= 1000
    raise AssertionError


def table(rows: Iterator[tuple[str, ...]], *, indent: str = "", right: Any = ()) -> Iterator[str]:
    """Rows with aligned columns; those numbered in `right` end together, the last column is as wide as it likes."""
    rows = list(rows)
    widths = [max((len(r[i]) for r in rows if i < len(r)), default=0) for i in range(max(map(len, rows)))]
    for r in rows:
        yield (indent + "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths)))).rstrip()
