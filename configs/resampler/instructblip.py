"""InstructBLIP (arXiv:2305.06500): BLIP-2 whose queries read the instruction too, and so look for what is asked.

New here: words for the Q-Former of the second kind of model; data sets are drawn by the roots of their sizes.  The paper, sections
2.3 to 2.6; unverified: data set sizes, steps, batches, schedule.  The paper starts from BLIP-2 with Vicuna, here from its first stage.
"""

from dataclasses import replace

from mllm_jax.configs.resampler import blip2
from mllm_jax.connectors.qformer import Words
from mllm_jax.decoders import transformer as llm
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.recipe import Recipe

SIZES = {"7b": (llm.VICUNA_7B, 7.913e9, 64), "13b": (llm.VICUNA_13B, 14.19e9, 64)}
THOUSANDS = {"coco_captions": 567, "blip_capfilt": 14_000, "textcaps": 110, "vqav2": 444, "ok_vqa": 9, "aok_vqa": 17, "ocr_vqa": 801,
             "llava_instruct_158k": 158}
START = "hf://Salesforce/blip2-itm-vit-g"


def recipe(size: str = "7b") -> Recipe:
    decoder, params, rows = SIZES[size]
    base = blip2.recipe()
    image, stage = base.model.inputs["image"], base.stages["generate"]
    vicuna = f"hf://lmsys/vicuna-{size}-v1.1"
    return replace(
        base, paper="arXiv:2305.06500", params=params, tokenizer=vicuna,
        # A token more than Vicuna's, for the placeholder.
        model=MLLMConfig(inputs={"image": replace(image, connector=replace(image.connector, words=Words()))},
                         decoder=replace(decoder, vocab=32_001)),
        stages={
            "instruct": replace(
                stage, steps=60_000,
                data=replace(stage.data, sources={name: round(n**0.5, 1) for name, n in THOUSANDS.items()}, batch_size=rows, seq_len=416,
                             template="instructblip", augment=stage.data.augment[:1]),
                optimizer=replace(stage.optimizer, lr=1e-5, warmup=1_000, end=0.0, b2=0.999),
                weights={blip2.TOWER: START, blip2.FORMER: START, "decoder": vicuna}),
        })
