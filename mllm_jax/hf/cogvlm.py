"""CogVLM (arXiv:2311.03079) as the folders of THUDM (cogvlm-chat-hf, cogvlm-base-490-hf, ...) have it.

Its class is code in those folders and not in transformers, and their config.json has no `model_type`: it is known by its
architecture, and what we write points to that code.  Two sets of weights in every layer, queries, keys and values in one
tensor, and around the image two learned vectors, of which the first goes the way of the image and the second that of text.
CogVLM2 (grouped queries, a convolution before the adapter) is not supported.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.glu import GLUConfig
from mllm_jax.data.layouts import Marked
from mllm_jax.data.views import Square
from mllm_jax.decoders.expert import ExpertLayer
from mllm_jax.encoders.vit import EVA2_E14_224, ViTConfig
from mllm_jax.hf import clip, llama, llava
from mllm_jax.hf.family import Family, Part, Row, linear, norm, row
from mllm_jax.hf.options import Ids
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig

REMOTE = "THUDM/cogvlm-chat-hf--"


def fused(theirs: str, ours: str, bias: bool = False) -> tuple[Row, ...]:
    """Queries, keys and values in one tensor."""
    kernels = [row(f"{theirs}.weight", f"{ours}/{x}/kernel", "(h k) d -> d h k", part=(n, 3)) for n, x in enumerate("qkv")]
    biases = [row(f"{theirs}.bias", f"{ours}/{x}/bias", "(h k) -> h k", part=(n, 3)) for n, x in enumerate("qkv")]
    return (*kernels, *(biases if bias else ()))


ENCODER = (
    row("patch_embedding.cls_embedding", "class_token", "1 d -> d"),
    *linear("patch_embedding.proj", "patch", "d c p q -> (p q c) d"),
    row("patch_embedding.position_embedding.weight", "position"),
    *(row("transformer.layers.{i}." + r.theirs, "blocks/0/" + r.ours, r.how, r.part) for r in (
        *fused("attention.query_key_value", "attn", bias=True),
        *linear("attention.dense", "attn/o", "d (h k) -> h k d"),
        *norm("input_layernorm", "norm1"),
        *linear("mlp.fc1", "mlp/up", "f d -> d f"),
        *linear("mlp.fc2", "mlp/down", "d f -> f d"),
        *norm("post_attention_layernorm", "norm2"),
    )),
)  # fmt: skip
CONNECTOR = (
    row("linear_proj.weight", "proj/kernel", "o i -> i o"),
    *norm("norm1", "norm"),
    row("gate_proj.weight", "mlp/gate/kernel", "f d -> d f"),
    row("dense_h_to_4h.weight", "mlp/up/kernel", "f d -> d f"),
    row("dense_4h_to_h.weight", "mlp/down/kernel", "d f -> f d"),
)
MARKS = (row("boi", "boi", "1 1 d -> d"), row("eoi", "eoi", "1 1 d -> d"))
DECODER = (
    *(r for r in llama.ROWS if "self_attn" not in r.theirs and ".mlp." not in r.theirs),
    *(row("model.layers.{i}." + r.theirs, f"blocks/0/{ours}" + r.ours, r.how, r.part) for theirs, ours in (("language", ""), ("vision", "expert/"))
      for r in (
          *fused(f"self_attn.{theirs}_expert_query_key_value", "attn"),
          row(f"self_attn.{theirs}_expert_dense.weight", "attn/o/kernel", "d (h k) -> h k d"),
          row(f"mlp.{theirs}_mlp.gate_proj.weight", "mlp/gate/kernel", "f d -> d f"),
          row(f"mlp.{theirs}_mlp.up_proj.weight", "mlp/up/kernel", "f d -> d f"),
          row(f"mlp.{theirs}_mlp.down_proj.weight", "mlp/down/kernel", "d f -> f d"),
      )),
)  # fmt: skip


def vit(hf: Mapping[str, Any]) -> ViTConfig:
    encoder = replace(EVA2_E14_224, **clip.tower({**hf, "num_attention_heads": hf["num_heads"]}), patch=hf["patch_size"],
                      grid=hf["image_size"] // hf["patch_size"], channels=hf["in_channels"])
    if hf["num_positions"] != encoder.grid**2 + 1:
        raise ConfigError(f"cogvlm: num_positions={hf['num_positions']} for {encoder.grid}x{encoder.grid} patches and a class token; "
                          f"it must be {encoder.grid**2 + 1}")
    return encoder


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    if "num_multi_query_heads" in hf or "num_key_value_heads" in hf:
        raise ConfigError("cogvlm: grouped queries are those of CogVLM2, which is not supported; CogVLM has as many keys as queries")
    hf = llama.DEFAULTS | dict(hf)
    encoder = vit(hf["vision_config"])
    image = TowerConfig(view=Square(size=hf["vision_config"]["image_size"]), encoder=encoder,
                        connector=GLUConfig(hidden=hf["intermediate_size"]), layout=Marked(), place="one")
    return MLLMConfig(inputs={"image": image}, decoder=replace(llama.decoder(hf), cycle=(ExpertLayer(),)))


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower = llava.the_tower(cfg, "cogvlm", GLUConfig)
    encoder, text = tower.encoder, llama.their_decoder(cfg.decoder, ids, "cogvlm")
    vision = clip.their_tower(encoder)
    vision |= {"num_heads": vision.pop("num_attention_heads"), "image_size": tower.view.size, "patch_size": encoder.patch,
               "num_positions": encoder.grid**2 + 1, "in_channels": encoder.channels, "dropout_prob": 0.0}
    remote = {"AutoConfig": f"{REMOTE}configuration_cogvlm.CogVLMConfig", "AutoModelForCausalLM": f"{REMOTE}modeling_cogvlm.CogVLMForCausalLM"}
    left_out = ("num_key_value_heads", "head_dim", "rope_parameters", "rope_theta")
    return {k: v for k, v in text.items() if k not in left_out} | {"vision_config": vision, "template_version": "chat", "auto_map": remote}, {}


COGVLM = Family(
    model_type="cogvlm", architecture="CogVLMForCausalLM", config=config, hf_config=hf_config,
    like=lambda c: isinstance(c, MLLMConfig) and any(isinstance(layer, ExpertLayer) for layer in c.decoder.cycle),
    parts=(
        Part(theirs="model.vision.", ours="inputs/image/encoder/", rows=ENCODER, of=lambda c: c.inputs["image"].encoder),
        Part(theirs="model.vision.linear_proj.", ours="inputs/image/connector/", rows=CONNECTOR, of=lambda c: c.inputs["image"].connector),
        Part(theirs="model.vision.", ours="inputs/image/marks/", rows=MARKS, of=lambda c: c),
        Part(theirs="", ours="decoder/", rows=DECODER, of=lambda c: c.decoder),
    ),
    ignore=llama.BUFFERS,
)
