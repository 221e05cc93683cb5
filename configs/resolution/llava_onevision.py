"""LLaVA-OneVision (arXiv:2408.03326): one LLaVA for a large image, for several images, and for videos.

New here: what stands for a medium depends on what it is (`also`): up to 36 tiles shrunk to the tokens of nine, padded squares, pooled
frames.  Source: section 4, scripts/train of LLaVA-VL/LLaVA-NeXT.  Unverified: batches (512 in "align"; then 256 examples, which 64
packed rows hold) and the published sizes.
"""

from dataclasses import replace

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.layouts import AnyRes, Pooled
from mllm_jax.data.tiles import NEXT, ONEVISION, Tiles
from mllm_jax.data.video import Frames
from mllm_jax.data.views import Pad, Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import Also, TowerConfig
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage

DECODERS = {"0.5b": (llm.QWEN2_0_5B, 8.94e8), "7b": (llm.QWEN2_7B, 8.03e9), "72b": (llm.QWEN2_72B, 7.32e10)}


def recipe(size: str = "7b") -> Recipe:
    (decoder, params), language = DECODERS[size], f"hf://Qwen/Qwen2-{size.upper()}-Instruct"
    encoder = replace(vit.SIGLIP_SO400M_384, depth=26, pool="none", final_norm=False)       # without the last of 27 layers
    whole = TowerConfig(view=Square(size=384), encoder=encoder, connector=MLPConfig(depth=2))
    frames = Frames(view=Square(size=384), frames=32, fps=1.0, pick="every")
    several, video = Also(view=Pad(size=384, fill=(127,) * 3)), Also(view=frames, layout=Pooled())
    tiled = lambda pinpoints: MLLMConfig(decoder=decoder, inputs={"image": replace(
        whole, view=Tiles(size=384, pinpoints=pinpoints), layout=AnyRes(cap=9), also={"images": several, "video": video})})
    stage = lambda sources, steps, **more: Stage(
        data=Data(sources=sources, batch_size=64, seq_len=32_768, template="chatml", items={"image": 160}, overlong="truncate"),
        objectives={"lm": NextToken()}, optimizer=Adam(lr=1e-5, lr_scale={"inputs/image/encoder/*": 0.2}), steps=steps, **more)
    align = stage({"llava_lcs_558k": 1.0}, 1_090, train=("inputs/image/connector/*",), model=MLLMConfig(inputs={"image": whole}, decoder=decoder),
                  weights={"inputs/image/encoder": "hf://google/siglip-so400m-patch14-384", "decoder": language})
    pairs = replace(align.data, batch_size=512, seq_len=1_024, template="caption", pack=False, items={})
    replay = {"llava_onevision_3m2": 0.47, "m4_instruct_560k": 0.33, "llava_onevision_video_350k": 0.2}
    return Recipe(paper="arXiv:2408.03326", params=params, tokenizer=language, model=tiled(ONEVISION), stages={
        "align": replace(align, data=pairs, optimizer=Adam(lr=1e-3)),
        "knowledge": stage({"llava_onevision_mid_4m": 1.0}, 15_625, model=tiled(NEXT)),
        "single_image": stage({"llava_onevision_3m2": 1.0}, 12_500),
        "onevision": stage(replay, 6_250),
    })
