"""A training step (forward, backward, AdamW) against transformers on PyTorch: same weights, same batch, float32.

    python benchmarks/train_step.py [clip llava] [--pairs 8]

    clip    ViT 12 x 384 at 224/16 beside a text tower 8 x 384 of 77 tokens; InfoNCE, batch 16
    llava   ViT 12 x 384 at 224/16, MLP, decoder 8 x 512 with 32,000 tokens; batch 8 of rows of 512, an image of 196
            tokens in each, 25 % of the text positions supervised.  Both run all layers of the ViT.

Both are tuned as a user would. Theirs: attention of `torch` (SDPA), the faster of fused and foreach AdamW, a causal
mask that is never materialized (no padding mask is given), as many threads as cores, no torch.compile. Ours:
`make_step` under the layout that `auto` gives on this machine, jitted, its state donated. Neither clips gradients.
One process, started with large memory pages, which both use.

The losses of the first step, before anything is timed, must agree. Then the two take turns of three steps, each
going first in every second pair of turns. The first step of a turn is not counted: it finds the memory as the other
left it, and pays for the page faults (measured: 1.4 times the CPU time of the next one, for both), which in a
training run happens once. What is printed is the median of the ratios of neighbouring turns, of wall time and of CPU
time. Wall time counts on a quiet machine. On a busy one start it on one core (`taskset -c 0`) and read the CPU time:
with several threads those of OpenMP wait for one another where XLA's take other work, so a busy machine slows theirs
more.
"""

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mllm_jax.launch import layouts, runtime

VIT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
       "image_size": 224, "patch_size": 16}
TEXT = {"vocab_size": 49_408, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 6, "max_position_embeddings": 77, "bos_token_id": 49_406, "eos_token_id": 49_407,
        "pad_token_id": 49_407}
LLAMA = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
         "num_attention_heads": 8, "max_position_embeddings": 512}
IMAGE_TOKEN, PATCHES, ROW, SUPERVISED = 31_999, 196, 512, 0.25
LR, DECAY, B1, B2, EPS = 1e-4, 0.1, 0.9, 0.999, 1e-8
LOSS = 1e-4             # relative: float32 sums in another order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="{clip,llava}", help="both by default")
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}; choose from {', '.join(MODELS)}")
    runtime.huge_pages()
    runtime.start("cpu", cache=False)
    import jax
    import torch
    import transformers

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"{_cpu()}, {cores} cores, load {os.getloadavg()[0]:.1f}")
    print(f"jax {jax.__version__}; torch {torch.__version__}, transformers {transformers.__version__}")
    for name in args.models or MODELS:
        compare(name, args.pairs)


def compare(name: str, pairs: int) -> None:
    model, inputs, batch, objective = MODELS[name]()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        step, ours_loss = ours(Path(folder), batch, objective)
    other, theirs_loss, adam = theirs(model, inputs)
    off = abs(ours_loss - theirs_loss) / abs(theirs_loss)
    print(f"{name}: loss {ours_loss:.6f}, theirs {theirs_loss:.6f}; theirs with {adam} AdamW", flush=True)
    if off > LOSS:
        sys.exit(f"the losses differ by {off:.1e}, more than {LOSS:.0e}: this is not the same model")
    times = []                              # [pair, ours or theirs, wall or CPU]
    for i in range(pairs):
        order = (step, other) if i % 2 else (other, step)
        took = {f: turn(f) for f in order}
        times.append((took[step], took[other]))
    times = np.array(times)
    for k, what in enumerate(("wall", "CPU")):
        a, b = np.median(times[:, :, k], axis=0)
        ratios = times[:, 0, k] / times[:, 1, k]
        each = " ".join(f"{r:.2f}" for r in ratios)
        print(f"{name}: {what} time of ours {a:.2f} s, theirs {b:.2f} s, ratio {np.median(ratios):.3f} "
              f"(in turn {each})", flush=True)


def clip(rows: int = 16) -> tuple:
    """(model of transformers, its inputs, our batch, our objective)."""
    import torch
    import transformers as hf

    from mllm_jax.objectives import InfoNCE

    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VIT, projection_dim=384))
    eos, s = TEXT["eos_token_id"], TEXT["max_position_embeddings"]
    lengths = rng.integers(8, s + 1, rows)
    real = np.arange(s) < lengths[:, None]
    tokens = np.where(np.arange(s) < lengths[:, None] - 1, rng.integers(0, 49_000, (rows, s)), eos)
    pixels = rng.integers(0, 256, (rows, 224, 224, 3)).astype(np.uint8)
    inputs = {"input_ids": torch.tensor(tokens), "pixel_values": as_theirs(pixels), "return_loss": True}
    none = np.full((rows, s), -1)
    return model, inputs, as_ours(tokens, np.zeros((rows, s)), real, pixels, none), {"pairs": InfoNCE()}


