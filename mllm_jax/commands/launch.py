"""`mllm-jax launch`: prints the file that starts a training run on rented machines."""

import argparse
import re
from typing import Any

from mllm_jax.commands import common
from mllm_jax.commands.train import steps_of
from mllm_jax.config import ConfigError, load, nearest

HELP = """Print the file that trains a recipe on a cluster: gke, tpu-vm, skypilot or slurm.

gke is a JobSet, tpu-vm a script around queued resources, skypilot a task, slurm a batch script.  Nothing is started,
and nothing needs to be installed.  docs/pods/ has a page for each, from an empty project to a training pod and back.

examples:
  mllm-jax launch gke projector/llava_15 --layout v6e-64 --image IMAGE --bucket my-training > pod.yaml
  mllm-jax launch tpu-vm projector/llava_15 --layout v5e-64 --image IMAGE --bucket my-training --project P --zone Z --spot
  mllm-jax launch skypilot projector/llava_15 --layout v6e-8 --bucket my-training --spot
  mllm-jax launch slurm projector/llava_15 --layout h100-8x4 --folder /scratch/me --partition gpu --time 24:00:00
"""

# kind -> (options that it needs, options that it also takes)
KINDS = {
    "gke": (("image", "bucket"), ("spot", "service_account", "queue")),
    "tpu-vm": (("image", "bucket", "project", "zone"), ("spot", "service_account")),
    "skypilot": (("bucket",), ("zone", "spot")),
    "slurm": (("folder",), ("partition", "account", "time", "constraint")),
}
OF_ONE = ("queue", "partition", "account", "time", "constraint")       # what the templates of other kinds know nothing of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("recipe", metavar="RECIPE", help="chapter/system, with knobs after a colon, as for train")
    parser.add_argument("overrides", nargs="*", metavar="path.to.field=value", help="changes of single fields")
    parser.add_argument("--layout", required=True, metavar="NAME", help="machines and mesh: v5e-256, v5e-256x2 (two slices), h100-8x4, ...")
    parser.add_argument("--name", metavar="NAME", help="of the job and of the run's folder (default: from the recipe)")
    parser.add_argument("--tiny", action="store_true", help="the same system small, to try the machines")
    parser.add_argument("--stages", metavar="A,B", help="only these stages")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="steps between checkpoints")
    parser.add_argument("--profile", metavar="STEP:N", help="trace N steps of each stage from step STEP on, for xprof")
    parser.add_argument("--restarts", type=int, default=100, metavar="N", help="how often the run may be started again (default: 100)")
    parser.add_argument("--image", metavar="IMAGE", help="container with mllm_jax in it; see launch/clusters/Dockerfile")
    parser.add_argument("--bucket", metavar="NAME", help="of Cloud Storage: runs/ and data/ are in it")
    parser.add_argument("--folder", metavar="DIR", help="on a file system that all machines see: runs/ and data/ are in it")
    parser.add_argument("--project", metavar="NAME", help="of Google Cloud")
    parser.add_argument("--zone", metavar="ZONE", help="of Google Cloud, such as us-east5-b")
    parser.add_argument("--service-account", metavar="NAME", help="that may read and write the bucket")
    parser.add_argument("--spot", action="store_true", help="machines that may be taken back, for a fraction of the price")
    parser.add_argument("--queue", metavar="NAME", help="local queue of Kueue (default: multislice-queue, that of XPK)")
    for name, what in {"partition": "of the cluster", "account": "that pays", "time": "limit, such as 24:00:00",
                       "constraint": "features of the nodes"}.items():
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"{what} (SLURM)")


def run(args: argparse.Namespace) -> int:
    if args.kind not in KINDS:
        raise ConfigError(f"no kind of cluster is called {args.kind!r}; nearest: {nearest(args.kind, KINDS)}")
    _check_options(args)

    from mllm_jax.launch import layouts
    from mllm_jax.launch.clusters import gke, job, skypilot, slurm, tpu_vm

    machine, layout = layouts.machine(args.layout), common.find_layout(args.layout, "tpu")
    args.overrides, args.layout = common.overrides_of(args), layouts.words(args.layout)        # a file is here, and not there
    recipe = load(args.recipe, *args.overrides, tiny=args.tiny)
    _check_rows(recipe, layout, machine)
    root = {"folder": f"{args.folder.rstrip('/')}/runs", "data": f"{args.folder.rstrip('/')}/data"} if args.folder else {}
    one = job.Job(
        name=args.name or re.sub(r"[^a-z0-9]+", "-", common.run_name(args.recipe, tiny=args.tiny).lower())[:40].strip("-"),
        arguments=_arguments(args, recipe), machine=machine, image=args.image or "", bucket=(args.bucket or "").removeprefix("gs://"),
        project=args.project or "", zone=args.zone or "", service_account=args.service_account or "", spot=args.spot,
        restarts=args.restarts, options={k: getattr(args, k) for k in OF_ONE if getattr(args, k)}, **root)
    job.check(one)
    print({"gke": gke, "tpu-vm": tpu_vm, "skypilot": skypilot, "slurm": slurm}[args.kind].write(one), end="")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option that this kind needs and has not, or has no use for."""
    needs, takes = KINDS[args.kind]
    said = lambda name: "--" + name.replace("_", "-")
    if missing := [said(k) for k in needs if not getattr(args, k)]:
        raise ConfigError(f"launch {args.kind} needs {' and '.join(missing)}; see mllm-jax launch --help")
    every = dict.fromkeys(option for pair in KINDS.values() for group in pair for option in group)
    if odd := [said(k) for k in every if getattr(args, k) and k not in (*needs, *takes)]:
        raise ConfigError(f"launch {args.kind} has no use for {' and '.join(odd)}; it takes {', '.join(map(said, (*needs, *takes)))}")


def _check_rows(recipe: Any, layout: Any, machine: Any) -> None:
    """What training would say on its first step, said before machines are rented."""
    from mllm_jax.sharding import check_length, check_rows

    if layout.slices != machine.slices:
        raise ConfigError(f"the layout {machine.chip}-{machine.chips} has {machine.slices} slices, and slices={layout.slices} does not fit them")
    sizes = layout.sizes(machine.chips, machine.slices)
    sizes |= {"data": sizes.get("data", 1) * machine.slices}
    for name, stage in recipe.stages.items():
        check_length(f"stages.{name}.data.seq_len", stage.data.seq_len, sizes)
        check_rows(f"stages.{name}.data.batch_size", stage.data.batch_size, layout, sizes)


def _arguments(args: argparse.Namespace, recipe: Any) -> tuple[str, ...]:
    """Of `mllm-jax train`, as it will run there."""
    for stage in args.stages.split(",") if args.stages else ():
        recipe.stage_name(stage)
    if args.profile:
        steps_of(args.profile)
    given = {"--stages": args.stages, "--save-every": args.save_every, "--profile": args.profile}
    more = [word for option, value in given.items() if value for word in (option, str(value))]
    return (args.recipe, *args.overrides, "--layout", args.layout, *(["--tiny"] if args.tiny else []), *more)
