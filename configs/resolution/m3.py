"""Matryoshka Multimodal Models (M3, arXiv:2405.17430): a LLaVA-1.5 whose 576 tokens can be averaged to 144, 36, 9 or 1.

New here: the loss is the mean over nested sets of tokens; one set is chosen at inference, `--set` with windows=(4,) takes 36.
Hyper-parameters: scripts/v1_5/finetune.sh of the official repository, which begins with the trained LLaVA-1.5.
"""

from dataclasses import replace

from mllm_jax.configs.projector import llava_15
from mllm_jax.connectors.pool import NestedConfig
from mllm_jax.objectives import EveryScale
from mllm_jax.recipe import Recipe

WINDOWS = (1, 2, 4, 8, 24)


def recipe() -> Recipe:
    base = llava_15.recipe()
    image = replace(base.model.inputs["image"], connector=NestedConfig(depth=2, grid=24, windows=WINDOWS))
    whole = ("inputs/image/encoder", "inputs/image/connector", "decoder")
    return replace(
        base, paper="arXiv:2405.17430", model=replace(base.model, inputs={"image": image}),
        stages={
            "instruct": replace(
                base.stages["instruct"], objectives={"lm": EveryScale(windows=WINDOWS)}, train=("*",),
                weights=dict.fromkeys(whole, "hf://llava-hf/llava-1.5-7b-hf")),
        })
