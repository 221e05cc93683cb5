"""MoE-LLaVA (arXiv:2401.15947): LLaVA-1.5 on a small model, then every second layer becomes four experts, two of which read a token.

New here: sparse upcycling.  A third stage begins with experts that are copies of the dense layer, and trains nothing else (so the
paper; the official scripts/v1_5 train the feed-forward layers between and the projector too).  The balance loss is a sum over layers.
"""

from dataclasses import replace

from mllm_jax.configs.projector import llava_15
from mllm_jax.decoders import transformer as llm
from mllm_jax.decoders.layers import Layer
from mllm_jax.nn.moe import MoEConfig
from mllm_jax.objectives import Auxiliary, NextToken
from mllm_jax.recipe import Recipe

HYBRID = {"mimicit_la_256k": 0.266, "lrv_331k": 0.343, "lvis_instruct_220k": 0.228, "svit_157k": 0.163}
# What the paper counts is the language model alone; CLIP and the projector are 0.31e9.
DECODERS = {"1.6b": (llm.STABLELM_2_1_6B, "hf://stabilityai/stablelm-2-1_6b", 2.9e9), "2.7b": (llm.PHI_2, "hf://microsoft/phi-2", 5.3e9)}


def recipe(size: str = "1.6b") -> Recipe:
    decoder, source, params = DECODERS[size]
    base = llava_15.recipe()
    dense = replace(base.model, decoder=decoder)
    moe = MoEConfig(experts=4, top_k=2, capacity=1.5, explore=True)
    sparse = replace(dense, decoder=replace(decoder, cycle=(Layer(mlp=moe), Layer())))
    align, instruct = base.stages["align"], base.stages["instruct"]
    return replace(
        base,
        paper="arXiv:2401.15947",
        params=params + 0.31e9,
        tokenizer=source,
        model=sparse,
        stages={
            "align": replace(align, model=replace(align.model, decoder=decoder), weights={**align.weights, "decoder": source}),
            "instruct": replace(instruct, model=dense, data=replace(instruct.data, sources=HYBRID), steps=7_531),
            "experts": replace(
                instruct,
                objectives={"lm": NextToken(), "balance": Auxiliary(name="router/balance", weight=0.01 * (decoder.depth // 2))},
                train=("decoder/blocks/0/mlp/*",),
                weights={"*": "stage://instruct"},
            ),
        },
    )
