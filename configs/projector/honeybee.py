"""Honeybee (arXiv:2312.06742): projectors that keep what is near together, and give as many tokens as one likes.

New here: C-Abstractor (convolutions) and D-Abstractor (deformable attention); questions from thirteen sets, weighted.
Hyper-parameters: configs/ of the official repository, its short schedule; 64 packed rows hold about the
256 examples of the first stage, and about the 128 of the second.
"""

from dataclasses import replace

from mllm_jax.configs.projector import llava
from mllm_jax.connectors.conv import CAbstractorConfig
from mllm_jax.connectors.deformable import DAbstractorConfig
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.recipe import Adam, Data, Recipe

CONNECTORS = {"c": (CAbstractorConfig(grid=16, to=12), 7.10e9), "d": (DAbstractorConfig(grid=16, to=12), 7.08e9)}
QUESTIONS = {
    "coyo_100m": 0.077, "vqav2": 0.103, "gqa": 0.103, "ocr_vqa": 0.051, "vsr": 0.026, "science_qa": 0.051, "aok_vqa": 0.103,
    "refcoco": 0.103, "refcoco_plus": 0.103, "refcocog": 0.103, "vg_locations": 0.051, "llava_instruct_158k": 0.103, "sharegpt_40k": 0.026,
}  # fmt: skip


def recipe(connector: str = "c") -> Recipe:
    part, params = CONNECTORS[connector]
    base = llava.recipe()
    image = replace(base.model.inputs["image"], view=Square(size=224), encoder=vit.CLIP_L14_224, connector=part)
    align, instruct = base.stages.values()
    adam = Adam(lr=1e-4, warmup=2_000, end=0.1, weight_decay=0.01, b2=0.98, eps=1e-6)
    data = Data(sources={"blip_capfilt": 0.5, "coyo_100m": 0.5}, batch_size=64, seq_len=1_024, template="base", items={"image": 5},
                overlong="truncate")
    name = "hf://lmsys/vicuna-7b-v1.5"
    return replace(
        base, paper="arXiv:2312.06742", params=params, tokenizer=name,
        model=replace(base.model, inputs={"image": image}, decoder=replace(llm.VICUNA_7B, vocab=32_064)),
        stages={
            "align": replace(align, data=data, optimizer=adam, steps=50_000, weights=align.weights | {"decoder": name}),
            "instruct": replace(
                instruct, data=replace(data, sources=QUESTIONS, template="honeybee", items={"image": 3}), steps=4_000,
                optimizer=replace(adam, lr=2e-5, warmup=150, end=0.05, weight_decay=1e-4)),
        })
