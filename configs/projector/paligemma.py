"""PaliGemma (arXiv:2407.07726): SigLIP, one matrix and Gemma, trained as a whole from the start, at three resolutions.

New here: `sees="prefix"`, so that image and question see one another and the answer alone is causal; nothing is frozen.
Sizes, examples and lengths: the paper, section 3.2; examples count alike, as in google-research/big_vision.  Unverified: rate (as
PaliGemma 2 reports it), batch sizes, warm-ups and the encoder's slower one, which is left out; a table of positions is stretched.
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


def model(size: int) -> MLLMConfig:
    encoder = replace(vit.SIGLIP_SO400M_224, grid=size // 14, table=16, pool="none")
    image = TowerConfig(view=Square(size=size), encoder=encoder, connector=MLPConfig(depth=1), sees="prefix")
    return MLLMConfig(inputs={"image": image}, decoder=replace(llm.GEMMA_2B, vocab=257_152))


def stage(size: int, examples: float, text: int, **more) -> Stage:
    data = Data(sources={"paligemma_mixture": 1.0}, batch_size=8_192, seq_len=(size // 14) ** 2 + text, template="paligemma",
                pack=False, overlong="truncate", reduction="example")
    return Stage(model=model(size), data=data, objectives={"lm": NextToken()}, optimizer=Adam(lr=2e-5, schedule="rsqrt"),
                 steps=round(examples / 8_192), **more)


def recipe() -> Recipe:
    return Recipe(
        paper="arXiv:2407.07726",
        params=2.92e9,
        tokenizer="hf://google/paligemma-3b-pt-224",
        model=model(224),
        stages={
            "pretrain": stage(224, 1e9, 128, weights={"inputs/image/encoder": "hf://google/siglip-so400m-patch14-224",
                                                      "decoder": "hf://google/gemma-2b"}),
            "px448": stage(448, 50e6, 512, weights={"": "stage://pretrain"}),
            "px896": stage(896, 10e6, 512, weights={"": "stage://px448"}),
        },
    )
