"""`mllm-jax generate`: what a model answers to one prompt with images or videos."""

import argparse
from pathlib import Path
from typing import Any

from mllm_jax.commands import common

HELP = """Answer a prompt about images and videos.

examples:
  mllm-jax generate runs/first-digits --image scene.png --prompt "what is the sum of the digits?"
  mllm-jax generate runs/first-digits --source digits_test --index 3
  mllm-jax generate llava-1.5-7b-hf --image a.jpg --image b.jpg --prompt "What differs?" --temperature 0.2
  mllm-jax generate llava-onevision-qwen2-7b-ov-hf --video a.mp4 --prompt "What happens?"
  mllm-jax generate runs/resolution-m3 --image a.jpg --prompt "What is it?" --set "inputs.image.connector.windows=(4,)"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="what the user says")
    asked.add_argument("--source", metavar="NAME", help="ask what a record of this data set asks, about its images")
    parser.add_argument("--index", type=int, default=0, metavar="N", help="of the record in --source (default: 0)")
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}", dest="media", type=lambda file, kind=kind: (kind, Path(file)), action="append", default=[], metavar="FILE",
            help=f"stands before the prompt; once for each {kind}")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--template", metavar="NAME", help="chat format (default: that of the run, or the tokenizer's own)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="the answer is at most so long (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: always the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="choose among the likeliest tokens of probability P together")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    common.add_changes(parser)
    common.add_data_root(parser)
    common.add_layout(parser)


def run(args: argparse.Namespace) -> int:
    for kind, file in args.media:
        if not file.is_file():
            raise FileNotFoundError(2, f"no such {kind}", str(file))
    running, layout = common.start(args)
    recipe, cfg, params, tokenizer = common.open_model(args.model, layout, args.changes)

    from mllm_jax.config import ConfigError
    from mllm_jax.generate import Generator, Sampling

    if not hasattr(cfg, "decoder"):
        raise ConfigError(f"{args.model} is a {type(cfg).__name__} and does not write text; use `mllm-jax evaluate`")
    takes = {*cfg.inputs, *(kind for tower in cfg.inputs.values() for kind in tower.also)}
    if odd := {kind for kind, _ in args.media} - takes:
        raise ConfigError(f"{args.model} takes no {odd.pop()}s; it has inputs for: {', '.join(sorted(takes - {'images'})) or 'text alone'}")
    example = from_source(args.source, args.index, args.data_root) if args.source else from_prompt(args)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, max_new_tokens=args.max_new_tokens)
    template = args.template or common.text_of(recipe, cfg)[0]
    generator = Generator(cfg, params, tokenizer, layout=layout, template=template)
    answer = generator([example], sampling, args.seed)[0]
    if running.process == 0 and args.source:
        print(f"question: {question_of(example)}\nanswer: {answer}\nright: {' | '.join(example.answers)}")
    elif running.process == 0:
        print(answer)
    return 0


def from_prompt(args: argparse.Namespace) -> Any:
    """The example of a conversation that begins with these media and this text."""
    from mllm_jax.types import Blob, Example, Part, Turn

    asked = (*(Part(kind=kind, media=i) for i, (kind, _) in enumerate(args.media)), Part(text=args.prompt))
    system = (Turn(role="system", parts=(Part(text=args.system),)),) if args.system else ()
    media = tuple(Blob(kind=kind, data=file.read_bytes()) for kind, file in args.media)
    return Example(id="prompt", turns=(*system, Turn(role="user", parts=asked)), media=media)


def from_source(name: str, index: int, root: Path | None) -> Any:
    """A record of a data set.

    Raises:
      ConfigError: it has not so many.
    """
    from mllm_jax.config import ConfigError
    from mllm_jax.data.sources import open_source

    source = open_source(name, root)
    if not 0 <= index < len(source):
        raise ConfigError(f"{name} has {len(source)} records; --index {index} is not one of them")
    return source[index]


def question_of(example: Any) -> str:
    users = [t for t in example.turns if t.role == "user"]
    return "".join(p.text for p in users[-1].parts if p.kind == "text").strip() if users else ""
