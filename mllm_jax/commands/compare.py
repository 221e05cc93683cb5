"""`mllm-jax compare`: a system as its difference from another."""

import argparse

from mllm_jax.commands import common

HELP = """Print what one recipe changes in another.

examples:
  mllm-jax compare projector/llava projector/llava_15
  mllm-jax compare projector/llava_15 projector/llava_15:size=13b
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a recipe")
    parser.add_argument("b", metavar="B", help="another, or the same with knobs")
    parser.add_argument("--tiny", action="store_true", help="of the small versions")


def run(args: argparse.Namespace) -> int:
    from mllm_jax.config import compare

    a, b = (common.load_recipe(name, tiny=args.tiny) for name in (args.a, args.b))
    for path, (left, right) in compare(a, b).items():
        print(f"{path}\n  - {left}\n  + {right}")
    if a == b:
        print("no difference")
    return 0
