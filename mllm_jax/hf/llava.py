"""LLaVA (arXiv:2304.08485, 2310.03744) as `LlavaForConditionalGeneration`: an image tower, two linear layers, a language model.

Its tables are those of the parts with a prefix.  Three key layouts are about: that of the Hub (which is also
written), the one in memory, and that of `save_pretrained` of transformers 5, without `vision_model.`
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.hf import clip, language, llama, siglip
from mllm_jax.hf.family import Family, Part, linear
from mllm_jax.hf.options import Ids, activation, their_activation, their_view, view
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig

CONNECTOR = (
    *linear("linear_1", "layers/0", "f d -> d f"),
    *linear("linear_2", "layers/1", "f d -> d f"),
)
TOWERS = {"clip_vision_model": clip.vit, "siglip_vision_model": siglip.vit}
# What the folders of llava-1.5 leave out of their configuration of CLIP-L/14.
TOWER = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "patch_size": 14, "image_size": 336}


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    encoder, connector, size = parts(hf, pre, "llava")
    image = TowerConfig(view=view(pre, size, crop=encoder.class_token), encoder=encoder, connector=connector)
    return MLLMConfig(inputs={"image": image}, decoder=language.of_model(hf, "llava", either=True))


def parts(hf: Mapping[str, Any], pre: Mapping[str, Any], where: str) -> tuple[ViTConfig, MLPConfig, int]:
    """(encoder, connector, side of an image in pixels) of a configuration of this family or one like it."""
    vision = hf.get("vision_config") or {}
    vision = (TOWER if vision.get("model_type", "clip_vision_model") == "clip_vision_model" else {}) | vision
    kind = vision["model_type"]
    if kind not in TOWERS:
        raise ConfigError(f"{where} with {kind} is not supported; supported are {', '.join(TOWERS)}")
    select, layer = hf.get("vision_feature_select_strategy", "default"), hf.get("vision_feature_layer", -2)
    encoder = TOWERS[kind](vision, pre)
    if not isinstance(layer, int):
        raise ConfigError(f"{where}: vision_feature_layer={layer}; features of one layer are supported")
    if select not in (("default", "full") if encoder.class_token else ("full",)):
        raise ConfigError(f"{where}: vision_feature_select_strategy={select!r} would drop the first patch of {kind}, "
                          "which has no class token; only 'full' is supported there")
    encoder = replace(encoder, layer=layer, final_norm=False, keep_class=encoder.class_token and select == "full")
    connector = MLPConfig(depth=2, activation=activation(hf.get("projector_hidden_act", "gelu")),
                          bias=hf.get("multimodal_projector_bias", True))
    return encoder, connector, vision["image_size"]


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower = the_tower(cfg, "llava", MLPConfig)
    n = tower.encoder.grid**2 + tower.encoder.keep_class
    return their_parts(cfg, ids, "llava") | {"image_seq_length": n}, their_view(tower.view, tower.encoder)


def their_parts(cfg: MLLMConfig, ids: Ids, model_type: str) -> dict[str, Any]:
    """The configuration of this family or one like it."""
    tower = cfg.inputs["image"]
    encoder, connector = tower.encoder, tower.connector
    return {
        "model_type": model_type, "image_token_index": ids.image,
        "projector_hidden_act": their_activation(connector.activation), "multimodal_projector_bias": connector.bias,
        "vision_feature_layer": encoder.layer, "vision_feature_select_strategy": strategy(encoder),
        "vision_config": (clip if encoder.class_token else siglip).their_vit(encoder, tower.view.size),
        "text_config": language.their_decoder(cfg.decoder, ids), "tie_word_embeddings": cfg.decoder.head == "tied",
        **special(ids),
    }  # fmt: skip


def strategy(encoder: ViTConfig) -> str:
    return "default" if encoder.class_token and not encoder.keep_class else "full"


def special(ids: Ids) -> dict[str, int]:
    return {f"{k}_token_id": getattr(ids, k) for k in ("bos", "eos", "pad") if getattr(ids, k) is not None}


def the_tower(cfg: MLLMConfig, family: str, connector: type) -> TowerConfig:
    """The image tower of a family that has no other input.

    Raises:
      ConfigError: the model has others, or one of another kind.
    """
    if set(cfg.inputs) != {"image"} or cfg.inputs["image"].route != "splice" or not isinstance(cfg.inputs["image"].encoder, ViTConfig):
        raise ConfigError(f"the family {family!r} has one input, image, spliced from a ViT; the model has {sorted(cfg.inputs)}")
    tower = cfg.inputs["image"]
    if not isinstance(tower.connector, connector):
        raise ConfigError(f"the family {family!r} cannot express the connector {type(tower.connector).__name__}; {connector.__name__} it can")
    return tower


def processor(cfg: MLLMConfig) -> dict[str, Any]:
    """processor_config.json: how `LlavaProcessor` counts the placeholders of an image."""
    encoder = cfg.inputs["image"].encoder
    return {
        "image_token": "<image>", "patch_size": encoder.patch,
        "num_additional_image_tokens": int(encoder.class_token),
        "vision_feature_select_strategy": strategy(encoder),
    }  # fmt: skip


# Of all families that put a tower before a language model.
TOWER_PART = Part(theirs="vision_tower.vision_model.", ours="inputs/image/encoder/", rows=clip.IMAGE + siglip.POOL,
                  of=lambda c: c.inputs["image"].encoder)
CONNECTOR_PART = Part(theirs="multi_modal_projector.", ours="inputs/image/connector/", rows=CONNECTOR,
                      of=lambda c: c.inputs["image"].connector)
DECODER_PART = Part(theirs="language_model.", ours="decoder/", rows=llama.ROWS, of=lambda c: c.decoder)
NAMES = (                               # of any tower
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
LAYOUTS = (*NAMES, (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."))
MEMORY = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^(?=multi_modal_projector\.|image_newline$)", "model."),
)
LLAVA = Family(
    model_type="llava", architecture="LlavaForConditionalGeneration", config=config, hf_config=hf_config,
    like=lambda c: isinstance(c, MLLMConfig), processor=processor, processor_class="LlavaProcessor",
    parts=(TOWER_PART, CONNECTOR_PART, DECODER_PART),
    layouts=LAYOUTS, memory=MEMORY,
    ignore=(*clip.BUFFERS, *llama.BUFFERS),
    # Its pooled vector is not used, and the class of a tower without attention pooling is the same to transformers.
    free=(r"inputs\.image\.encoder\.pool",),
)
