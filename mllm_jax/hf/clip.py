"""CLIP (arXiv:2103.00020): `CLIPModel`, and `CLIPVisionModel`, the tower that LLaVA reads.

The layers of CLIP and SigLIP have the same names, in both towers.  `pre_layrnorm` is spelled so.
"""

import math
from collections.abc import Mapping
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.hf.family import Family, Part, linear, norm, row
from mllm_jax.hf.options import CLIP_COLOURS, Ids, activation, colours, their_activation, their_view, view
from mllm_jax.models.dual_encoder import DualEncoderConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.param import LayerNorm

LAYER = tuple(
    row("encoder.layers.{i}." + r.theirs, "blocks/0/" + r.ours, r.how)
    for r in (
        *norm("layer_norm1", "norm1"),
        *linear("self_attn.q_proj", "attn/q", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("self_attn.k_proj", "attn/k", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("self_attn.v_proj", "attn/v", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("self_attn.out_proj", "attn/o", "d (h k) -> h k d"),
        *norm("layer_norm2", "norm2"),
        *linear("mlp.fc1", "mlp/up", "f d -> d f"),
        *linear("mlp.fc2", "mlp/down", "d f -> f d"),
    )
)
IMAGE = (
    row("embeddings.class_embedding", "class_token"),
    *linear("embeddings.patch_embedding", "patch", "d c p q -> (p q c) d"),
    row("embeddings.position_embedding.weight", "position"),
    *norm("pre_layrnorm", "pre_norm"),
    *LAYER,
    *norm("post_layernorm", "norm"),
)
TEXT = (
    row("embeddings.token_embedding.weight", "embedding/table"),
    row("embeddings.position_embedding.weight", "position"),
    *LAYER,
    *norm("final_layer_norm", "norm"),
)
PROJECTIONS = (
    row("visual_projection.weight", "project/image/kernel", "e d -> d e"),
    row("text_projection.weight", "project/text/kernel", "e d -> d e"),
    row("logit_scale", "log_scale"),
)
BUFFERS = (r"embeddings\.position_ids$",)


def vit(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> ViTConfig:
    """`CLIPVisionConfig`; what old files leave out has the defaults of ViT-B/32."""
    hf = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | dict(hf)
    return ViTConfig(**tower(hf), patch=hf["patch_size"], grid=hf["image_size"] // hf["patch_size"],
                     channels=hf.get("num_channels", 3), **colours(pre, CLIP_COLOURS))


def tower(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that both towers of CLIP and SigLIP have."""
    return {
        "width": hf["hidden_size"], "depth": hf["num_hidden_layers"], "heads": hf["num_attention_heads"],
        "mlp": hf["intermediate_size"], "activation": activation(hf["hidden_act"]), "norm": LayerNorm(eps=hf["layer_norm_eps"]),
    }  # fmt: skip


def their_tower(cfg: ViTConfig | DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": cfg.width, "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp, "hidden_act": their_activation(cfg.activation), "layer_norm_eps": cfg.norm.eps,
    }  # fmt: skip


def their_vit(cfg: ViTConfig, size: int | None = None) -> dict[str, Any]:
    size = size or cfg.grid * cfg.patch                         # of an image; the grid may leave a margin
    return {"model_type": "clip_vision_model", **their_tower(cfg), "image_size": size, "patch_size": cfg.patch,
            "num_channels": cfg.channels}


def text_tower(hf: Mapping[str, Any]) -> DecoderConfig:
    defaults = {"vocab_size": 49_408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    hf = {**defaults, **hf}
    return DecoderConfig(
        **tower(hf), vocab=hf["vocab_size"], positions=hf["max_position_embeddings"], rope=None, gated=False, head="none",
        qkv_bias=True, out_bias=True, mlp_bias=True)


def their_text(cfg: DecoderConfig, ids: Ids) -> dict[str, Any]:
    known = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    return {**their_tower(cfg), "vocab_size": cfg.vocab, "max_position_embeddings": cfg.positions,
            **{k: v for k, v in known.items() if v is not None}}


def dual(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DualEncoderConfig:
    # Files of before 2023 have the full values in *_config_dict, and transformers prefers them.
    both = [{**(hf.get(k) or {}), **(hf.get(f"{k}_dict") or {})} for k in ("vision_config", "text_config")]
    encoder = vit(both[0], pre)
    size = both[0].get("image_size", 224)
    image = TowerConfig(view=view(pre, size, crop=True), encoder=encoder, route="pool")
    scale = math.exp(hf.get("logit_scale_init_value", 2.6592))
    return DualEncoderConfig(inputs={"image": image}, text=text_tower(both[1]), dim=hf.get("projection_dim", 512), scale=scale)


def their_dual(cfg: DualEncoderConfig, ids: Ids) -> tuple[dict, dict]:
    image = cfg.inputs["image"]
    if ids.eos == 2:
        raise ConfigError("clip: transformers reads eos_token_id=2 as 'pool where the id is largest'; "
                          "the end token of the tokenizer needs another id")
    out = {
        "model_type": "clip", "projection_dim": cfg.dim, "logit_scale_init_value": math.log(cfg.scale),
        "vision_config": their_vit(image.encoder, image.view.size) | {"projection_dim": cfg.dim},
        "text_config": {"model_type": "clip_text_model", **their_text(cfg.text, ids), "projection_dim": cfg.dim},
    }
    return out, their_view(image.view, image.encoder)


def is_dual(cfg: Any) -> bool:
    return isinstance(cfg, DualEncoderConfig) and set(cfg.inputs) == {"image"}


# How an image tower is used, which its checkpoint does not say, and where training started.
POOLED = (r"inputs\.image\.encoder\.(layer|keep_class|final_norm)", "scale")

CLIP = Family(
    model_type="clip", architecture="CLIPModel", config=dual, hf_config=their_dual, ignore=BUFFERS, free=POOLED,
    like=lambda c: is_dual(c) and c.inputs["image"].encoder.class_token, processor_class="CLIPProcessor",
    parts=(
        Part(theirs="vision_model.", ours="inputs/image/", rows=IMAGE, of=lambda c: c.inputs["image"].encoder),
        Part(theirs="text_model.", ours="text/", rows=TEXT, of=lambda c: c.text),
        Part(theirs="", ours="", rows=PROJECTIONS, of=lambda c: c),
    ),
)
CLIP_VISION = Family(
    model_type="clip_vision_model", architecture="CLIPVisionModel", ignore=BUFFERS, free=("layer", "keep_class", "final_norm"),
    like=lambda c: isinstance(c, ViTConfig) and c.class_token,
    config=vit, hf_config=lambda cfg, ids: (their_vit(cfg), {}), layouts=((r"^(?!vision_model\.)", "vision_model."),),
    memory=((r"^vision_model\.", ""),),
    parts=(Part(theirs="vision_model.", ours="", rows=IMAGE, of=lambda c: c),),
)
