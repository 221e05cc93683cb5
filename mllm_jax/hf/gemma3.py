"""Gemma 3 (arXiv:2503.19786) as `Gemma3ForConditionalGeneration`: SigLIP at 896 pixels, averages over squares of patches.

The patches of an image see one another in the language model too, also where its layers have a window: `sees="item"`.
What stands around an image in the text is written by the template "gemma".  Crops of wide pictures (`do_pan_and_scan`,
switched off in the published folders) are not supported.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.pool import PoolConfig
from mllm_jax.hf import clip, gemma, llama, llava, siglip
from mllm_jax.hf.family import Family, Part, row
from mllm_jax.hf.options import Ids, their_view, view
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.param import RMSNorm

CONNECTOR = (
    row("mm_soft_emb_norm.weight", "after/norm/scale"),
    row("mm_input_projection_weight", "after/layers/0/kernel"),
)


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    vision, text = {"vision_use_head": False} | (hf.get("vision_config") or {}), hf.get("text_config") or {}
    if vision.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        raise ConfigError(f"gemma3 with the tower {vision['model_type']} is not supported; supported is siglip_vision_model")
    if pre.get("do_pan_and_scan"):
        raise ConfigError("the image processor says do_pan_and_scan=true; one view of the whole image is supported")
    encoder, side = siglip.vit(vision, pre), isqrt(hf.get("mm_tokens_per_image", 256))
    if encoder.grid % side:
        raise ConfigError(f"gemma3: {encoder.grid}x{encoder.grid} patches do not divide into {side}x{side} tokens")
    connector = PoolConfig(grid=encoder.grid, to=side, after=MLPConfig(depth=1, bias=False, norm=RMSNorm(eps=encoder.norm.eps, offset=1.0)))
    how = {"resample": 2, **pre, "do_center_crop": False}       # what its image processor does
    image = TowerConfig(view=view(how, vision["image_size"], crop=False), encoder=encoder, connector=connector, sees="item")
    return MLLMConfig(inputs={"image": image}, decoder=gemma.gemma3(text, {}))


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower = llava.the_tower(cfg, "gemma3", PoolConfig)
    out = {
        "model_type": "gemma3", "image_token_index": ids.image, "mm_tokens_per_image": tower.connector.to**2,
        "vision_config": siglip.their_vit(tower.encoder, tower.view.size), "text_config": gemma.their_gemma3(cfg.decoder, ids)[0],
        "tie_word_embeddings": cfg.decoder.head == "tied", **llava.special(ids),
    }  # fmt: skip
    pre = their_view(tower.view, tower.encoder)
    return out, pre | {"image_processor_type": "Gemma3ImageProcessor", "image_seq_length": tower.connector.to**2}


GEMMA3 = Family(
    model_type="gemma3", architecture="Gemma3ForConditionalGeneration", config=config, hf_config=hf_config,
    like=lambda c: isinstance(c, MLLMConfig) and gemma.GEMMA3_TEXT.like(c.decoder),
    processor=lambda cfg: {"image_seq_length": cfg.inputs["image"].connector.to ** 2}, processor_class="Gemma3Processor",
    parts=(
        llava.TOWER_PART,
        Part(theirs="multi_modal_projector.", ours="inputs/image/connector/", rows=CONNECTOR, of=lambda c: c.inputs["image"].connector),
        Part(theirs="language_model.", ours="decoder/", rows=gemma.GEMMA3_ROWS, of=lambda c: c.decoder),
    ),
    layouts=llava.LAYOUTS, memory=llava.MEMORY, ignore=(*clip.BUFFERS, *llama.BUFFERS),
)
