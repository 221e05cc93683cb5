"""Qwen-VL (arXiv:2308.12966): 256 queries read a ViT-bigG, and boxes are words; three stages, in the end with conversations.

New here: one layer of cross-attention that knows where queries and patches stand, at 448 pixels after 224.  Mixtures: table 2 and 3.
Unverified: betas, eps, weight decay, the decay of the ViT's rate by layers (left out here), rows for examples when packed.
"""

from dataclasses import replace

from mllm_jax.connectors.resampler import SincosResamplerConfig
from mllm_jax.data.layouts import Spans
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage


def model(side: int) -> MLLMConfig:
    """For images of so many patches a side."""
    image = TowerConfig(
        view=Square(size=14 * side), encoder=replace(vit.OPENCLIP_BIGG_14_448, grid=side),
        connector=SincosResamplerConfig(grid=side, to=16, width=4096, heads=32),
        layout=Spans(before="<img>", after="</img>", specials=("<img>", "</img>")))
    return MLLMConfig(inputs={"image": image}, decoder=llm.QWEN_7B)


def recipe() -> Recipe:
    adam = Adam(lr=2e-4, warmup=500, end=0.005, weight_decay=0.05, b2=0.98, eps=1e-6)
    pairs = Data(sources={"qwen_vl_pairs_1400m": 1.0}, batch_size=5_120, seq_len=2_048, template="base", items={"image": 6},
                 overlong="truncate")
    tasks = replace(pairs, sources={"qwen_vl_tasks_77m": 1.0}, batch_size=1_024)
    chats = replace(pairs, sources={"qwen_vl_chats_350k": 1.0}, batch_size=128, template="chatml", items={"image": 4})
    lm = {"lm": NextToken()}
    return Recipe(
        paper="arXiv:2308.12966", params=9.6e9, tokenizer="hf://Qwen/Qwen-VL", model=model(32),
        stages={
            "pretrain": Stage(
                model=model(16), data=pairs, objectives=lm, optimizer=adam, steps=50_000, train=("inputs/image/*",),
                weights={"inputs/image/encoder": "hf://laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "decoder": "hf://Qwen/Qwen-7B"}),
            "tasks": Stage(data=tasks, objectives=lm, optimizer=replace(adam, lr=5e-5, warmup=400, end=0.2), steps=19_000),
            "chat": Stage(data=chats, objectives=lm, optimizer=replace(adam, lr=1e-5, warmup=3_000, end=0.1), steps=8_000,
                          train=("inputs/image/connector/*", "decoder/*")),
        })
