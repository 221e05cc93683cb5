"""`mllm-jax evaluate`: a trained model on tasks, over all devices, each example counted once."""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mllm_jax.commands import common

HELP = """Evaluate a run or a Hugging Face folder.

Without a task, the tasks of the run's own last stage.  What was answered before is kept and not asked again.

examples:
  mllm-jax evaluate runs/first-digits
  mllm-jax evaluate runs/first-digits answers source=digits_test limit=500
  mllm-jax evaluate clip-vit-base-patch32 retrieval source=parquet:flickr30k pool=1000
  mllm-jax evaluate runs/first-digits perplexity source=digits_test limit=200 --layout cpu-8
  mllm-jax evaluate runs/resolution-m3 answers source=vqav2 --set "inputs.image.connector.windows=(4,)"
"""

TASKS = {"answers": "Answers", "retrieval": "Retrieval", "zero_shot": "ZeroShot", "perplexity": "Perplexity"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("task", nargs="?", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="of the task, for example source=digits_test limit=500")
    parser.add_argument("--template", metavar="NAME", help="chat format (default: that of the run, or the tokenizer's own)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where answers and results go (default: the run's evals/, or evals/)")
    parser.add_argument("--restart", action="store_true", help="answer again, where other weights or another task answered before")
    common.add_changes(parser)
    common.add_data_root(parser)
    common.add_layout(parser)


def run(args: argparse.Namespace) -> int:
    from mllm_jax.config import ConfigError, nearest

    if args.task is not None and args.task not in TASKS:
        raise ConfigError(f"no task is called {args.task!r}; nearest: {nearest(args.task, TASKS)}")
    running, layout = common.start(args)

    from mllm_jax.evaluation import tasks
    from mllm_jax.evaluation.run import evaluate
    from mllm_jax.train.log import counter

    given = None if args.task is None else {args.task: make_task(getattr(tasks, TASKS[args.task]), args.overrides)}
    recipe, cfg, params, tokenizer = common.open_model(args.model, layout, args.changes)
    stage = list(recipe.stages)[-1] if recipe else None
    if given is None and recipe is None:
        raise ConfigError(f"{args.model} is not a run and has no tasks of its own; name one of: {', '.join(TASKS)}")
    chosen = given or recipe.stages[stage].evals
    if not chosen:
        raise ConfigError(f"stage {stage} of {args.model} has no evals; name one of: {', '.join(TASKS)}")
    out = args.out or (Path(args.model) / "evals" / stage if recipe else Path("evals"))
    if (given or args.changes) and recipe and args.out is None:
        # In a folder of its own, or it would meet the answers to the recipe's own task of that name.
        key = lambda task: hashlib.blake2b("".join([repr(task), *args.changes]).encode(), digest_size=3).hexdigest()
        chosen = {f"{name}-{key(task)}": task for name, task in chosen.items()}
    template, seq_len = common.text_of(recipe, cfg)
    mesh = layout.make_mesh()
    for name, task in chosen.items():
        result = evaluate(
            cfg, params, task, tokenizer, layout=layout, mesh=mesh, folder=out / name, root=args.data_root,
            template=args.template or template, seq_len=seq_len, restart=args.restart,
            progress=counter(name))
        if running.process == 0:
            print(f"{name}: {out / name}")
            print("\n".join(lines({k: v for k, v in result.items() if k != "task"})))
    return 0


def make_task(kind: type, assignments: list[str]) -> Any:
    """A task with the fields that were written as name=value.

    Raises:
      ConfigError: a field that it does not have, or one that it needs.
    """
    from mllm_jax.config import ConfigError, nearest, parse

    known = {f.name: f for f in fields(kind)}
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"{kind.__name__} has no field {name!r}; nearest: {nearest(name, known)}")
        values[name] = parse(text)
    missing = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in values]
    if missing:
        raise ConfigError(f"{kind.__name__} needs {missing[0]}=...; it has: {', '.join(known)}")
    return kind(**values)


def lines(result: Mapping[str, Any], indent: str = "  ") -> list[str]:
    """Numbers of a result, nested ones indented, a mean with its interval; long tables stay in the file."""
    out = []
    for name, value in result.items():
        if name == "by_kind" and "kinds" in result:             # the same means, without intervals
            continue
        if isinstance(value, Mapping) and value.keys() == {"mean", "low", "high", "n"}:
            out.append(f"{indent}{name:<20} {value['mean']:.4f}   {value['low']:.4f} to {value['high']:.4f}, n={value['n']}")
        elif isinstance(value, Mapping) and name != "confusion":
            out += [f"{indent}{name}", *lines(value, indent + "  ")]
        elif isinstance(value, float):
            out.append(f"{indent}{name:<20} {value:.4f}")
        elif isinstance(value, (int, str)):
            out.append(f"{indent}{name:<20} {value}")
    return out
