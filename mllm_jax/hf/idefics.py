"""Idefics (arXiv:2306.16527) as `IdeficsForVisionText2Text`: Flamingo on Llama and an OpenCLIP tower.

Images are read by gated layers before every n-th layer of the language model, all 257 tokens of each, or 64 queries of
a perceiver.  Tokens that Llama does not have are rows of a second embedding and a second head (`DecoderConfig.added`).
An image is one token of the text, which its processor puts between two `<fake_token_around_image>`.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.resampler import PerceiverConfig
from mllm_jax.decoders.layers import Layer
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.hf import clip, llama
from mllm_jax.hf.family import Family, Part, linear, norm, row
from mllm_jax.hf.options import CLIP_COLOURS, Ids, colours, their_view, view
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.gated import Gated

PERCEIVER = (
    row("latents", "queries"),
    *(x for r in (
        *norm("0.context_layer_norm", "norm_media"),
        *norm("0.latents_layer_norm", "norm_queries"),
        *norm("0.q_layer_norm", "attn/q_norm"),
        *norm("0.k_layer_norm", "attn/k_norm"),
        *linear("0.q_proj", "attn/q", "(h k) d -> d h k"),
        *linear("0.k_proj", "attn/k", "(h k) d -> d h k"),
        *linear("0.v_proj", "attn/v", "(h k) d -> d h k"),
        *linear("0.output_proj", "attn/o", "d (h k) -> h k d"),
        *norm("1.ln", "norm_mlp"),
        *linear("1.fc", "up", "f d -> d f"),
        *linear("1.c_proj", "down", "d f -> f d"),
    ) for x in [row("blocks.{i}." + r.theirs, "blocks/0/" + r.ours, r.how)]),
    *norm("layer_norm", "norm"),
)  # fmt: skip
GATED = tuple(row("model.gated_cross_attn_layers.{k}." + r.theirs, "blocks/0/reads/" + r.ours, r.how) for r in (
    row("input_layernorm.weight", "norm1/scale"),
    *linear("cross_attn.q_proj", "attn/q", "(h k) d -> d h k"),
    *linear("cross_attn.k_proj", "attn/k", "(h k) d -> d h k"),
    *linear("cross_attn.v_proj", "attn/v", "(h k) d -> d h k"),
    *linear("cross_attn.o_proj", "attn/o", "d (h k) -> h k d"),
    row("cross_attn.q_layer_norm.weight", "attn/q_norm/scale"),
    row("cross_attn.k_layer_norm.weight", "attn/k_norm/scale"),
    row("post_attention_layernorm.weight", "norm2/scale"),
    *linear("mlp.gate_proj", "mlp/gate", "f d -> d f"),
    *linear("mlp.up_proj", "mlp/up", "f d -> d f"),
    *linear("mlp.down_proj", "mlp/down", "d f -> f d"),
    # A gate is a number, or one number for each channel.
    *(row(f"alpha_{theirs}", f"{ours}_gate/gate", how) for theirs, ours in (("cross_attn", "attn"), ("dense", "mlp"))
      for how in ("1 -> ", "1 1 d -> d")),
))  # fmt: skip
ADDED = (
    row("model.embed_tokens.additional_embedding.weight", "embedding/added"),
    row("lm_head.additional_fc.weight", "head_added", "v d -> d v"),
)
DEFAULTS = {
    "additional_vocab_size": 0, "alpha_type": "float", "cross_layer_interval": 1, "qk_layer_norms": False, "use_resampler": False,
    "num_key_value_heads": None,
}  # fmt: skip
VISION = {"embed_dim": 768, "image_size": 224, "intermediate_size": 5120, "patch_size": 14, "num_hidden_layers": 32,
          "num_attention_heads": 16, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
RESAMPLER = {"resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16, "resampler_head_dim": 96,
             "qk_layer_norms_perceiver": False}


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    hf = llama.DEFAULTS | DEFAULTS | dict(hf)
    vision, perceiver = VISION | dict(hf.get("vision_config") or {}), RESAMPLER | dict(hf.get("perceiver_config") or {})
    vision = {**vision, "hidden_size": vision["embed_dim"]}
    grid = vision["image_size"] // vision["patch_size"]
    encoder = ViTConfig(**clip.tower(vision), patch=vision["patch_size"], grid=grid, channels=vision["num_channels"], keep_class=True,
                        **colours(pre, CLIP_COLOURS))
    connector = MLPConfig(depth=0)
    if hf["use_resampler"]:
        connector = PerceiverConfig(
            grid=grid, class_token=True, queries=perceiver["resampler_n_latents"], depth=perceiver["resampler_depth"],
            heads=perceiver["resampler_n_heads"], head_dim=perceiver["resampler_head_dim"], activation="relu",
            qk_norm=perceiver["qk_layer_norms_perceiver"])
    image = TowerConfig(view=view({**pre, "do_center_crop": False}, vision["image_size"], crop=False), encoder=encoder,
                        connector=connector, route="memory")
    return MLLMConfig(inputs={"image": image}, decoder=decoder(hf, encoder.width))


def decoder(hf: Mapping[str, Any], memory: int) -> DecoderConfig:
    n, added = hf["cross_layer_interval"], hf["additional_vocab_size"]
    if hf["num_hidden_layers"] % n:
        raise ConfigError(f"idefics: cross_layer_interval={n} does not divide num_hidden_layers={hf['num_hidden_layers']}")
    plain = llama.decoder({**hf, "vocab_size": hf["vocab_size"] + added}, added=added)
    return replace(plain, cycle=(Layer(reads=Gated(
        width=memory, block=reader(plain, qk_norm=hf["qk_layer_norms"]), each=hf["alpha_type"] == "vector")), *[Layer()] * (n - 1)))


def reader(cfg: DecoderConfig, *, qk_norm: bool) -> BlockConfig:
    """The block of the gated layers: that of the language model."""
    return BlockConfig(**{f.name: getattr(cfg, f.name) for f in fields(BlockConfig)} | {"qk_norm": qk_norm})


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower, text = cfg.inputs.get("image"), cfg.decoder
    reads = getattr(text.cycle[0], "reads", None)
    if len(cfg.inputs) != 1 or tower is None or tower.route != "memory" or not isinstance(tower.encoder, ViTConfig) or reads is None:
        raise ConfigError("the family 'idefics' has one input, image, from a ViT, which the first of every so many layers of the decoder reads")
    encoder, connector = tower.encoder, tower.connector
    vision = {"embed_dim" if k == "hidden_size" else k: v for k, v in clip.their_tower(encoder).items()}
    plain = {k: v for k, v in llama.their_decoder(text, ids, "idefics").items() if k not in ("num_key_value_heads", "head_dim")}
    perceiver = {}
    if isinstance(connector, PerceiverConfig):
        perceiver = {"resampler_n_latents": connector.queries, "resampler_depth": connector.depth, "resampler_n_heads": connector.heads,
                     "resampler_head_dim": connector.head_dim, "qk_layer_norms_perceiver": connector.qk_norm}
    out = {
        **plain, "vocab_size": text.vocab - text.added, "additional_vocab_size": text.added,
        "cross_layer_interval": len(text.cycle), "qk_layer_norms": reads.block.qk_norm, "alpha_type": "vector" if reads.each else "float",
        "use_resampler": bool(perceiver), "perceiver_config": {"model_type": "idefics_perciever", "use_resampler": bool(perceiver), **perceiver},
        "vision_config": {"model_type": "idefics_vision", **vision, "image_size": tower.view.size, "patch_size": encoder.patch,
                          "num_channels": encoder.channels},
    }  # fmt: skip
    pre = {k: v for k, v in their_view(tower.view, encoder).items() if k not in ("do_center_crop", "crop_size")}
    size = tower.view.size
    return out, pre | {"image_processor_type": "IdeficsImageProcessor", "image_size": size, "size": {"height": size, "width": size},
                       "image_num_channels": encoder.channels}


IDEFICS = Family(
    model_type="idefics", architecture="IdeficsForVisionText2Text", config=config, hf_config=hf_config,
    like=lambda c: isinstance(c, MLLMConfig) and any(t.route == "memory" for t in c.inputs.values()),
    processor_class="IdeficsProcessor",
    parts=(
        Part(theirs="model.vision_model.", ours="inputs/image/encoder/", rows=clip.IMAGE, of=lambda c: c.inputs["image"].encoder),
        Part(theirs="model.perceiver_resampler.", ours="inputs/image/connector/", rows=PERCEIVER, of=lambda c: c.inputs["image"].connector),
        Part(theirs="", ours="decoder/", rows=llama.ROWS + GATED + ADDED, of=lambda c: c.decoder),
    ),
    ignore=(*clip.BUFFERS, *llama.BUFFERS, r"lm_head\.additional_fc\.weight$"),
)  # fmt: skip
