"""How near the model of memory (mllm_jax/plan/analytic.py) comes to the compiler: bytes of a chip by both, for pairs of recipe and topology.

    python benchmarks/plan_memory.py [--out FILE] [NAME ...]

Every pair is one line of JSON in the file; those that are there are not compiled again, but the model is asked again.  Prints the
table of all lines.  The compiler's word is that of its passes (plan/passes.py), so that the size of the code, some 50 MiB, is in
neither.  No TPU is needed, but `pip install mllm_jax[plan]`, and for all pairs a quarter of an hour.  Exits non-zero where the model of
one of PAIRS is more than 5 % off; those of UNSEEN, which no rule of the model was made with, only count in the table.
"""

import argparse
import json
import sys
from pathlib import Path

from mllm_jax.chips import GIB
from mllm_jax.config import load
from mllm_jax.launch import layouts
from mllm_jax.plan import program as programs
from mllm_jax.plan.analytic import needs
from mllm_jax.plan.passes import quick
from mllm_jax.plan.topology import topology

# name: recipe, stage (None: the last), topology, layout, overrides
PAIRS = {
    "llava_15_small": ("projector/llava_15", None, "v5e:2x2", "auto:remat=qkv+attention",
                       "model.decoder.depth=2", "stages.instruct.data.batch_size=16"),
    "gemma3": ("projector/gemma3", None, "v5e:4x4", "auto"),
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
    "mobilevlm_v2_v5e": ("projector/mobilevlm_v2", None, "v5e:8x8", "auto:remat=qkv+attention+out+mlp"),
    "paligemma_parts": ("projector/paligemma", "pretrain", "v5e:8x8", "auto:microbatches=128"),
    "mm1": ("experts/mm1", None, "v5p:4x4x4", "auto"),
    "qwen_vl": ("resampler/qwen_vl", None, "v5e:8x8", "auto:remat=qkv+attention"),
    "moe_llava_v6e": ("experts/moe_llava", None, "v6e:4x4", "auto:remat=qkv+attention"),
}
UNSEEN = {
    "internvl": ("projector/internvl", None, "v5e:8x8", "auto:microbatches=4"),
    "internvl_v6e": ("projector/internvl", None, "v6e:8x8", "auto:microbatches=2"),
    "llava": ("projector/llava", None, "v5e:4x4", "auto"),
    "llava_next": ("resolution/llava_next", None, "v5p:2x2x4", "auto"),
    "llava_onevision": ("resolution/llava_onevision", None, "v6e:8x8", "auto"),
    "idefics": ("resampler/idefics", None, "v6e:8x8", "auto"),
    "idefics3": ("projector/idefics3", None, "v6e:8x8", "auto:microbatches=8"),
    "flamingo": ("resampler/flamingo", None, "v5p:2x4x4", "auto"),
    "cogvlm": ("experts/cogvlm", None, "v5e:8x8", "auto:microbatches=2"),
    "qwen2_vl_v5p": ("resolution/qwen2_vl", None, "v5p:4x4x4", "auto:microbatches=4"),
    "instructblip_v6e": ("resampler/instructblip", None, "v6e:4x4", "auto"),
    "clip_v6e": ("contrastive/clip", None, "v6e:8x8", "auto"),
    "paligemma_v5e": ("projector/paligemma", "pretrain", "v5e:8x8", "auto"),
}
ALL = {**PAIRS, **UNSEEN}
WITHIN = 0.05


def lowered(recipe: str, stage: str | None, on: str, layout: str, *overrides: str) -> programs.Program:
    made = load(recipe, *overrides)
    return programs.lower(made, made.stage_name(stage), layouts.find(layout, "tpu"), list(topology(on).devices))


def measured(recipe: str, stage: str | None, on: str, layout: str, *overrides: str) -> dict:
    """Of the compiler; `total` is missing where it refuses."""
    plan = quick(recipe, load(recipe, *overrides), stage, topology(on), layouts.find(layout, "tpu"))
    if not plan.fits:
        return {"refusal": plan.refusal[:200]}
    return {"total": plan.memory.total, "arguments": plan.memory.arguments}


def table(lines: dict[str, dict]) -> str:
    rows = ["| recipe | topology | layout | compiler, GiB | of that arguments | model, GiB | off by |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for name, line in lines.items():
        recipe, stage, on, layout, *overrides = ALL[name]
        what = f"{recipe}{f', {stage}' if stage else ''}{' (unseen)' if name in UNSEEN else ''}"
        if "total" in line:
            rows.append(f"| {what} | {on} | {layout} {' '.join(overrides)} | {line['total'] / GIB:.2f} | {line['arguments'] / GIB:.2f} | "
                        f"{line['model'] / GIB:.2f} | {line['model'] / line['total'] - 1:+.1%} |")
        else:
            rows.append(f"| {what} | {on} | {layout} | {line['refusal'][:60]} | | {line['model'] / GIB:.2f} | |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ALL))
    parser.add_argument("--out", type=Path, default=Path("plan_memory.jsonl"))
    args = parser.parse_args()
    lines = {(line := json.loads(text))["name"]: line for text in (args.out.read_text().splitlines() if args.out.exists() else [])}
    for name in args.names:
        found = needs(lowered(*ALL[name]))
        lines[name] = {"name": name, **(lines[name] if name in lines else measured(*ALL[name])), "model": found.total - found.code}
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
        print(lines[name], file=sys.stderr, flush=True)
    print(table(lines))
    off = [n for n, line in lines.items() if n in PAIRS and "total" in line and abs(line["model"] / line["total"] - 1) > WITHIN]
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
