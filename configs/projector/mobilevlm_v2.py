"""MobileVLM V2 (arXiv:2402.03766): MobileVLM with a lighter projector, and a language model that learns from the start.

New here: LDPv2, an average over windows and one convolution; detailed captions, on which all but the encoder trains.
Hyper-parameters: the official run.sh.  The mixture of the second stage has 2.4 million records by the paper.  Unverified, as in
MobileVLM: the widths of feed-forward layers.
"""

from dataclasses import replace

from mllm_jax.configs.projector import mobilevlm
from mllm_jax.connectors.conv import LDPv2Config
from mllm_jax.decoders import transformer as llm
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.recipe import Recipe

# Language model and its name, size.
SIZES = {
    "1.7b": (llm.MOBILE_LLAMA_1_4B, "mtgv/MobileLLaMA-1.4B-Chat", 1.67e9),
    "3b": (llm.MOBILE_LLAMA_2_7B, "mtgv/MobileLLaMA-2.7B-Chat", 3.02e9),
    "7b": (llm.VICUNA_7B, "lmsys/vicuna-7b-v1.5", 7.06e9),
}


def recipe(size: str = "1.7b") -> Recipe:
    decoder, name, params = SIZES[size]

    def lighter(model: MLLMConfig) -> MLLMConfig:
        image = replace(model.inputs["image"], connector=LDPv2Config(grid=24, to=12))
        return replace(model, inputs={"image": image}, decoder=replace(decoder, vocab=32_064))

    base = mobilevlm.recipe()
    align, instruct = base.stages.values()
    captions = replace(align.data, sources={"sharegpt4v_pt_1246k": 1.0}, seq_len=2_048)
    return replace(
        base, paper="arXiv:2402.03766", params=params, tokenizer=f"hf://{name}", model=lighter(base.model),
        stages={
            "align": replace(
                align, model=lighter(align.model), weights=align.weights | {"decoder": f"hf://{name}"}, train=instruct.train, steps=4_867,
                data=captions, optimizer=replace(align.optimizer, lr=2e-5, lr_scale={"inputs/image/connector/*": 50.0})),
            "instruct": replace(
                instruct, data=replace(instruct.data, sources={"mobilevlm_v2_mix_2m": 1.0}, items={"image": 6}), steps=18_750,
                optimizer=replace(instruct.optimizer, lr=4e-5)),
        })
