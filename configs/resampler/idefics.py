"""Idefics (arXiv:2306.16527): Flamingo once more, on OBELICS, with a larger encoder and the layers of Llama as readers.

New here: readers made of the decoder's own block with queries and keys normalized, and new tokens with rows of the head too.
Shapes: `IdeficsForVisionText2Text`; options, mixture and rates are those of the model card of idefics-9b, from memory and unverified;
its Wikipedia (6 %) is left out.
"""

from dataclasses import replace

from mllm_jax.configs.resampler import flamingo
from mllm_jax.connectors.resampler import PerceiverConfig
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.decoders.layers import Layer
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.gated import Gated
from mllm_jax.nn.param import RMSNorm
from mllm_jax.recipe import Adam, Data, Recipe


def recipe() -> Recipe:
    connector = PerceiverConfig(grid=16, class_token=True, heads=16, head_dim=96, activation="relu", qk_norm=True)
    image = TowerConfig(view=Square(size=224), encoder=replace(vit.OPENCLIP_H14_224, keep_class=True), connector=connector, route="memory")
    block = BlockConfig(width=4096, heads=32, mlp=11_008, norm=RMSNorm(), qk_norm=True)
    base = flamingo.recipe().stages["pretrain"]
    return Recipe(
        paper="arXiv:2306.16527",
        params=8.93e9,
        tokenizer="hf://huggyllama/llama-7b",
        model=MLLMConfig(inputs={"image": image}, decoder=replace(
            llm.LLAMA, norm=RMSNorm(), vocab=32_002, added=2, cycle=(Layer(reads=Gated(width=1280, block=block)), *[Layer()] * 3))),
        stages={"pretrain": replace(
            base,
            data=Data(sources={"obelics": 0.787, "laion_2b": 0.183, "pmd": 0.03}, batch_size=1_280, seq_len=1_024, template="idefics",
                      items={"image": 24}, overlong="drop", on_bad_example="skip"),
            optimizer=Adam(lr=1e-5, warmup=2_000, schedule="linear", end=0.6, weight_decay=0.1),
            steps=200_000,
            train=(*base.train, "decoder/head_added"),
            weights={"inputs/image/encoder": "hf://laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "decoder": "hf://huggyllama/llama-7b"},
        )},
    )
