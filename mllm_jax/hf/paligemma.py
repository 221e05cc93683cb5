"""PaliGemma (arXiv:2407.07726) as `PaliGemmaForConditionalGeneration`: SigLIP, one linear layer, Gemma.

Image and question see one another, the answer is causal: `sees="prefix"`.  Positions count from 1 in transformers; rotations
tell differences only.  Gemma scales the embeddings of text, and features enter unscaled.
"""

from collections.abc import Mapping
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.hf import clip, gemma, llama, llava, siglip
from mllm_jax.hf.family import Family, Part, linear
from mllm_jax.hf.options import Ids, their_view, view
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig

# What the configuration of a part has where a folder does not say; the tower's head is not used.
TEXT = {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16_384, "num_attention_heads": 8,
        "num_key_value_heads": 1, "vocab_size": 257_152}


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    vision, text = {"vision_use_head": False} | (hf.get("vision_config") or {}), TEXT | (hf.get("text_config") or {})
    for part, kind, known in (("tower", vision.get("model_type", "siglip_vision_model"), "siglip_vision_model"),
                              ("language model", text["model_type"], "gemma")):
        if kind != known:
            raise ConfigError(f"paligemma with the {part} {kind} is not supported; supported is {known}")
    text.pop("use_bidirectional_attention", None)               # says what `sees` says
    image = TowerConfig(view=view(pre, vision["image_size"], crop=False), encoder=siglip.vit(vision, pre),
                        connector=MLPConfig(depth=1), sees="prefix")
    return MLLMConfig(inputs={"image": image}, decoder=gemma.gemma(text, {}))


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower = llava.the_tower(cfg, "paligemma", MLPConfig)
    width, n = cfg.decoder.width, tower.encoder.grid**2
    out = {
        "model_type": "paligemma", "image_token_index": ids.image, "projection_dim": width, "hidden_size": width,
        "vision_config": siglip.their_vit(tower.encoder, tower.view.size) | {"projection_dim": width, "num_image_tokens": n},
        "text_config": gemma.their_gemma(cfg.decoder, ids)[0] | {"use_bidirectional_attention": True, "num_image_tokens": n},
        "vocab_size": cfg.decoder.vocab, "tie_word_embeddings": cfg.decoder.head == "tied", **llava.special(ids),
    }  # fmt: skip
    return out, their_view(tower.view, tower.encoder) | {"image_seq_length": n}


PALIGEMMA = Family(
    model_type="paligemma", architecture="PaliGemmaForConditionalGeneration", config=config, hf_config=hf_config,
    like=lambda c: isinstance(c, MLLMConfig) and any(t.sees == "prefix" for t in c.inputs.values()),
    processor=lambda cfg: {}, processor_class="PaliGemmaProcessor",
    parts=(
        llava.TOWER_PART,
        Part(theirs="multi_modal_projector.", ours="inputs/image/connector/", rows=linear("linear", "layers/0", "f d -> d f"),
             of=lambda c: c.inputs["image"].connector),
        Part(theirs="language_model.", ours="decoder/", rows=llama.ROWS, of=lambda c: c.decoder),
    ),
    layouts=llava.LAYOUTS, memory=llava.MEMORY, ignore=(*clip.BUFFERS, *llama.BUFFERS),
)
