"""SigLIP (arXiv:2303.15343): `SiglipModel`, and `SiglipVisionModel`.

The attention pooling of the image tower is torch's `MultiheadAttention`, whose queries, keys and values are
one fused tensor.  The text tower pools its last position, padding included, and has the only projection.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.hf.clip import BUFFERS, IMAGE, POOLED, TEXT, is_dual, text_tower, their_text, their_tower, tower
from mllm_jax.hf.family import Family, Part, linear, norm, row
from mllm_jax.hf.options import HALF_COLOURS, Ids, colours, their_view, view
from mllm_jax.models.dual_encoder import DualEncoderConfig, Projection
from mllm_jax.models.tower import TowerConfig

FUSED = tuple(
    r for n, name in enumerate("qkv")
    for r in (
        row("head.attention.in_proj_weight", f"pool/attn/{name}/kernel", "(h k) d -> d h k", part=(n, 3)),
        row("head.attention.in_proj_bias", f"pool/attn/{name}/bias", "(h k) -> h k", part=(n, 3)),
    )
)  # fmt: skip
POOL = (
    row("head.probe", "pool/probe", "1 n d -> n d"),
    *FUSED,
    *linear("head.attention.out_proj", "pool/attn/o", "d (h k) -> h k d"),
    *norm("head.layernorm", "pool/norm"),
    *linear("head.mlp.fc1", "pool/mlp/up", "f d -> d f"),
    *linear("head.mlp.fc2", "pool/mlp/down", "d f -> f d"),
)
PROJECTIONS = (
    *linear("text_model.head", "project/text", "e d -> d e"),
    row("logit_scale", "log_scale", "1 -> "),
    row("logit_bias", "bias", "1 -> "),
)


def vit(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> ViTConfig:
    """`SiglipVisionConfig`; what is left out has the defaults of B/16."""
    hf = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6} | dict(hf)
    return ViTConfig(
        **tower(hf), patch=hf["patch_size"], grid=hf["image_size"] // hf["patch_size"], channels=hf.get("num_channels", 3),
        class_token=False, patch_bias=True, pre_norm=False, final_norm=True,
        pool="map" if hf.get("vision_use_head", True) else "none", **colours(pre, HALF_COLOURS))


def their_vit(cfg: ViTConfig, size: int | None = None) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", **their_tower(cfg), "image_size": size or cfg.grid * cfg.patch,
            "patch_size": cfg.patch, "num_channels": cfg.channels, "vision_use_head": cfg.pool == "map"}


def dual(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DualEncoderConfig:
    vision, text = hf.get("vision_config") or {}, hf.get("text_config") or {}
    defaults = {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    decoder = replace(text_tower({**defaults, **text}), causal=False)
    image = TowerConfig(view=view(pre, vision.get("image_size", 224), crop=False), encoder=vit(vision, pre), route="pool")
    return DualEncoderConfig(
        inputs={"image": image}, text=decoder, dim=text.get("projection_size", decoder.width),
        project={"text": Projection(bias=True)}, scale=10.0, bias=-10.0)


def their_dual(cfg: DualEncoderConfig, ids: Ids) -> tuple[dict, dict]:
    image = cfg.inputs["image"]
    text = {"model_type": "siglip_text_model", **their_text(cfg.text, ids), "projection_size": cfg.dim}
    out = {"model_type": "siglip", "vision_config": their_vit(image.encoder, image.view.size), "text_config": text}
    return out, their_view(image.view, image.encoder)


SIGLIP = Family(
    model_type="siglip", architecture="SiglipModel", config=dual, hf_config=their_dual, ignore=BUFFERS, free=(*POOLED, "bias"),
    like=lambda c: is_dual(c) and not c.inputs["image"].encoder.class_token, processor_class="SiglipProcessor",
    parts=(
        Part(theirs="vision_model.", ours="inputs/image/", rows=IMAGE + POOL, of=lambda c: c.inputs["image"].encoder),
        Part(theirs="text_model.", ours="text/", rows=TEXT, of=lambda c: c.text),
        Part(theirs="", ours="", rows=PROJECTIONS, of=lambda c: c),
    ),
)
SIGLIP_VISION = Family(
    model_type="siglip_vision_model", architecture="SiglipVisionModel", ignore=BUFFERS,
    like=lambda c: isinstance(c, ViTConfig) and not c.class_token,
    free=("layer", "keep_class", "final_norm"), config=vit, hf_config=lambda cfg, ids: (their_vit(cfg), {}),
    layouts=((r"^(?!vision_model\.)", "vision_model."),), memory=((r"^vision_model\.", ""),),
    parts=(Part(theirs="vision_model.", ours="", rows=IMAGE + POOL, of=lambda c: c),),
)
