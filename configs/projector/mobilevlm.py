"""MobileVLM (arXiv:2312.16886): a small LLaVA whose projector mixes neighbours and keeps a quarter of the tokens.

New here: LDP, two inverted residuals after the MLP, the second with stride 2, and a language model for a telephone.
Hyper-parameters: the official run_v1.sh.  In the second stage 64 packed rows hold about its 128 examples.  Unverified: the widths of
the language models' feed-forward layers.
"""

from dataclasses import replace

from mllm_jax.configs.projector import llava_15
from mllm_jax.connectors.conv import LDPConfig
from mllm_jax.decoders import transformer as llm
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.recipe import Recipe

# Language model, its name, learning rate of the second stage, size.
SIZES = {
    "1.7b": (llm.MOBILE_LLAMA_1_4B, "1.4B", 2e-5, 1.69e9),
    "3b": (llm.MOBILE_LLAMA_2_7B, "2.7B", 4e-5, 3.04e9),
}


def recipe(size: str = "1.7b") -> Recipe:
    decoder, name, lr, params = SIZES[size]
    language = f"hf://mtgv/MobileLLaMA-{name}-Chat"

    def small(model: MLLMConfig) -> MLLMConfig:
        image = replace(model.inputs["image"], connector=LDPConfig(grid=24))
        return replace(model, inputs={"image": image}, decoder=replace(decoder, vocab=32_064))

    base = llava_15.recipe()
    align, instruct = base.stages.values()
    return replace(
        base, paper="arXiv:2312.16886", params=params, tokenizer=language, model=small(base.model),
        stages={
            "align": replace(align, model=small(align.model), weights=align.weights | {"decoder": language}),
            "instruct": replace(instruct, optimizer=replace(instruct.optimizer, lr=lr)),
        })
