"""Qwen2-VL (arXiv:2409.12191): images at their own size, packed; rotations in place of a table; squares of patches merged; M-RoPE.

New here: a packed view and `place="grid"`.  model=2.5-...: windows, seconds (arXiv:2502.13923); 3-...: DeepStack, times in words.
Section 2.2 has stages and tokens.  Unverified: data, rates, batches, formats, when the merger trains, a video's budget, 3's sections.
"""

from dataclasses import replace

from mllm_jax.connectors.merge import MergeConfig
from mllm_jax.data.layouts import QWEN3_VIDEO, Spans
from mllm_jax.data.native import Native
from mllm_jax.data.video import Frames
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import native as vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import Also, TowerConfig
from mllm_jax.nn.position import Rope
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage

OLD, NEW = Rope(theta=1e6, sections=(16, 24, 24)), Rope(theta=5e6, sections=(24, 20, 20), interleaved=True)
SIZES = {                               # encoder, language model and its name, parameters
    "2-2b": (vit.QWEN2_VIT, llm.QWEN2_1_5B, "Qwen2-1.5B", 2.21e9), "2-7b": (vit.QWEN2_VIT, llm.QWEN2_7B, "Qwen2-7B", 8.29e9),
    "2-72b": (vit.QWEN2_VIT, llm.QWEN2_72B, "Qwen2-72B", 73.4e9), "2.5-3b": (vit.QWEN2_5_VIT, llm.QWEN2_5_3B, "Qwen2.5-3B", 3.75e9),
    "2.5-7b": (vit.QWEN2_5_VIT, llm.QWEN2_7B, "Qwen2.5-7B", 8.29e9), "3-8b": (vit.QWEN3_VIT, llm.QWEN3_8B, "Qwen3-8B-Base", 8.77e9),
    "3-4b": (vit.QWEN3_VIT_SMALL, llm.QWEN3_4B, "Qwen3-4B-Base", 4.44e9)}
WAYS = {"2-": (None, OLD, "qwen2_vl"), "2.": (Spans(rate=2.0), OLD, "qwen2_vl"), "3-": (QWEN3_VIDEO, NEW, "qwen3_vl")}


def recipe(model: str = "2-7b") -> Recipe:
    encoder, decoder, name, params = SIZES[model]
    (layout, rope, template), token = WAYS[model[:2]], (2 * encoder.patch) ** 2             # pixels
    frame = Native(min_pixels=16 * token, max_pixels=768 * token)
    video = Also(view=Frames(view=frame, frames=64, fps=2.0, least=4, pick="nearest", budget=2 * 4_096 * token), layout=layout)
    image = TowerConfig(view=Native(max_pixels=4_096 * token), encoder=encoder, place="grid", also={"video": video},
                        connector=MergeConfig(norm=encoder.norm, deep=len(encoder.deep)))
    stage = lambda source, tokens, lr, **more: Stage(
        data=Data(sources={source: 1.0}, batch_size=1_024, seq_len=8_192, template=template, items={"image": 16_384}, overlong="truncate"),
        objectives={"lm": NextToken()}, optimizer=Adam(lr=lr, b2=0.95, weight_decay=0.1), steps=round(tokens / 1_024 / 8_192), **more)
    return Recipe(
        paper="arXiv:2409.12191", params=params, tokenizer=f"hf://Qwen/{name}",
        model=MLLMConfig(inputs={"image": image}, decoder=replace(decoder, rope=rope)), stages={
            "vision": stage("qwen2_vl_pairs", 600e9, 1e-4, train=("inputs/*",), weights={"decoder": f"hf://Qwen/{name}"}),
            "all": stage("qwen2_vl_mixture", 800e9, 5e-5), "instruct": stage("qwen2_vl_instruct", 10e9, 1e-5, train=("decoder/*",)),
        })
