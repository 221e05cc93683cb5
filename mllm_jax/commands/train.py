"""`mllm-jax train`: a recipe through all of its stages, then evaluation, samples, export and a report."""

import argparse
from pathlib import Path

from mllm_jax.commands import common
from mllm_jax.config import ConfigError, load

HELP = """Train a recipe through all of its stages.

Then evaluate it, generate samples, export to a Hugging Face folder and write a report.  A run that was stopped
goes on where its last checkpoint is; --fresh starts it anew.  SIGTERM saves and ends with exit code 75, as all does that is
no fault of the run: start it again then.

examples:
  mllm-jax train first/digits
  mllm-jax train projector/llava_15 --tiny
  mllm-jax train projector/llava_15:size=13b --layout v5e-256 --data-root /data
  mllm-jax train projector/gemma3 --layout found.json
  mllm-jax train first/digits --stages align,instruct stages.instruct.optimizer.lr=1e-4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="chapter/system, with knobs after a colon: projector/llava_15:size=13b")
    parser.add_argument("overrides", nargs="*", metavar="path.to.field=value", help="changes of single fields")
    parser.add_argument("--tiny", action="store_true", help="the same system small, on data that is already here")
    common.add_layout(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME)")
    common.add_data_root(parser)
    parser.add_argument("--stages", metavar="A,B", help="only these stages; an earlier run has done the ones before")
    parser.add_argument("--save-every", type=int, default=1_000, metavar="STEPS", help="steps between checkpoints (default: 1000)")
    parser.add_argument("--patience", type=float, default=900, metavar="SECONDS",
                        help="without a step until the run is taken for hung, writes the stacks of its threads and ends (default: 900)")
    parser.add_argument("--storage-patience", type=float, default=300, metavar="SECONDS",
                        help="that storage which fails is tried again for; hosts wait as long for one another, or ten minutes (default: 300)")
    parser.add_argument("--profile", metavar="STEP:N", help="trace N steps of each stage from step STEP on, for xprof")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where the last checkpoint is (the default)")
    again.add_argument("--fresh", action="store_true", help="delete what an earlier run left in the folder")


def run(args: argparse.Namespace) -> int:
    out = args.out or Path("runs") / common.run_name(args.recipe, tiny=args.tiny)
    profile = steps_of(args.profile) if args.profile else None
    running, layout = common.start(args)
    overrides = common.overrides_of(args)
    recipe = load(args.recipe, *overrides, tiny=args.tiny)

    import jax

    from mllm_jax import chips
    from mllm_jax.launch import runtime
    from mllm_jax.train.folder import RunOptions
    from mllm_jax.train.run import train

    stages = tuple(filter(None, args.stages.split(","))) if args.stages else None
    train(recipe, RunOptions(
        name=args.recipe, out=out, layout=layout, overrides=tuple(overrides), tiny=args.tiny, data_root=args.data_root,
        stages=stages, fresh=args.fresh, save_every=args.save_every, verbose=args.verbose, stop=running.stop,
        patience=args.patience, storage_patience=args.storage_patience,
        profile=profile, startup=runtime.age(), peak=chips.peak_of([d.device_kind for d in jax.devices()])))
    if running.process == 0:
        for file, what in {"report.html": "report", "metrics.json": "metrics", "export": "Hugging Face folder",
                           "adapter": "PEFT adapter"}.items():
            if (out / file).exists():
                print(f"{what}: {out / file}")
    return 0


def steps_of(text: str) -> tuple[int, int]:
    """"20:5" -> (20, 5), five steps from the twentieth on.

    Raises:
      ConfigError: it is not two positive numbers.
    """
    first, _, count = text.partition(":")
    if not (first.isdigit() and count.isdigit() and int(first) and int(count)):
        raise ConfigError(f"--profile is {text!r}; write STEP:N, such as 20:5 for five steps from step 20 on")
    return int(first), int(count)
