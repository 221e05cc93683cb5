"""Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299): pictures in tiles, neighbours shuffled into one token.

New here: `SplitTiles`, whose places stand in the row, `ShuffleConfig`, and backbones that train through adapters (DoRA there).
Unverified: steps, rates, rank, batch, mixture (without PDFA, LNQA, PixelProse, ChartGemma); and SmolVLM, tuned from its released base.
"""

from dataclasses import replace

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.shuffle import ShuffleConfig
from mllm_jax.data.layouts import IDEFICS3
from mllm_jax.data.tiles import SplitTiles
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data, LowRank, Recipe, Stage

# Pixels and patches of a tile and patches of a square, each along one side; encoder, language model, parameters, where it is.
SIZES = {
    "8b": (364, 26, 2, vit.SIGLIP_SO400M_384, replace(llm.LLAMA_3_1_8B, vocab=128_259), 8.46e9, "HuggingFaceM4/Idefics3-8B-Llama3"),
    "2.2b": (384, 27, 3, vit.SIGLIP_SO400M_384, llm.SMOLLM2_1_7B, 2.25e9, "HuggingFaceTB/SmolVLM-Base"),
    "500m": (512, 32, 4, vit.SIGLIP_B16_224, llm.SMOLLM2_360M, 0.507e9, "HuggingFaceTB/SmolVLM-500M-Base"),
    "256m": (512, 32, 4, vit.SIGLIP_B16_224, llm.SMOLLM2_135M, 0.256e9, "HuggingFaceTB/SmolVLM-256M-Base"),
}


def recipe(size: str = "8b") -> Recipe:
    tile, grid, side, encoder, decoder, params, released = SIZES[size]
    image = TowerConfig(view=SplitTiles(size=tile, longest=4 * tile), encoder=replace(encoder, grid=grid, pool="none"), layout=IDEFICS3,
                        connector=ShuffleConfig(grid=grid, side=side, mlp=MLPConfig(depth=1, bias=False)))
    data = Data(sources={"obelics": 0.5, "laion_coco": 0.5}, batch_size=1_024, seq_len=10_240, items={"image": 60}, on_bad_example="skip")
    parts = {"inputs/image/encoder": "hf://google/siglip-so400m-patch14-384", "decoder": "hf://meta-llama/Llama-3.1-8B-Instruct"}
    align = Stage(data=data, objectives={"lm": NextToken()}, optimizer=Adam(lr=1e-4, schedule="constant"), steps=1_000, weights=parts,
                  train=("inputs/image/connector/*",))
    low = LowRank(rank=64, parts=("decoder", "inputs/image/encoder"))
    adapt = replace(align, optimizer=Adam(lr=1e-4), steps=3_000, weights={}, lora=low)
    read = replace(adapt, data=replace(data, sources={"docmatix": 0.7, "websight": 0.3}), steps=1_500)
    instruct = replace(adapt, data=replace(data, sources={"the_cauldron": 1.0}, template="idefics3"), optimizer=Adam(lr=5e-5), steps=5_000)
    tuned = replace(instruct, train=("*",), lora=LowRank(), weights={"": f"hf://{released}"})
    return Recipe(
        paper="arXiv:2408.12637" if size == "8b" else "arXiv:2504.05299", params=params, tokenizer=f"hf://{released}",
        model=MLLMConfig(inputs={"image": image}, decoder=decoder),
        stages={"align": align, "adapt": adapt, "read": read, "instruct": instruct} if size == "8b" else {"instruct": tuned})
