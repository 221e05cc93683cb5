"""InternVL (2.5 and 3; arXiv:2412.05271, 2504.10479) as `InternVLForConditionalGeneration`: InternViT, pixel shuffle, an MLP, Qwen.

An image is stretched to fill the tiles whose arrangement is nearest to its shape; the whole stands last.  The image processor is that
of GOT-OCR2, whose `crop_to_patches` the processor overrules: images are always cut.  Files have the names of LLaVA.

Surprises.  The class token is dropped, and no norm follows the last layer unless `use_mean_pooling` is false.  Queries and keys of
the 6B tower are normalized over all heads at once.  Its videos are frames of one tile with numbers; how many is ours to say (32, from the
middle of equal parts, as trained), and their size is that of the tiles.
"""

from collections.abc import Mapping
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.shuffle import ShuffleConfig
from mllm_jax.data.layouts import INTERNVL as LAYOUT
from mllm_jax.data.layouts import INTERNVL_VIDEO
from mllm_jax.data.tiles import DynamicTiles
from mllm_jax.data.video import Frames
from mllm_jax.data.views import Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.hf import language, llama, llava
from mllm_jax.hf.family import Family, Part, linear, norm, row
from mllm_jax.hf.options import (
    CLIP_COLOURS,
    Ids,
    activation,
    colours,
    resampling,
    their_activation,
    their_colours,
    their_resampling,
)
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import Also, TowerConfig
from mllm_jax.nn.param import LayerNorm, RMSNorm

