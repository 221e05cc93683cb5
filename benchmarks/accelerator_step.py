"""Training steps on the accelerators that are here: time, MFU, rows, images and tokens a second, memory.

    python benchmarks/accelerator_step.py [nanovlm smolvlm] [--layout h200-1] [--steps 20] [--json FILE]

    nanovlm     the shape of nanoVLM-222M (github.com/huggingface/nanoVLM): SigLIP B/16 at 224, squares of four patches become one
                of 49 tokens, SmolLM2-135M; 256 rows of 128, an image in each, all parameters train
    smolvlm     SmolVLM-2.2B (projector/idefics3:size=2.2b): SigLIP So400m at 384, 81 tokens a tile, SmolLM2-1.7B; 8 rows of
                4096, each four examples of four tiles, all parameters train

Before them: what the device makes of a plain product of matrices in bfloat16, which is the limit, and how far its attention
kernel is from float32, forward and backward, on packed rows.  Batches are random and stay on the device: the input has a
benchmark of its own (input_pipeline.py).  Memory is the compiler's.  `--tiny` runs all of it small, anywhere.

nanoVLM's authors give 6 hours on one H100 for 1.7 million samples: 78.7 a second, its input included.
Exits non-zero where attention is wrong.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sharding
from mllm_jax.chips import GIB, peak_of
from mllm_jax.config import load
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.shuffle import ShuffleConfig
from mllm_jax.data.batch import blank_batch
from mllm_jax.data.pack import RowSpec
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.launch import layouts
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.attention import attend, kernel
from mllm_jax.nn.visibility import Visibility
from mllm_jax.objectives import NextToken
from mllm_jax.plan.program import lower
from mllm_jax.recipe import Adam, Data, Recipe, Stage
from mllm_jax.sharding import Layout
from mllm_jax.train.feed import to_device
from mllm_jax.train.flops import Counts, step_flops
from mllm_jax.train.optimizer import build
from mllm_jax.train.state import make_state
from mllm_jax.types import KINDS, Batch

WRONG = 2e-2                            # of the norm of the result: bfloat16 has 8 bits, and a few of them are lost on the way


def nanovlm() -> tuple[Recipe, int, int]:
    """(recipe of one stage, examples in a row, tiles of each)."""
    image = TowerConfig(view=Square(size=224), encoder=replace(vit.SIGLIP_B16_224, pool="none"),
                        connector=ShuffleConfig(grid=14, side=2, mlp=MLPConfig(depth=1, bias=False)))
    data = Data(sources={"digits_questions": 1.0}, batch_size=256, seq_len=128, items={"image": 1}, trained=48)
    return of_one_stage(MLLMConfig(inputs={"image": image}, decoder=replace(llm.SMOLLM2_135M, vocab=49_152, head="tied")), data), 1, 1


def smolvlm() -> tuple[Recipe, int, int]:
    model = load("projector/idefics3:size=2.2b").model
    data = Data(sources={"digits_questions": 1.0}, batch_size=8, seq_len=4096, items={"image": 16}, trained=1024)
    return of_one_stage(model, data), 4, 4


SHAPES = {"nanovlm": nanovlm, "smolvlm": smolvlm}


def of_one_stage(model: MLLMConfig, data: Data) -> Recipe:
    stage = Stage(data=data, objectives={"lm": NextToken()}, optimizer=Adam(lr=1e-4, warmup=0.1), steps=1_000)
    return Recipe(paper="", tokenizer="bpe:384", model=model, stages={"step": stage})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="{nanovlm,smolvlm}", help="both by default")
    parser.add_argument("--layout", default="auto", help="as for training; auto: bfloat16, products are kept (remat=dots)")
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.shapes) - set(SHAPES):
        parser.error(f"no shape {', '.join(sorted(unknown))}; choose from {', '.join(SHAPES)}")
    kind, platform = jax.devices()[0].device_kind, jax.default_backend()
    layout = layouts.find(args.layout if args.layout != "auto" or platform == "cpu" else "auto:remat=dots", platform)
    layout = replace(layout, dtype="bfloat16")
    print(f"{jax.device_count()} x {kind}, jax {jax.__version__}, mesh {dict(layout.mesh)}, remat {layout.remat}")
    limit = products(512 if args.tiny else 8192)
    peak = peak_of([kind])
    print(f"products of matrices in bfloat16: {limit / 1e12:.3g} TFLOP/s" + (f", {limit / peak:.0%} of the maker's" if peak else ""))
    out, wrong = {"device": kind, "jax": jax.__version__, "products": limit}, 0.0
    for name in args.shapes or SHAPES:
        recipe, examples, tiles = SHAPES[name]()
        with sharding.use(layout, layout.make_mesh()):
            how, off = kernel(), attention(recipe.model.decoder, 256 if args.tiny else recipe.stages["step"].data.seq_len)
        wrong = max(wrong, *off.values())
        print(f"{name}: attention by {how}, off by " + ", ".join(f"{k} {v:.1e}" for k, v in off.items()))
        if args.tiny:
            recipe = recipe.tiny()
        out[name] = measured = step(recipe, layout, examples, tiles, args.steps) | {"attention": off}
        print(f"{name}: " + report(measured, limit, peak * jax.device_count()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    if wrong > WRONG:
        sys.exit(f"attention is off by {wrong:.1e} of its norm, more than {WRONG:.0e}")


def products(n: int, times: int = 32) -> float:
    """FLOP/s of one device."""
    a, b = (jax.random.normal(jax.random.key(k), (n, n), jnp.bfloat16) / n**0.5 for k in range(2))
    many = jax.jit(lambda a, b: jax.lax.fori_loop(0, times, lambda _, x: x @ b, a))
    many(a, b).block_until_ready()
    took = []
    for _ in range(5):
        began = time.perf_counter()
        many(a, b).block_until_ready()
        took.append(time.perf_counter() - began)
    return 2 * n**3 * times / float(np.median(took))


def attention(cfg: Any, s: int) -> dict[str, float]:
    """Difference of the kernel in bfloat16 from float32 by XLA, as part of the norm: of the result and of the gradients."""
    heads, width = (cfg.heads, cfg.kv_heads or cfg.heads), cfg.head_dim or cfg.width // cfg.heads
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (2, s, n, width)) for key, n in zip(keys, (heads[0], heads[1], heads[1], heads[0]), strict=True))
    segments = jnp.broadcast_to(1 + jnp.arange(s) // (s // 3 + 1), (2, s))
    order = jnp.broadcast_to(jnp.arange(s), (2, s))
    seen = Visibility(segments=segments, order=order, key_segments=segments, key_order=order, causal=True)

    def run(dtype: str, how: str) -> tuple[jax.Array, ...]:
        layout = replace(sharding.current(), dtype=dtype, attention=how)
        with sharding.use(layout, sharding.current_mesh()), jax.default_matmul_precision("highest"):
            function = lambda *x: attend(*x, seen)
            out, back = jax.vjp(jax.jit(function), *(x.astype(dtype) for x in (q, k, v)))
            return out, *back(g.astype(dtype))

    ours, exact = run("bfloat16", "auto"), run("float32", "xla")
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32)))
    return {name: norm(a.astype(jnp.float32) - b) / norm(b) for name, a, b in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True)}


def full_batch(model: MLLMConfig, spec: RowSpec, rows: int, examples: int, tiles: int) -> Batch:
    """Rows full of examples, each of so many tiles and then text, of which as much is trained as the rows have room for."""
    rng = np.random.default_rng(0)
    batch = jax.tree.map(np.array, blank_batch(rows, spec))
    length, (tower,) = spec.seq_len // examples, model.inputs.values()
    place = np.arange(spec.seq_len)
    example, inside = np.minimum(place // length, examples - 1), place % length
    n = prod(tower.num_tokens(tower.nominal.grid))
    shown = inside < n * tiles
    slot = np.where(shown, example * n * tiles + inside, -1)
    text = np.flatnonzero(~shown)
    trained = np.sort(rng.permutation(text[:-1])[:spec.trained or len(text)])
    whole = lambda x, dtype=np.int32: np.broadcast_to(x, (rows, *np.shape(x))).astype(dtype)
    (modality, room), = batch.media.items()
    values = rng.integers(0, 256, room.values.shape, np.uint8)
    media = {modality: replace(room, values=values, mask=np.ones_like(room.mask), slot=whole(slot))}
    weights = np.isin(place, trained)
    bound = None if spec.trained is None else whole(np.pad(trained, (0, spec.trained - len(trained)), constant_values=-1))
    draw = lambda: rng.integers(3, model.decoder.vocab, (rows, spec.seq_len), np.int32)
    return replace(batch, tokens=draw(), targets=draw(), weights=whole(weights, np.float32), segments=whole(example + 1), trained=bound,
                   positions=whole(np.repeat(inside[:, None], 3, 1)), kinds=whole(np.where(shown, KINDS[modality], 0)), media=media)


def step(recipe: Recipe, layout: Layout, examples: int, tiles: int, steps: int) -> dict[str, float]:
    """What a training step of the recipe takes on the devices that are here."""
    program = lower(recipe, "step", layout, jax.devices())
    stage, mesh, blueprint = program.stage, program.mesh, program.blueprint
    began = time.perf_counter()
    run = program.lowered.compile()
    compiled, memory = time.perf_counter() - began, run.memory_analysis()
    rows, s = stage.data.batch_size, program.spec.seq_len
    examples, tiles = min(examples, max(1, s // 64)), min(tiles, program.spec.media["image"].items)
    if examples * tiles > program.spec.media["image"].items:
        examples = 1
    host = full_batch(program.model, program.spec, rows, examples, tiles)
    with sharding.use(layout, mesh):
        state = make_state(blueprint.init(0), program.trained, build(stage.optimizer, stage.steps, sorted(program.trained)), blueprint)
        batch, key = to_device(host, mesh), jax.random.key(0)
        for _ in range(3):
            state, means = run(state, batch, key)
        first = float(means["loss"].value)
        began = time.perf_counter()
        for _ in range(steps):
            state, means = run(state, batch, key)
        last = float(means["loss"].value)
    seconds = (time.perf_counter() - began) / steps
    if not last < first:
        sys.exit(f"the loss went from {first:.3f} to {last:.3f} on one batch: this is no training step")
    images = rows * examples * tiles
    counts = Counts(rows=rows, tokens=rows * s, squares=rows * examples * (s / examples) ** 2, trained=float((host.weights > 0).sum()),
                    items={"image": images})
    return {"seconds": seconds, "flops": float(step_flops(program.model, program.trained, counts)), "rows": rows, "tokens": rows * s,
            "images": images, "compile_seconds": compiled, "parameters": sum(prod(x.shape) for x in blueprint.shapes.values()),
            "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes}


def report(m: dict, limit: float, peak: float) -> str:
    rate = m["flops"] / m["seconds"]
    of = lambda what: f"{m[what] / m['seconds']:,.0f} {what}/s"
    return (f"{m['parameters'] / 1e6:,.3g} M parameters, a step takes {1e3 * m['seconds']:.1f} ms; {of('rows')}, {of('images')}, {of('tokens')}; "
            f"{rate / 1e12:.3g} TFLOP/s of the model, {rate / limit / jax.device_count():.0%} of the products' rate"
            + (f", MFU {rate / peak:.1%}" if peak else "") + f"; {m['bytes'] / GIB:.2f} GiB of a device; compiled in {m['compile_seconds']:.0f} s")


if __name__ == "__main__":
    main()
