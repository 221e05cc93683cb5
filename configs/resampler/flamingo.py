"""OpenFlamingo (arXiv:2308.01390): a frozen language model that reads images beside the row, before every fourth layer.

New here: `route="memory"` with a perceiver and layers with `reads`; documents; rows of new tokens that train alone (`added`).
The 9B of the first release, on LLaMA-7B (8.2B in all); numbers from its run_train.sh on the paper's 64 GPUs.  Its loss is the mean over
documents and a fifth of that over captions; here it is one mean over all tokens.  Documents with one image or small ones are kept.
"""

from dataclasses import replace

from mllm_jax.connectors.resampler import PerceiverConfig
from mllm_jax.data.augment import HorizontalFlip
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.decoders.layers import Layer
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.gated import Gated, open_flamingo
from mllm_jax.nn.param import RMSNorm
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage


def recipe() -> Recipe:
    image = TowerConfig(view=Square(size=224, crop=True), encoder=vit.CLIP_L14_224, connector=PerceiverConfig(grid=16), route="memory")
    reads = Gated(width=1024, block=open_flamingo(4096))
    return Recipe(
        paper="arXiv:2308.01390",
        params=8.22e9,
        tokenizer="hf://huggyllama/llama-7b",
        model=MLLMConfig(inputs={"image": image},
                         decoder=replace(llm.LLAMA, norm=RMSNorm(), vocab=32_002, added=2, cycle=(*[Layer()] * 3, Layer(reads=reads)))),
        stages={"pretrain": Stage(
            # 60M documents and 120M captions; 2,400 packed rows hold about the 6,144 of a step.
            data=Data(sources={"mmc4": 1.0, "laion_2b": 2.0}, batch_size=2_400, seq_len=256, template="flamingo", items={"image": 12},
                      overlong="truncate", on_bad_example="skip", augment=(HorizontalFlip(),)),
            objectives={"lm": NextToken()},
            optimizer=Adam(lr=1e-4, warmup=1_875, schedule="constant", weight_decay=0.1, decays=("*/reads/*",)),
            steps=29_297,
            train=("inputs/image/connector/*", "decoder/blocks/*/reads/*", "decoder/embedding/added"),
            weights={"inputs/image/encoder": "hf://openai/clip-vit-large-patch14", "decoder": "hf://huggyllama/llama-7b"},
        )},
    )
