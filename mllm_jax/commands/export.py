"""`mllm-jax export`: a trained run as a Hugging Face folder."""

import argparse
from pathlib import Path

from mllm_jax.commands import common

HELP = """Write a run as a Hugging Face folder, for transformers.

Imported weights, too, go back into the folder that they came from, byte for byte.

examples:
  mllm-jax export runs/first-digits exported
  mllm-jax export runs/projector-llava_15 exported --dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run (runs/first-digits), or a folder that `import` wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not hold anything else")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (default: as trained)")
    parser.add_argument("--family", metavar="TYPE", help="model_type, where it is not clear (mistral rather than llama)")
    common.add_layout(parser)


def run(args: argparse.Namespace) -> int:
    running, layout = common.start(args)
    if common.is_run(Path(args.model)):
        import jax.numpy as jnp

        from mllm_jax.data.templates import chat_template
        from mllm_jax.hf.export import export

        recipe, cfg, params, tokenizer = common.open_model(args.model, layout)
        chat = chat_template(common.text_of(recipe, cfg)[0], tokenizer) if hasattr(cfg, "decoder") else None
        export(params, cfg, args.out, tokenizer=tokenizer, chat_template=chat, family=args.family,
               dtype=args.dtype and jnp.dtype(args.dtype))
    else:
        from mllm_jax.config import ConfigError
        from mllm_jax.hf.convert import convert_folder

        if args.dtype or args.family:
            raise ConfigError("--dtype and --family are for runs; imported weights are written as they were")
        convert_folder(args.model, args.out, to="hf")
    if running.process == 0:
        print(f"Hugging Face folder: {args.out}")
    return 0
