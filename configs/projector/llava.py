"""LLaVA (arXiv:2304.08485): patches of a frozen CLIP, through one matrix, into the row of a language model.

New here: an encoder and a language model that were trained apart, joined in two stages; the first trains
the matrix alone.  Hyper-parameters: the paper, section 5, and its official training scripts.  A row of the
first stage is one of the paper's 128 examples; in the second, 16 packed rows hold about its 32.
"""

from dataclasses import replace

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage


def recipe() -> Recipe:
    image = TowerConfig(view=Square(size=224, crop=True), encoder=replace(vit.CLIP_L14_224, layer=-2), connector=MLPConfig(depth=1))
    return Recipe(
        paper="arXiv:2304.08485",
        params=13.3e9,
        tokenizer="hf://lmsys/vicuna-13b-v1.5",
        model=MLLMConfig(inputs={"image": image}, decoder=replace(llm.VICUNA_13B, vocab=32_064)),
        stages={
            "align": Stage(
                data=Data(sources={"llava_cc3m_595k": 1.0}, batch_size=128, seq_len=512, template="caption", pack=False,
                          overlong="truncate"),
                objectives={"lm": NextToken()}, optimizer=Adam(lr=2e-3), steps=4_651,
                train=("inputs/image/connector/*",),
                weights={"inputs/image/encoder": "hf://openai/clip-vit-large-patch14", "decoder": "hf://lmsys/vicuna-13b-v1.5"},
            ),
            "instruct": Stage(
                data=Data(sources={"llava_instruct_158k": 1.0}, batch_size=16, seq_len=2_048, template="vicuna_v1",
                          items={"image": 4}, overlong="truncate"),
                objectives={"lm": NextToken()}, optimizer=Adam(lr=2e-5), steps=14_785,
                train=("inputs/image/connector/*", "decoder/*"),
            ),
        },
    )