FRAMES = 32
VISION = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "attention_bias": False, "use_qk_norm": False,
    "intermediate_size": 4096, "hidden_act": "gelu", "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "image_size": 448, "patch_size": 14,
    "use_mask_token": False, "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.1, "use_mean_pooling": True,
}  # fmt: skip
NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
IMAGE = (
    row("embeddings.cls_token", "class_token", "1 1 d -> d"),
    row("embeddings.position_embeddings", "position", "1 n d -> n d"),
    *linear("embeddings.patch_embeddings.projection", "patch", "d c p q -> (p q c) d"),
    *(row("encoder.layer.{i}." + r.theirs, "blocks/0/" + r.ours, r.how) for r in (
        *norm("layernorm_before", "norm1"),
        *linear("attention.q_proj", "attn/q", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("attention.k_proj", "attn/k", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("attention.v_proj", "attn/v", "(h k) d -> d h k", "(h k) -> h k"),
        row("attention.q_norm.weight", "attn/q_norm/scale"),
        row("attention.k_norm.weight", "attn/k_norm/scale"),
        *linear("attention.projection_layer", "attn/o", "d (h k) -> h k d"),
        row("lambda_1", "scale1/scale"),
        *norm("layernorm_after", "norm2"),
        *linear("mlp.fc1", "mlp/up", "f d -> d f"),
        *linear("mlp.fc2", "mlp/down", "d f -> f d"),
        row("lambda_2", "scale2/scale"),
    )),
    *norm("layernorm", "norm"),
)  # fmt: skip
CONNECTOR = (
    *norm("layer_norm", "mlp/norm"),
    *linear("linear_1", "mlp/layers/0", "f d -> d f"),
    *linear("linear_2", "mlp/layers/1", "f d -> d f"),
)


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    hf = {"tie_word_embeddings": True} | dict(hf)
    hf |= {"text_config": {"model_type": "qwen2"} | (hf.get("text_config") or {})}
    vision = VISION | (hf.get("vision_config") or {})
    size, layer, ratio = _side(vision, "image_size"), hf.get("vision_feature_layer", -1), hf.get("downsample_ratio", 0.5)
    if not isinstance(layer, int) or hf.get("vision_feature_select_strategy", "default") != "default":
        raise ConfigError(f"internvl: vision_feature_layer={layer} and vision_feature_select_strategy="
                          f"{hf.get('vision_feature_select_strategy')!r} are not supported; one layer and 'default' are")
    if (1 / ratio) % 1:
        raise ConfigError(f"internvl: downsample_ratio={ratio} is not supported; 1/2, 1/4 and so on are")
    encoder = vit(vision, pre, layer)
    mlp = MLPConfig(depth=2, activation=activation(hf.get("projector_hidden_act", "gelu")), norm=LayerNorm(eps=1e-5))
    view = tiles(pre, size)
    image = TowerConfig(
        view=view, encoder=encoder, connector=ShuffleConfig(grid=encoder.grid, side=int(1 / ratio), mlp=mlp), layout=LAYOUT,
        also={"video": Also(view=Frames(view=Square(size=size, resample=view.resample), frames=FRAMES, pick="middle"), layout=INTERNVL_VIDEO)})
    return MLLMConfig(inputs={"image": image}, decoder=language.of_model(hf, "internvl"))


def vit(hf: Mapping[str, Any], pre: Mapping[str, Any], layer: int) -> ViTConfig:
    made = NORMS[hf["norm_type"]](eps=hf["layer_norm_eps"])
    last = not hf["use_mean_pooling"]
    if hf["use_mask_token"] or not hf["use_absolute_position_embeddings"]:
        raise ConfigError("internvl: a tower with use_mask_token or without use_absolute_position_embeddings is not supported")
    if (hf["use_qk_norm"] and made != RMSNorm(eps=1e-6)) or (last and isinstance(made, RMSNorm)):
        raise ConfigError(f"internvl: norm_type={hf['norm_type']!r} of eps {hf['layer_norm_eps']:g} is not supported with "
                          f"use_qk_norm={hf['use_qk_norm']} and use_mean_pooling={not last}")
    patch = _side(hf, "patch_size")
    return ViTConfig(
        width=hf["hidden_size"], depth=hf["num_hidden_layers"], heads=hf["num_attention_heads"], mlp=hf["intermediate_size"], patch=patch,
        grid=_side(hf, "image_size") // patch, activation=activation(hf["hidden_act"]), norm=made, qkv_bias=hf["attention_bias"],
        qk_norm="width" if hf["use_qk_norm"] else False, layer_scale=float(hf["layer_scale_init_value"]), patch_bias=True, pre_norm=False,
        layer=layer, last_norm=last, final_norm=last and layer == -1, pool="none", **colours(pre, CLIP_COLOURS))


def tiles(pre: Mapping[str, Any], size: int) -> DynamicTiles:
    given = pre.get("size") or {"height": size, "width": size}
    if set(given.values()) != {size}:
        raise ConfigError(f"internvl: the image processor cuts tiles of {given} pixels; those of the tower have {size}")
    return DynamicTiles(size=size, most=pre.get("max_patches", 12), least=pre.get("min_patches", 1), resample=resampling(pre))


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower = llava.the_tower(cfg, "internvl", ShuffleConfig)
    encoder, view, connector = tower.encoder, tower.view, tower.connector
    square = {"height": view.size, "width": view.size}
    vision = {
        "model_type": "internvl_vision", "hidden_size": encoder.width, "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads, "attention_bias": encoder.qkv_bias, "use_qk_norm": bool(encoder.qk_norm),
        "intermediate_size": encoder.mlp, "hidden_act": their_activation(encoder.activation),
        "norm_type": next(name for name, kind in NORMS.items() if isinstance(encoder.norm, kind)), "layer_norm_eps": encoder.norm.eps,
        "image_size": [view.size] * 2, "patch_size": [encoder.patch] * 2, "layer_scale_init_value": encoder.layer_scale,
        "use_mean_pooling": not encoder.last_norm, "use_mask_token": False, "use_absolute_position_embeddings": True,
    }  # fmt: skip
    out = {
        "model_type": "internvl", "image_token_id": ids.image, "image_seq_length": tokens(cfg), "downsample_ratio": 1 / connector.side,
        "projector_hidden_act": their_activation(connector.mlp.activation), "vision_feature_layer": encoder.layer,
        "vision_feature_select_strategy": "default", "vision_config": vision, "text_config": language.their_decoder(cfg.decoder, ids),
        "tie_word_embeddings": cfg.decoder.head == "tied", **llava.special(ids),
    }  # fmt: skip
    pre = {
        "image_processor_type": "GotOcr2ImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": square,
        "resample": their_resampling(view.resample), "crop_to_patches": True, "min_patches": view.least, "max_patches": view.most,
        **their_colours(encoder),
    }  # fmt: skip
    return out, pre


def tokens(cfg: MLLMConfig) -> int:
    """Of a tile."""
    connector = cfg.inputs["image"].connector
    return (connector.grid // connector.side) ** 2


def processor(cfg: MLLMConfig) -> dict[str, Any]:
    tower = cfg.inputs["image"]
    frames = tower.also["video"].view
    return {
        "image_seq_length": tokens(cfg),
        "video_processor": {
            "video_processor_type": "InternVLVideoProcessor", "do_convert_rgb": True, "do_sample_frames": True, "num_frames": frames.frames,
            "do_resize": True, "size": {"height": frames.view.size, "width": frames.view.size},
            "resample": their_resampling(frames.view.resample), **their_colours(tower.encoder),
        },
    }  # fmt: skip


def _side(hf: Mapping[str, Any], key: str) -> int:
    """A length that is written as one number or as two."""
    sides = {hf[key]} if isinstance(hf[key], int) else set(hf[key])
    if len(sides) > 1:
        raise ConfigError(f"internvl: {key}={hf[key]} of the tower is no square; squares are supported")
    return sides.pop()


INTERNVL = Family(
    model_type="internvl", architecture="InternVLForConditionalGeneration", config=config, hf_config=hf_config,
    like=lambda c: isinstance(c, MLLMConfig) and any(t.layout == LAYOUT and isinstance(t.view, DynamicTiles) for t in c.inputs.values()),
    processor=processor, processor_class="InternVLProcessor",
    parts=(
        Part(theirs="vision_tower.", ours="inputs/image/encoder/", rows=IMAGE, of=lambda c: c.inputs["image"].encoder),
        Part(theirs="multi_modal_projector.", ours="inputs/image/connector/", rows=CONNECTOR, of=lambda c: c.inputs["image"].connector),
        llava.DECODER_PART,
    ),
    layouts=llava.NAMES, memory=(*llava.MEMORY, (r"^(?=vision_tower\.)", "model.")), ignore=llama.BUFFERS,
    free=(r"inputs\.image\.also\.video\.view\.(frames|fps|least|pick)",),
)
