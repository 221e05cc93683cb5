"""`mllm-jax VERB ...`: finds the verb, parses, calls, and turns errors into one clear line and an exit code.

Every verb is a file of `commands/` with `HELP`, `add_arguments(parser)` and `run(args) -> exit code`.  They
import what is heavy inside `run`, so that help and mistakes answer at once.

Exit codes: 0 done; 2 what you wrote cannot be done (a key, a name, a file), found before any work; 1 the
run failed (a bad record, a full disk, NaN); 75 the machines ended it (SIGTERM, another process died, nothing moved) and the
same command goes on, so a cluster should start it again; 130 interrupted.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from mllm_jax.config import RESTART, ConfigError, Restart, nearest

VERBS = ("train", "evaluate", "generate", "import", "export", "describe", "compare", "plan", "launch", "data", "doctor")

EXAMPLES = """\
examples:
  mllm-jax train first/digits                     a multimodal LLM on a laptop, in minutes
  mllm-jax describe projector/llava_15            every shape from the disk to the loss
  mllm-jax compare projector/llava projector/llava_15
  mllm-jax train projector/llava_15 --tiny        any recipe, small, on data that is already here
  mllm-jax VERB --help                            more of each
"""


def console() -> int:
    """The command `mllm-jax`, a process of its own; `main` is for callers from Python."""
    if {"train", "evaluate", "generate"} & set(sys.argv[1:]):
        from mllm_jax.launch.runtime import huge_pages

        huge_pages()
    if "train" in sys.argv[1:]:
        from mllm_jax.launch.runtime import cluster, supervise

        if cluster(os.environ):
            supervise()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = next((a for a in argv if not a.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        return fail("", f"no verb is called {verb!r}; nearest: {nearest(verb, VERBS)}", 2)
    # Of the verbs only the one that is wanted is imported; help wants them all.
    parser = make_parser([verb] if verb else VERBS)
    args, rest = parser.parse_known_args(argv)
    if args.verb is None:
        parser.print_help()
        return 0
    # argparse gives positionals that stand after an option back; those of the form a.b=c are overrides.
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *(r for r in rest if "=" in r and not r.startswith("-"))]
        rest = [r for r in rest if r not in args.overrides]
    # `data preview x -v`: the options of a verb are good after its action as well.
    args.verbose |= "-v" in rest or "--verbose" in rest
    rest = [r for r in rest if r not in ("-v", "--verbose")]
    if rest and not rest[0].startswith("-"):
        return fail(args.verb, f"{rest[0]!r} is one argument too many; see mllm-jax {args.verb} --help", 2)
    if rest:
        options = [o for a in args.parser._actions for o in a.option_strings]
        return fail(args.verb, f"there is no option {rest[0]!r}; nearest: {nearest(rest[0], options)}", 2)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return fail(args.verb, "interrupted; run the same command again to go on", 130)
    except BrokenPipeError:                             # `mllm-jax describe ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        return fail(args.verb, *explain(error))


def make_parser(wanted: Sequence[str] = VERBS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mllm-jax", description="Multimodal LLMs in JAX: build, train, evaluate, export.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name in wanted:
        command = importlib.import_module("mllm_jax.commands." + {"import": "import_"}.get(name, name))
        first, _, more = command.HELP.partition("\n")
        one = verbs.add_parser(
            name, help=first, description=f"{first}\n{more}".rstrip(), allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_arguments(one)
        one.add_argument("-v", "--verbose", action="store_true", help="say more; after an error, where it happened")
        one.set_defaults(run=command.run, parser=one)
    return parser


def explain(error: Exception) -> tuple[str, int]:
    """One line and the exit code: 2 for what the user wrote, 1 for what went wrong while running, 75 for what did outside of it."""
    from mllm_jax.data.errors import BadExample

    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"there is no file {str(error.filename)!r}", 2
    if isinstance(error, (ConfigError, FileNotFoundError)):
        return text, 2
    if isinstance(error, Restart):
        return text, RESTART
    # Messages of our own are whole sentences; others need their kind, and often the place.
    ours = isinstance(error, BadExample) or type(error).__module__.startswith("mllm_jax.")
    return text if ours else f"{type(error).__name__}: {text} (-v shows where)", 1


def fail(verb: str, message: str, code: int) -> int:
    print(f"mllm-jax{' ' if verb else ''}{verb}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(console())
