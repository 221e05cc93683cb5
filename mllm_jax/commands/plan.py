"""`mllm-jax plan`: what a stage needs and how fast it is on chips that are not here."""

import argparse
import json
from pathlib import Path
from typing import Any

from mllm_jax.commands import common
from mllm_jax.config import ConfigError, load

HELP = """Say whether a recipe fits on TPUs, how fast it is there and what that costs.

The real training step is compiled for the topology, on this machine, with no TPU: memory, operations and bytes on
the wires are the compiler's, the time of a step is estimated from its schedule and right to some 15 %. Compiling
takes a minute or two for a model of billions of parameters; with --quick, which needs no machine code, some ten seconds:
memory and wires are the same, the time of products is that of others like them. Needs libtpu: pip install "mllm_jax[plan]".

With --search it finds the mesh, what layers keep for the backward pass, and the microbatches with which a step is fastest
among those that fit, by such quick plans; --out writes them to a file that `train --layout` reads.

examples:
  mllm-jax plan projector/llava_15 --topology v5e:16x16 stages.instruct.data.batch_size=256
  mllm-jax plan projector/llava_15 --topology v5p:4x4x4 --stage align --layout v5p-64 --price 4.20
  mllm-jax plan projector/llava_15 --topology v5e:16x16 --slices 2 stages.instruct.data.batch_size=512
  mllm-jax plan projector/gemma3 --topology v5e:4x4 --quick
  mllm-jax plan first/digits --tiny --topology v5e:2x2 --html plan.html
  mllm-jax plan projector/gemma3 --topology v5e:4x4 --search --out gemma3.json
  mllm-jax plan projector/gemma3 --topology v5e:4x4 --search --rows 2048,4096 --budget 600
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="chapter/system, with knobs after a colon")
    parser.add_argument("overrides", nargs="*", metavar="path.to.field=value", help="changes of single fields")
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5e:16x16, v6e:4x4, v5p:4x4x8, v4:2x2x4, ...")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them, joined by the data centre's network (default: 1)")
    parser.add_argument("--stage", metavar="NAME", help="which stage (default: the last one)")
    parser.add_argument("--layout", default="auto", metavar="NAME",
                        help="a name (v5e-256), changes (v5e-256:microbatches=2), a file of --search, or auto: all chips shard (default)")
    parser.add_argument("--quick", action="store_true", help="without machine code: ten seconds instead of a minute or two")
    parser.add_argument("--search", action="store_true", help="find the layout; what --layout says beside mesh, remat and microbatches stays")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="with --search: writes the best layout there, for train --layout")
    parser.add_argument("--rows", metavar="A,B", help="with --search: lengths that packed rows may have (default: the recipe's)")
    parser.add_argument("--budget", type=float, default=180, metavar="SECONDS",
                        help="with --search: no program is looked at that would not be done by then, but the first (default: 180)")
    parser.add_argument("--tiny", action="store_true", help="the small version of the recipe")
    parser.add_argument("--price", type=float, metavar="X", help="of one chip for an hour; the plan then says what a million examples cost")
    parser.add_argument("--host-images-per-second", type=float, metavar="X", help="what a host's input gives (default: measured here)")
    parser.add_argument("--supervised", type=float, default=1.0, metavar="PART", help="part of the positions that are in the loss (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the plan there too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="writes it there as a page too")


def run(args: argparse.Namespace) -> int:
    name, args.layout = args.layout, "auto"             # of devices that are not here: those of this machine are its processor
    common.start(args, platform="cpu")
    args.layout = name
    recipe = load(args.recipe, *common.overrides_of(args), tiny=args.tiny)

    from mllm_jax.plan.page import page
    from mllm_jax.plan.passes import quick
    from mllm_jax.plan.report import Options, as_json, plan, text
    from mllm_jax.plan.topology import topology

    if not 0 < args.supervised <= 1:
        raise ConfigError(f"--supervised is {args.supervised}; it is a part of the positions, above 0 and at most 1")
    if odd := [option for option in ("out", "rows") if getattr(args, option) and not args.search]:
        raise ConfigError(f"--{odd[0]} is for a search; give --search too")
    on, layout = topology(args.topology, args.slices), common.find_layout(name, "tpu")
    options = Options(price=args.price, host_images=args.host_images_per_second, supervised=args.supervised, measure=float(not args.search))
    one = quick if args.quick else plan
    made = _searched(args, recipe, on, layout, options) if args.search else one(args.recipe, recipe, args.stage, on, layout, options)
    if made is None:
        return 1
    print("\n".join(text(made)))
    if args.json:
        args.json.write_text(json.dumps(as_json(made), indent=1) + "\n")
    if args.html:
        args.html.write_text(page(made))
    return 0 if made.fits else 1


def _searched(args: argparse.Namespace, recipe: Any, on: Any, layout: Any, options: Any) -> Any:
    """The plan of the best layout, which is written to the file; None if none fits."""
    from mllm_jax.launch import layouts
    from mllm_jax.plan.search import Wanted, remarks, search, table

    if args.out and args.out.suffix != ".json":
        raise ConfigError(f"--out is {args.out}; a layout's file ends in .json, by which --layout knows it")
    lengths = args.rows.split(",") if args.rows else []
    if not all(n.isdigit() for n in lengths):
        raise ConfigError(f"--rows is {args.rows!r}; write lengths with commas between them, such as 2048,4096")
    stage = recipe.stage_name(args.stage)
    found = search(args.recipe, recipe, stage, on, layout, options, Wanted(rows=tuple(map(int, lengths)), budget=args.budget))
    best, chips = found[0], len(on.devices) // on.slices
    data = recipe.stages[stage].data
    print(f"{args.recipe}, stage {stage}, on {on}: {data.batch_size} rows of {data.seq_len:,} positions")
    print("\n".join(table(found)))
    if not best.fits:
        print("none of these fits; take more chips, or fewer and shorter rows")
        return None
    print("\n".join([*remarks(recipe, stage, on, best), ""]))
    if args.out:
        own = [*common.overrides_of(args), *best.overrides]
        layouts.write(args.out, best.layout, layouts.Machine(on.name.partition(":")[0], chips, on.slices), args.recipe, tuple(own))
        print(f"written: mllm-jax train {args.recipe} --layout {args.out}\n")
    return best.plan
