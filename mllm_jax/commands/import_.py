"""`mllm-jax import`: a Hugging Face folder as weights of our own, streamed."""

import argparse
from pathlib import Path

from mllm_jax.commands import common

HELP = """Convert a Hugging Face folder into weights of our own.

One tensor is in memory at a time.  Not needed for training: a recipe reads Hugging Face folders itself.  It pays where many machines start
from the same weights again and again.

examples:
  mllm-jax import llava-1.5-7b-hf weights/llava-1.5-7b
  mllm-jax import hf://llava-hf/llava-1.5-7b-hf weights/llava-1.5-7b
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder with config.json and safetensors, or hf://org/name")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")


def run(args: argparse.Namespace) -> int:
    common.start(args, platform="cpu")

    from mllm_jax.hf.convert import convert_folder

    print(f"weights: {convert_folder(args.source, args.out, to='native')}")
    return 0
