"""`mllm-jax export`: a trained run as a Hugging Face folder."""

import argparse
from pathlib import Path
from typing import Any

from mllm_jax.commands import common

HELP = """Write a run as a Hugging Face folder, for transformers.

Adapters (LoRA) are merged.  With --adapter they are written alone, as a folder that peft opens on its base.  Imported
weights, too, go back into the folder that they came from, byte for byte.

examples:
  mllm-jax export runs/first-digits exported
  mllm-jax export runs/projector-llava_15 exported --dtype bfloat16
  mllm-jax export runs/projector-llava_15 adapter --adapter
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run (runs/first-digits), or a folder that `import` wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not hold anything else")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (default: as trained)")
    parser.add_argument("--family", metavar="TYPE", help="model_type, where it is not clear (mistral rather than llama)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--adapter", action="store_true", help="what the last stage trained, with its adapters apart, for peft")
    part.add_argument("--base", action="store_true", help="the model without the adapters of its last stage")
    common.add_layout(parser)


def run(args: argparse.Namespace) -> int:
    running, layout = common.start(args)
    if common.is_run(Path(args.model)):
        import jax.numpy as jnp

        from mllm_jax.data.templates import chat_template, generation
        from mllm_jax.hf.export import export
        from mllm_jax.hf.peft import without_adapters

        recipe, cfg, params, tokenizer = common.open_model(args.model, layout)
        dtype = args.dtype and jnp.dtype(args.dtype)
        if args.adapter:
            return _adapter(args, recipe, params, running, family=args.family, dtype=dtype)
        params, cfg = without_adapters(params, cfg) if args.base else (params, cfg)
        template = common.text_of(recipe, cfg)[0]
        writes = {} if not hasattr(cfg, "decoder") else {
            "chat_template": chat_template(template, tokenizer), "generation": generation(template, tokenizer)}
        export(params, cfg, args.out, tokenizer=tokenizer, **writes, family=args.family, dtype=dtype)
    else:
        from mllm_jax.config import ConfigError
        from mllm_jax.hf.convert import convert_folder

        if args.dtype or args.family or args.adapter or args.base:
            raise ConfigError("--dtype, --family, --adapter and --base are for runs; imported weights are written as they were")
        convert_folder(args.model, args.out, to="hf")
    if running.process == 0:
        print(f"Hugging Face folder: {args.out}")
    return 0


def _adapter(args: argparse.Namespace, recipe: Any, params: Any, running: Any, **options: Any) -> int:
    from mllm_jax.train.adapters import save_adapters
    from mllm_jax.train.run import last_stage

    base = save_adapters(recipe, last_stage(Path(args.model), recipe), params, args.out, **options)
    if running.process == 0:
        print(f"PEFT adapter: {args.out}\nits base: {base or f'mllm-jax export {args.model} BASE --base'}")
    return 0
