"""`mllm-jax plan`: what a stage needs and how fast it is on chips that are not here."""

import argparse
import json
from pathlib import Path

from mllm_jax.commands import common

HELP = """Say whether a recipe fits on TPUs, how fast it is there and what that costs.

The real training step is compiled for the topology, on this machine, with no TPU: memory, operations and bytes on
the wires are the compiler's, the time of a step is estimated from its schedule and right to some 15 %. Compiling
takes a minute or two for a model of billions of parameters. Needs libtpu: pip install "mllm_jax[plan]".

examples:
  mllm-jax plan projector/llava_15 --topology v5e:16x16 stages.instruct.data.batch_size=256
  mllm-jax plan projector/llava_15 --topology v5p:4x4x4 --stage align --layout v5p-64 --price 4.20
  mllm-jax plan projector/llava_15 --topology v5e:16x16 --slices 2 stages.instruct.data.batch_size=512
  mllm-jax plan first/digits --tiny --topology v5e:2x2 --html plan.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="chapter/system, with knobs after a colon")
    parser.add_argument("overrides", nargs="*", metavar="path.to.field=value", help="changes of single fields")
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5e:16x16, v6e:4x4, v5p:4x4x8, v4:2x2x4, ...")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them, joined by the data centre's network (default: 1)")
    parser.add_argument("--stage", metavar="NAME", help="which stage (default: the last one)")
    parser.add_argument("--layout", default="auto", metavar="NAME",
                        help="how the program is laid out: a name (v5e-256), changes (v5e-256:microbatches=2), or auto: all chips shard (default)")
    parser.add_argument("--tiny", action="store_true", help="the small version of the recipe")
    parser.add_argument("--price", type=float, metavar="X", help="of one chip for an hour; the plan then says what a million examples cost")
    parser.add_argument("--host-images-per-second", type=float, metavar="X", help="what a host's input gives (default: measured here)")
    parser.add_argument("--supervised", type=float, default=1.0, metavar="PART", help="part of the positions that are in the loss (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the plan there too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="writes it there as a page too")


def run(args: argparse.Namespace) -> int:
    name, args.layout = args.layout, "auto"             # of devices that are not here: those of this machine are its processor
    common.start(args, platform="cpu")
    recipe = common.load_recipe(args.recipe, args.overrides, tiny=args.tiny)

    from mllm_jax.config import ConfigError
    from mllm_jax.plan.page import page
    from mllm_jax.plan.report import Options, as_json, plan, text
    from mllm_jax.plan.topology import topology

    if not 0 < args.supervised <= 1:
        raise ConfigError(f"--supervised is {args.supervised}; it is a part of the positions, above 0 and at most 1")
    made = plan(args.recipe, recipe, args.stage, topology(args.topology, args.slices), common.find_layout(name, "tpu"),
                Options(price=args.price, host_images=args.host_images_per_second, supervised=args.supervised))
    print("\n".join(text(made)))
    if args.json:
        args.json.write_text(json.dumps(as_json(made), indent=1) + "\n")
    if args.html:
        args.html.write_text(page(made))
    return 0 if made.fits else 1

