"""LLaVA-OneVision (arXiv:2408.03326) as `LlavaOnevisionForConditionalGeneration`: LLaVA-NeXT for images and videos.

The table is that of LLaVA-NeXT.  One image is cut into tiles, each of several is padded to a square, frames of a video are pooled.

Surprises.  Transformers takes the frames of a video as they are given, so how many there are is ours to say (32, from the first to
the last, as trained); exports ask its video processor for as many.  It resizes frames by torchvision, images by Pillow: values of a
frame may differ by one level of 255.
"""

import re
from collections.abc import Mapping
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.layouts import AnyRes, Pooled
from mllm_jax.data.tiles import ONEVISION
from mllm_jax.data.video import Frames
from mllm_jax.data.views import Pad, Square
from mllm_jax.hf import clip, language, llama, llava, llava_next
from mllm_jax.hf.family import Family
from mllm_jax.hf.options import Ids, their_colours, their_resampling
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import Also, TowerConfig

FRAMES = 32
# What a configuration has where a folder does not say: SigLIP so400m without its last layer.
VISION = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
          "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False}
USUAL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    hf = USUAL | dict(hf)
    hf |= {"vision_config": VISION | (hf.get("vision_config") or {}), "text_config": {"model_type": "qwen2"} | (hf.get("text_config") or {})}
    encoder, connector, size = llava.parts(hf, pre, "llava_onevision")
    if encoder.keep_class:
        raise ConfigError("llava_onevision: vision_feature_select_strategy='full' keeps the class token, which has no place in the image")
    cap = re.fullmatch(r"anyres_max_(\d)", ratio := hf.get("vision_aspect_ratio", "anyres_max_9"))
    if cap is None:
        raise ConfigError(f"llava_onevision: vision_aspect_ratio={ratio!r} is not supported; anyres_max_1 to anyres_max_9 are")
    view = llava_next.tiles(hf, pre, size, "llava_onevision", ONEVISION)
    several = Pad(size=size, fill=tuple(int(255 * m) for m in encoder.mean), resample=view.resample)
    frames = Frames(view=Square(size=size, resample=view.resample), frames=FRAMES)
    image = TowerConfig(
        view=view, encoder=encoder, connector=connector, layout=AnyRes(cap=int(cap[1])),
        also={"images": Also(view=several), "video": Also(view=frames, layout=Pooled())})
    return MLLMConfig(inputs={"image": image}, decoder=language.of_model(hf, "llava_onevision", either=True))


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower = llava.the_tower(cfg, "llava_onevision", MLPConfig)
    view, square = tower.view, {"height": tower.view.size, "width": tower.view.size}
    out = llava.their_parts(cfg, ids, "llava_onevision")
    out |= {"image_grid_pinpoints": llava_next.their_pinpoints(view), "vision_aspect_ratio": f"anyres_max_{tower.layout.cap}"}
    pre = {
        "image_processor_type": "LlavaOnevisionImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": square,
        "resample": their_resampling(view.resample), "do_pad": True, "image_grid_pinpoints": llava_next.their_pinpoints(view),
        **their_colours(tower.encoder),
    }  # fmt: skip
    return out | ({} if ids.video is None else {"video_token_index": ids.video}), pre


def processor(cfg: MLLMConfig) -> dict[str, Any]:
    tower = cfg.inputs["image"]
    frames = tower.also["video"].view
    return {
        "image_token": "<image>", "video_token": "<video>", "num_image_tokens": tower.encoder.grid**2,
        "vision_feature_select_strategy": llava.strategy(tower.encoder), "vision_aspect_ratio": f"anyres_max_{tower.layout.cap}",
        "video_processor": {
            "video_processor_type": "LlavaOnevisionVideoProcessor", "do_convert_rgb": True, "do_sample_frames": True,
            "num_frames": frames.frames, "do_resize": True, "size": {"height": frames.view.size, "width": frames.view.size},
            "resample": their_resampling(frames.view.resample), **their_colours(tower.encoder),
        },
    }  # fmt: skip


LLAVA_ONEVISION = Family(
    model_type="llava_onevision", architecture="LlavaOnevisionForConditionalGeneration", config=config, hf_config=hf_config,
    like=lambda c: isinstance(c, MLLMConfig) and any(isinstance(t.layout, AnyRes) and t.layout.cap for t in c.inputs.values()),
    processor=processor, processor_class="LlavaOnevisionProcessor",
    parts=llava_next.LLAVA_NEXT.parts, layouts=llava.LAYOUTS, memory=llava.MEMORY, ignore=(*clip.BUFFERS, *llama.BUFFERS),
    free=(r"inputs\.image\.encoder\.pool", r"inputs\.image\.also\.video\.view\.(frames|fps|least|pick)"),
)
