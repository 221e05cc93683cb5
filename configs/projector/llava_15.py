"""LLaVA-1.5 (arXiv:2310.03744): LLaVA with an MLP for the matrix, 336 pixels, and questions from academic sets.

New here: `depth=2`, a larger picture, in the second stage padded to a square, and a mixture that asks for short answers.
Source: the paper, table 9, and scripts/v1_5.  A row of the first stage is one example; in the second 64 packed rows hold about 128.
"""

from dataclasses import replace

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.views import Pad, Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage

DECODERS = {"7b": (llm.VICUNA_7B, 7.06e9), "13b": (llm.VICUNA_13B, 13.35e9)}


def recipe(size: str = "7b") -> Recipe:
    decoder, params = DECODERS[size]
    image = TowerConfig(view=Pad(size=336), encoder=replace(vit.CLIP_L14_336, layer=-2), connector=MLPConfig(depth=2))
    model = MLLMConfig(inputs={"image": image}, decoder=replace(decoder, vocab=32_064))
    return Recipe(
        paper="arXiv:2310.03744",
        params=params,
        tokenizer=f"hf://lmsys/vicuna-{size}-v1.5",
        model=model,
        stages={
            "align": Stage(
                model=replace(model, inputs={"image": replace(image, view=Square(size=336, crop=True))}),
                data=Data(sources={"llava_lcs_558k": 1.0}, batch_size=256, seq_len=768, template="caption", pack=False, overlong="truncate"),
                objectives={"lm": NextToken()}, optimizer=Adam(lr=1e-3), steps=2_181,
                train=("inputs/image/connector/*",),
                weights={"inputs/image/encoder": "hf://openai/clip-vit-large-patch14-336", "decoder": f"hf://lmsys/vicuna-{size}-v1.5"},
            ),
            "instruct": Stage(
                data=Data(sources={"llava_mix_665k": 1.0}, batch_size=64, seq_len=2_048, template="vicuna_v1", items={"image": 3},
                          overlong="truncate"),
                objectives={"lm": NextToken()}, optimizer=Adam(lr=2e-5), steps=5_198,
                train=("inputs/image/connector/*", "decoder/*"),
            ),
        },
    )
