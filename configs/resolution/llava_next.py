"""LLaVA-NeXT (LLaVA 1.6, llava-vl.github.io/blog/2024-01-30-llava-next): LLaVA-1.5 that cuts an image into tiles of its own shape.

New here: up to four tiles beside the whole image, what was padded is left out, a learned newline ends each row, and the tower trains.
Source: LLaVA-VL/LLaVA-NeXT, scripts/train/{pretrain,finetune}_clip.sh, and 779k public examples of the 760k used.  Unverified: the
batch of 128 (80 packed rows hold about as many) and the rate of 2e-5.
"""

from dataclasses import replace

from mllm_jax.configs.projector import llava_15
from mllm_jax.data.layouts import AnyRes
from mllm_jax.data.tiles import NEXT_OFFICIAL, Tiles
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.nn.position import Rope
from mllm_jax.recipe import Adam, Data, Recipe

# Language model, published size of all, name, template, learning rate and the factor on it that makes 2e-6 of the tower's.
SIZES = {
    "7b": (llm.VICUNA_7B, 7.06e9, "hf://lmsys/vicuna-7b-v1.5", "vicuna_v1", 2e-5, 0.1),
    "13b": (llm.VICUNA_13B, 13.35e9, "hf://lmsys/vicuna-13b-v1.5", "vicuna_v1", 1e-5, 0.2),
    "mistral_7b": (replace(llm.MISTRAL_7B, rope=Rope(theta=1e6)), 7.57e9, "hf://mistralai/Mistral-7B-Instruct-v0.2", "tokenizer", 2e-5, 0.1),
}


def recipe(size: str = "7b") -> Recipe:
    base, (decoder, params, name, template, lr, tower_lr) = llava_15.recipe(), SIZES[size]
    one = replace(base.model.inputs["image"], view=Square(size=336, crop=True))
    tower = replace(one, view=Tiles(size=336, pinpoints=NEXT_OFFICIAL), layout=AnyRes())
    simple = replace(base.model, inputs={"image": one}, decoder=replace(decoder, vocab=32_064))
    align, instruct = base.stages.values()
    parts = ("inputs/image/encoder", "inputs/image/connector", "decoder")
    data = Data(sources={"llava_next_779k": 1.0}, batch_size=80, seq_len=4_096, template=template, items={"image": 10}, overlong="truncate")
    return replace(
        base,
        paper="llava-vl.github.io/blog/2024-01-30-llava-next", params=params, tokenizer=name, model=replace(simple, inputs={"image": tower}),
        stages={
            "align": replace(align, model=simple, weights=align.weights | {"decoder": name}),
            "instruct": replace(
                instruct, data=data, optimizer=Adam(lr=lr, lr_scale={"inputs/image/encoder/*": tower_lr}), steps=6_088, train=("*",),
                weights={part: f"stage://align/{part}" for part in parts}),
        },
    )
