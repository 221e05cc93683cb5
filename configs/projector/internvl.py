"""InternVL 2.5 (arXiv:2412.05271): InternViT on tiles of 448, the nearest of many arrangements, before Qwen2.5.

New here: `DynamicTiles`, scaled layers (`layer_scale`), and rows of 16k packed from images, several images and videos, each counting
as the root of its tokens (`reduction`).  Source: OpenGVLab/InternVL, internvl_chat/shell/internvl2.5.  Not here: JPEG noise and drop
path.  The mixtures are not published; towers come from released folders of InternVL3, whose layout of keys is read.
"""

from dataclasses import replace

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.shuffle import ShuffleConfig
from mllm_jax.data.layouts import INTERNVL, INTERNVL_VIDEO
from mllm_jax.data.tiles import DynamicTiles
from mllm_jax.data.video import Frames
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import Also, TowerConfig
from mllm_jax.nn.param import LayerNorm
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage

# Encoder, language model, parameters; steps, rate and decay of the second stage; where encoder and language model are.
SIZES = {
    "1b": (vit.INTERNVIT_300M_448, llm.QWEN2_0_5B, 0.938e9, 22_000, 4e-5, 0.01, "InternVL3-1B-hf", "Qwen2.5-0.5B"),
    "4b": (vit.INTERNVIT_300M_448, llm.QWEN2_5_3B, 3.71e9, 11_000, 4e-5, 0.01, "InternVL3-1B-hf", "Qwen2.5-3B"),
    "38b": (vit.INTERNVIT_6B_448, llm.QWEN2_5_32B, 38.4e9, 5_500, 2e-5, 0.05, "InternVL3-38B-hf", "Qwen2.5-32B"),
}


def recipe(size: str = "1b") -> Recipe:
    encoder, decoder, params, steps, lr, decay, tower, language = SIZES[size]
    connector = ShuffleConfig(grid=32, side=2, mlp=MLPConfig(depth=2, norm=LayerNorm()))
    video = Also(view=Frames(view=Square(size=448), frames=32, pick="middle"), layout=INTERNVL_VIDEO)
    image = TowerConfig(view=DynamicTiles(size=448), encoder=encoder, connector=connector, layout=INTERNVL, also={"video": video})
    data = Data(sources={"internvl2_5_pairs": 1.0}, batch_size=512, seq_len=16_384, template="chatml", reduction="root", items={"image": 48})
    sources = {"inputs/image/encoder": f"hf://OpenGVLab/{tower}", "decoder": f"hf://Qwen/{language}-Instruct"}
    align = Stage(data=data, objectives={"lm": NextToken()}, optimizer=Adam(lr=2e-4, warmup=100, weight_decay=decay), steps=100_000,
                  train=("inputs/image/connector/*",), weights=sources)
    instruct = Stage(data=replace(data, sources={"internvl2_5_instruct": 1.0}), objectives={"lm": NextToken()},
                     optimizer=Adam(lr=lr, weight_decay=decay), steps=steps)
    model = MLLMConfig(inputs={"image": image}, decoder=replace(decoder, vocab=151_674, head="own"))
    return Recipe(paper="arXiv:2412.05271", params=params, tokenizer=f"hf://OpenGVLab/{tower}", model=model,
                  stages={"align": align, "instruct": instruct})
