"""How fast steps of seven and eight billion parameters are on chips of each kind, against what others reach.

    python benchmarks/speed.py                      what docs/speed.jsonl has not yet; then the table of docs/speed.md
    python benchmarks/speed.py --print              only the table

Packed rows of 4,096 positions in LLaVA-1.5's second stage, 4 images in each, with the encoder frozen and trained; and text alone, Llama 2
and 3.1, all parameters trained.  Compiled as `train` runs them (mllm_jax/plan), and kept as they are made (plans.py).  MaxText's programs
of the same shapes, compiled for the same chips and replayed in the same way, are what they are compared with.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import plans  # noqa: E402
from benchmarks.plans import Job, Row, key  # noqa: E402

FILE, PAGE = (ROOT / "docs" / f"speed.{kind}" for kind in ("jsonl", "md"))
V5E, V5P, V6E = "v5e:16x16", "v5p:4x4x4", "v6e:16x16"
KEEP = "remat=qkv+attention+mlp"
INT8 = f"{KEEP},quantize=int8"
TRAINED = "LLaVA-1.5-7B, encoder trained"
# What is planned: rows a chip, positions of a row, topology, layout; and the MFU that is wanted, in percent.
PROGRAMS: tuple[tuple[str, int, int, str, str, str], ...] = (
    ("LLaVA-1.5-7B", 1, 4096, V5E, KEEP, "60"),
    ("LLaVA-1.5-7B", 2, 4096, V5P, KEEP, "65"),
    ("LLaVA-1.5-7B", 2, 4096, V6E, KEEP, "45"),
    (TRAINED, 1, 4096, V5E, KEEP, "at most 5 less"),
    (TRAINED, 2, 4096, V5P, KEEP, "at most 5 less"),
    (TRAINED, 2, 4096, V6E, KEEP, "at most 5 less"),
    ("Llama-2-7B", 1, 4096, V5E, KEEP, "57 (MaxText 54.3)"),
    ("Llama-2-7B", 4, 4096, V5P, KEEP, "57 (MaxText 54.1)"),
    ("Llama-3.1-8B", 1, 8192, V6E, KEEP, "(MaxText 45.5, measured)"),
    ("LLaVA-1.5-7B", 1, 4096, V5E, INT8, ""),
    ("LLaVA-1.5-7B", 2, 4096, V5P, INT8, ""),
    ("LLaVA-1.5-7B", 2, 4096, V6E, INT8, ""),
)


def jobs() -> list[Job]:
    return [dict(zip(("model", "rows", "positions", "topology", "layout"), program[:-1], strict=True)) for program in PROGRAMS]


def one(job: Job) -> Row:
    from mllm_jax.config import load
    from mllm_jax.decoders import transformer as llm
    from mllm_jax.launch import layouts
    from mllm_jax.models.mllm import MLLMConfig
    from mllm_jax.plan.report import Options, plan
    from mllm_jax.plan.topology import topology

    on, recipe = topology(job["topology"]), load("projector/llava_15")
    text = {"Llama-2-7B": llm.LLAMA, "Llama-3.1-8B": llm.LLAMA_3_1_8B}.get(job["model"])
    stage = recipe.stages["instruct"]
    data = replace(stage.data, batch_size=job["rows"] * len(on.devices), seq_len=job["positions"], items={} if text else {"image": 4})
    if text or job["model"] == TRAINED:
        stage = replace(stage, train=("*",))
    recipe = replace(recipe, model=MLLMConfig(inputs={}, decoder=text) if text else recipe.model, stages={"step": replace(stage, data=data)})
    words = f"auto:{job['layout']}"
    return plans.summary(plan(job["model"], recipe, "step", on, layouts.find(words, "tpu"), Options(measure=0)))


def table(rows: Mapping[str, Row]) -> Iterator[str]:
    yield "| model | chips | rows a chip | layers keep | HBM, GiB | step | wires waited for | MFU | wanted |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for job, program in zip(jobs(), PROGRAMS, strict=True):
        shape = f"| {job['model']} | {job['topology']} | {job['rows']} x {job['positions']:,} | {_kept(job['layout'])} |"
        row = rows.get(key(job))
        if why := plans.lacks(row):
            yield f"{shape} {why} | | | | {program[-1]} |"
            continue
        waits = sum(x[-1] for x in row["sent"])
        yield (f"{shape} {row['hbm_gib']:.1f} of {row['hbm_of']:.0f} | {1e3 * row['step']:,.0f} ms | {1e3 * waits:.0f} ms | "
               f"{100 * row['mfu']:.1f} % | {program[-1]} |")


def _kept(words: str) -> str:
    """remat=a,quantize=b -> a; in b"""
    return "; in ".join(word.partition("=")[2] for word in words.split(","))


def main() -> None:
    if plans.alone(one):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plans.add_arguments(parser, FILE, PAGE)
    args = parser.parse_args()
    if not args.print:
        plans.make(Path(__file__), jobs(), args.out, args.jobs, 60 * args.limit, args.again)
        plans.put(args.page, table(plans.read(args.out)))
    print("\n".join(table(plans.read(args.out))))


if __name__ == "__main__":
    main()