def llava(rows: int = 8) -> tuple:
    """(model of transformers, its inputs, our batch, our objective)."""
    import torch
    import transformers as hf

    from mllm_jax.objectives import NextToken

    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT), text_config=hf.LlamaConfig(**LLAMA, use_cache=False),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-1, image_seq_length=PATCHES))
    at = np.broadcast_to(np.arange(ROW), (rows, ROW))
    image = (at >= 20) & (at < 20 + PATCHES)
    tokens = np.where(image, IMAGE_TOKEN, rng.integers(3, 31_000, (rows, ROW)))
    # The last tokens of the row are the answer; a position predicts the token after it.
    answer = at >= ROW - round(SUPERVISED * (ROW - PATCHES))
    pixels = rng.integers(0, 256, (rows, 224, 224, 3)).astype(np.uint8)
    inputs = {"input_ids": torch.tensor(tokens), "pixel_values": as_theirs(pixels),
              "labels": torch.tensor(np.where(answer, tokens, -100))}
    weights = np.pad(answer[:, 1:], ((0, 0), (0, 1)))
    batch = as_ours(tokens, weights, np.ones_like(tokens), pixels, np.where(image, at - 20, -1))
    return model, inputs, batch, {"lm": NextToken()}


MODELS = {"clip": clip, "llava": llava}


def ours(folder: Path, batch: object, objectives: dict) -> tuple[Callable, float]:
    """A function that takes a step, and the loss of the first one."""
    import jax

    from mllm_jax import sharding
    from mllm_jax.hf.load import load
    from mllm_jax.recipe import Adam
    from mllm_jax.train.feed import to_device
    from mllm_jax.train.optimizer import build
    from mllm_jax.train.state import Blueprint, make_state, trained_paths
    from mllm_jax.train.step import make_step

    layout = layouts.auto("cpu")
    mesh = layout.make_mesh()
    with sharding.use(layout, mesh):
        cfg, _ = load(folder)
        blueprint = Blueprint(cfg, layout, mesh)
        _, params = load(folder, cfg, shardings={k: v.sharding for k, v in blueprint.shapes.items()})
        trained = trained_paths(blueprint.shapes, ("*",))
        adam = Adam(lr=LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, clip=None, warmup=0, schedule="constant")
        optimizer = build(adam, 1000, sorted(trained))
        state = make_state(params, trained, optimizer, blueprint)
        batch = to_device(batch, mesh)
        key = jax.random.key(0)
        train = make_step(blueprint.graph, objectives, optimizer, microbatches=layout.microbatches)
        program = jax.jit(train, donate_argnums=0).lower(state, batch, key).compile()
    del params

    def step() -> float:
        nonlocal state
        state, scores = program(state, batch, key)
        jax.block_until_ready(state)
        return float(scores["loss"].value)

    return step, step()


def theirs(model: object, inputs: dict) -> tuple[Callable, float, str]:
    """A function that takes a step, the loss of the first one, and which AdamW is the faster."""
    import torch

    model.train()
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    make = lambda **kind: torch.optim.AdamW(groups, lr=LR, betas=(B1, B2), eps=EPS, **kind)
    kinds = {"fused": make(fused=True), "foreach": make(foreach=True)}

    def step(optimizer: torch.optim.Optimizer) -> float:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    first = step(kinds["fused"])
    step(kinds["foreach"])                                      # its moments are made in its first step
    model(**inputs).loss.backward()
    best = min(kinds, key=lambda k: min(seconds(kinds[k].step)[0] for _ in range(3)))
    chosen = kinds[best]
    kinds.clear()
    chosen.zero_grad(set_to_none=True)
    gc.collect()
    return lambda: step(chosen), first, best


def as_theirs(pixels: np.ndarray) -> object:
    """u8[b h w c] -> f32[b c h w], normalized as CLIP's processor does."""
    import torch

    from mllm_jax.encoders.vit import CLIP_MEAN, CLIP_STD

    x = (pixels.astype(np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.tensor(x.transpose(0, 3, 1, 2)).contiguous()


def as_ours(tokens: np.ndarray, weights: np.ndarray, real: np.ndarray, pixels: np.ndarray, slot: np.ndarray) -> object:
    """Rows of one example with one image."""
    from einops import rearrange

    from mllm_jax.types import KINDS, Batch, Media

    as_int = lambda x: np.asarray(x, np.int32)
    b, s = tokens.shape
    values = rearrange(pixels, "b (y r) (x c) u -> b 1 (y x) (r c u)", r=16, c=16)
    coords = np.zeros((b, 1, PATCHES, 3), np.int32)
    media = Media(values=values, coords=coords, mask=np.ones((b, 1), bool), slot=as_int(slot))
    return Batch(
        tokens=as_int(tokens), targets=as_int(np.roll(tokens, -1, axis=1)), weights=np.asarray(weights, np.float32),
        segments=as_int(real), positions=as_int(np.broadcast_to(np.arange(s)[:, None], (b, s, 3))),
        kinds=as_int(np.where(slot >= 0, KINDS["image"], KINDS["text"])), media={"image": media})


def turn(f: Callable) -> np.ndarray:
    """The mean of two steps after one that is not counted."""
    f()
    return np.mean([seconds(f), seconds(f)], axis=0)


def seconds(f: Callable) -> tuple[float, float]:
    """Wall time, and CPU time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
