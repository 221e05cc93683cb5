"""`mllm-jax data`: look at what a stage trains on, measure it, and convert it.

`preview` and `stats` read a stage exactly as training does: the same sources, template, tokenizer and packing.
"""

import argparse
from pathlib import Path
from typing import Any

from mllm_jax.commands import common
from mllm_jax.config import load

HELP = """Look at a stage's data as the model sees it (preview), measure it (stats), or convert a source (convert).

examples:
  mllm-jax data preview first/digits --stage instruct
  mllm-jax data preview projector/llava_15 --tiny --out batch.html
  mllm-jax data stats projector/llava_15 --stage instruct --data-root /data
  mllm-jax data convert "llava:chat.json?images=images" --out chat.array_record --shards 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)

    def action(name: str, does: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.", allow_abbrev=False)
        made.set_defaults(parser=made)  # whose options are the nearest to a mistaken one
        return made

    preview = action("preview", "render a packed batch as a page: media, trained text, segments, slots")
    _add_stage(preview)
    preview.add_argument("--rows", type=int, default=4, metavar="N", help="rows of the batch (default: 4)")
    preview.add_argument("--skip", type=int, default=0, metavar="N", help="batches to pass over first")
    preview.add_argument("--out", type=Path, default=Path("preview.html"), help="the page (default: preview.html)")

    stats = action("stats", "print histograms for each source, and a row length and room for media that fit")
    _add_stage(stats)
    stats.add_argument("--limit", type=int, default=1000, metavar="N", help="examples of each source (default: 1000)")

    convert = action("convert", "write a source as ArrayRecord files with its media inside")
    convert.add_argument("source", metavar="SOURCE", help="a data set's name, or format:path?key=value")
    convert.add_argument("--out", type=Path, required=True, help="the file to write, NAME.array_record")
    convert.add_argument("--shards", type=int, default=1, metavar="N", help="files to spread the records over (default: 1)")
    convert.add_argument("--limit", type=int, metavar="N", help="the first records only")
    convert.add_argument("--skip-bad", action="store_true", help="leave bad records out, counted, instead of stopping")
    common.add_data_root(convert)


def run(args: argparse.Namespace) -> int:
    common.start(args, platform="cpu")
    return {"preview": run_preview, "stats": run_stats, "convert": run_convert}[args.action](args)


def run_preview(args: argparse.Namespace) -> int:
    from mllm_jax.data.loader import Loader
    from mllm_jax.data.preview import preview

    name, stage, towers, tokenizer = _stage(args)
    loader = Loader(stage.data, towers, tokenizer, rows=args.rows, root=args.data_root)
    with iter(loader) as batches:
        for _ in range(args.skip):
            next(batches)
        rows = next(batches)
    args.out.write_text(preview(rows, tokenizer, towers, title=f"{args.recipe}, stage {name}"), encoding="utf-8")
    filled = rows.info.tokens / rows.batch.tokens.size
    print(f"{args.out}: {args.rows} rows of {stage.data.seq_len} positions, {filled:.1%} filled, {rows.info.trained} trained")
    return 0


def run_stats(args: argparse.Namespace) -> int:
    from mllm_jax.data.sources import open_source
    from mllm_jax.data.stats import measure, report
    from mllm_jax.data.templates import Template

    _, stage, towers, tokenizer = _stage(args)
    data = stage.data
    template = Template(data.template, tokenizer)
    measured = [
        measure(
            source, open_source(source, args.data_root), weight,
            template=template, towers=towers, seq_len=data.seq_len, limit=args.limit,
        )
        for source, weight in data.sources.items() if weight > 0
    ]  # fmt: skip
    pad = tokenizer.pad_token_id
    for line in report(measured, towers, seq_len=data.seq_len, items=data.items, pad=pad, trained=data.trained):
        print(line)
    return 0


def run_convert(args: argparse.Namespace) -> int:
    from mllm_jax.data.manifest import convert, manifest_of
    from mllm_jax.data.sources import open_source

    source = open_source(args.source, args.data_root)
    manifest = convert(source, args.source, args.out, shards=args.shards, limit=args.limit, skip_bad=args.skip_bad)
    files = args.out if args.shards == 1 else args.out.with_name(f"{args.out.stem}-*{args.out.suffix}")
    print(f"{args.out}: {manifest['records']} records; read it as array_record:{files}")
    for reason, number in manifest["left_out"].items():
        print(f"left out: {number} x {reason}")
    print(f"what the files must be: {manifest_of(args.out)}")
    return 0


def _add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="chapter/system, with knobs after a colon")
    parser.add_argument("overrides", nargs="*", default=[], metavar="path.to.field=value", help="changes of single fields")
    parser.add_argument("--stage", metavar="NAME", help="whose data (default: the last stage)")
    parser.add_argument("--tiny", action="store_true", help="of the small version")
    common.add_data_root(parser)


def _stage(args: argparse.Namespace) -> tuple[str, Any, Any, Any]:
    """(name, stage, towers, tokenizer) that the arguments mean."""
    from mllm_jax.data.vocabulary import recipe_tokenizer, stage_tokenizer

    recipe = load(args.recipe, *args.overrides, tiny=args.tiny)
    name = recipe.stage_name(args.stage, called=args.recipe)
    stage = recipe.stages[name]
    model = stage.model or recipe.model
    return name, stage, model.inputs, stage_tokenizer(model, recipe_tokenizer(recipe, args.data_root))
