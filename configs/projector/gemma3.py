"""Gemma 3 (arXiv:2503.19786): SigLIP at 896 pixels, averaged to 256 tokens, before layers of which five in six see 1,024 positions.

New here: `PoolConfig`; a `cycle` of local and global layers; `sees="item"`: the tokens of an image see one another.
Sizes: the paper, table 1; the encoder is frozen as in its section 2.  Data, rates and batch sizes of the original are not
published: this is a stage of instructions for the released pre-trained model, with those of LLaVA-1.5.
"""

from dataclasses import replace

from mllm_jax.configs.projector import llava_15
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.pool import PoolConfig
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.param import RMSNorm
from mllm_jax.recipe import Recipe

DECODERS = {"4b": (llm.GEMMA3_4B, 4.30e9), "12b": (llm.GEMMA3_12B, 12.19e9), "27b": (llm.GEMMA3_27B, 27.43e9)}


def recipe(size: str = "4b") -> Recipe:
    decoder, params = DECODERS[size]
    connector = PoolConfig(grid=64, to=16, after=MLPConfig(depth=1, bias=False, norm=RMSNorm(offset=1.0)))
    encoder = replace(vit.SIGLIP_SO400M_224, grid=64, pool="none")
    image = TowerConfig(view=Square(size=896, resample="bilinear"), encoder=encoder, connector=connector, sees="item")
    base = llava_15.recipe().stages["instruct"]
    released = f"hf://google/gemma-3-{size}-pt"
    return Recipe(
        paper="arXiv:2503.19786",
        params=params,
        tokenizer=released,
        model=MLLMConfig(inputs={"image": image}, decoder=decoder),
        stages={"instruct": replace(base, data=replace(base.data, template="gemma"), weights={"": released})},
    )
