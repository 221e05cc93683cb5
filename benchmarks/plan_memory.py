"""How near the model of memory (mllm_jax/plan/analytic.py) comes to the compiler: bytes of a chip by both, for pairs of recipe and topology.

    python benchmarks/plan_memory.py [--out FILE] [NAME ...]

Every pair is one line of JSON in the file; those that are there are not compiled again, but the model is asked again.  Prints the
table of all lines.  Pairs named d... were looked at while the model was made, the others are what it is tested by.  No TPU is
needed, but `pip install mllm_jax[plan]`, and for all pairs an hour or two of two cores.  Exits non-zero where the model of a tested
pair is more than 5 % off.
"""

import argparse
import json
import sys
from pathlib import Path

from mllm_jax.chips import GIB
from mllm_jax.config import load, override
from mllm_jax.launch import layouts
from mllm_jax.plan import program as programs
from mllm_jax.plan.analytic import needs
from mllm_jax.plan.memory import memory
from mllm_jax.plan.topology import topology

# name: recipe, stage (None: the last), topology, layout, overrides
PAIRS = {
    "d1": ("projector/llava_15", None, "v5e:2x2", "auto:remat=qkv+attention", "model.decoder.depth=2", "stages.instruct.data.batch_size=16"),
    "d2": ("projector/gemma3", None, "v5e:4x4", "auto"),
    "mobilevlm": ("projector/mobilevlm", None, "v5e:4x4", "auto"),
    "llava_15": ("projector/llava_15", None, "v5p:2x2x4", "auto:remat=qkv+attention+mlp"),
    "siglip": ("contrastive/siglip", None, "v6e:8x8", "auto"),
    "paligemma": ("projector/paligemma", "px448", "v5p:4x4x4", "auto:microbatches=4"),
    "honeybee": ("projector/honeybee", None, "v6e:4x4", "auto:remat=attention"),
    "qwen2_vl": ("resolution/qwen2_vl", None, "v5e:16x16", "auto:microbatches=4"),
    "moe_llava": ("experts/moe_llava", None, "v5e:4x4", "auto"),
    "blip2": ("resampler/blip2", None, "v5e:4x4", "auto"),
    "m3": ("resolution/m3", None, "v6e:4x4", "auto:microbatches=4"),
    "clip": ("contrastive/clip", None, "v5e:16x16", "auto"),
    "instructblip": ("resampler/instructblip", None, "v5e:4x4", "auto:remat=qkv+attention"),
    "mobilevlm_v2": ("projector/mobilevlm_v2", None, "v5p:2x2x4", "auto:remat=qkv+attention+out+mlp"),
}
WITHIN = 0.05


def lowered(recipe: str, stage: str | None, on: str, layout: str, *overrides: str) -> programs.Program:
    made = load(recipe)
    for one in overrides:
        made = override(made, one)
    return programs.lower(made, made.stage_name(stage), layouts.find(layout, "tpu"), list(topology(on).devices))


def measured(program: programs.Program) -> dict:
    """Of the compiler; `total` is missing where it refuses."""
    compiled = programs.compile(program)
    if compiled.refusal:
        return {"refusal": compiled.refusal[:200], "seconds": round(compiled.seconds)}
    found = memory(compiled)
    return {"total": found.total, "arguments": found.arguments, "code": found.code, "seconds": round(compiled.seconds)}


def table(lines: dict[str, dict]) -> str:
    rows = ["| recipe | topology | layout | compiler, GiB | of that arguments | model, GiB | off by |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for name, line in lines.items():
        recipe, stage, on, layout, *overrides = PAIRS[name]
        what = f"{recipe}{f', {stage}' if stage else ''}{' (made with it)' if name[0] == 'd' and name[1:].isdigit() else ''}"
        if "total" in line:
            rows.append(f"| {what} | {on} | {layout} {' '.join(overrides)} | {line['total'] / GIB:.2f} | {line['arguments'] / GIB:.2f} | "
                        f"{line['model'] / GIB:.2f} | {line['model'] / line['total'] - 1:+.1%} |")
        else:
            rows.append(f"| {what} | {on} | {layout} | {line['refusal'][:60]} | | {line['model'] / GIB:.2f} | |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PAIRS))
    parser.add_argument("--out", type=Path, default=Path("plan_memory.jsonl"))
    args = parser.parse_args()
    lines = {(line := json.loads(text))["name"]: line for text in (args.out.read_text().splitlines() if args.out.exists() else [])}
    for name in args.names:
        program = lowered(*PAIRS[name])
        lines[name] = {"name": name, **(lines[name] if name in lines else measured(program)), "model": needs(program).total}
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
        print(lines[name], file=sys.stderr, flush=True)
    print(table(lines))
    off = [n for n, line in lines.items() if not n[1:].isdigit() and "total" in line and abs(line["model"] / line["total"] - 1) > WITHIN]
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
