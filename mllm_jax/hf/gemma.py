"""Gemma (arXiv:2403.08295) and the language models of Gemma 3 (arXiv:2503.19786).

Scales of norms are stored as what is added to 1, embeddings are multiplied by the root of the width, heads are wider than
width / heads, and the head is the embedding.  Gemma 3 has norms before and after both halves of a layer, of which three
have names that mean something else in Llama.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.decoders.layers import Layer
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.hf.family import Part, row
from mllm_jax.hf.llama import DEFAULTS, ROWS, causal_lm, decoder, their_decoder
from mllm_jax.hf.options import Ids, activation, cycle, rope, their_layers, their_rope, window

OWN = {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False}
GEMMA_DEFAULTS = DEFAULTS | OWN | {
    "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192,
}  # fmt: skip
GEMMA3_DEFAULTS = DEFAULTS | OWN | {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
}  # fmt: skip
GEMMA3_ROWS = (
    *(r for r in ROWS if "/norm2/" not in r.ours),
    row("model.layers.{i}.post_attention_layernorm.weight", "blocks/0/norm1_after/scale"),
    row("model.layers.{i}.pre_feedforward_layernorm.weight", "blocks/0/norm2/scale"),
    row("model.layers.{i}.post_feedforward_layernorm.weight", "blocks/0/norm2_after/scale"),
)


def scaled(cfg: DecoderConfig) -> DecoderConfig:
    return replace(cfg, norm=replace(cfg.norm, offset=1.0), embed_scale=cfg.width**0.5)


def gemma(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DecoderConfig:
    hf = GEMMA_DEFAULTS | dict(hf)
    if hf.get("use_bidirectional_attention"):
        raise ConfigError("gemma: use_bidirectional_attention=true, of a model that reads text in both directions, is not supported")
    # The first folders say "gelu" and mean its approximation.
    hf["hidden_act"] = "gelu_pytorch_tanh" if hf["hidden_act"] == "gelu" else hf["hidden_act"]
    return scaled(decoder(hf, qkv_bias=hf["attention_bias"], out_bias=hf["attention_bias"]))


def their_gemma(cfg: DecoderConfig, ids: Ids) -> tuple[dict, dict]:
    return their_decoder(cfg, ids, "gemma") | {"attention_bias": cfg.qkv_bias}, {}


def gemma3(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DecoderConfig:
    hf = GEMMA3_DEFAULTS | dict(hf)
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if hf.get(key):
            raise ConfigError(f"gemma3_text: {key}={hf[key]} is not supported; published models of Gemma 3 have none")
    ropes, every = hf.get("rope_parameters") or {}, hf["sliding_window_pattern"]
    glob = rope({"rope_theta": hf["rope_theta"], "rope_scaling": hf.get("rope_scaling"), "rope_parameters": ropes.get("full_attention")})
    near = rope({"rope_theta": hf["rope_local_base_freq"], "rope_parameters": ropes.get("sliding_attention")})
    kinds = hf.get("layer_types") or ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(hf["num_hidden_layers"])]
    local, scalar = Layer(window=hf["sliding_window"], rope=near), hf["query_pre_attn_scalar"]
    return replace(
        scaled(decoder(hf | {"sliding_window": None, "rope_parameters": None, "rope_scaling": None}, qk_norm=True, norms="both",
                       qkv_bias=hf["attention_bias"], out_bias=hf["attention_bias"])),
        activation=activation(hf["hidden_activation"]), rope=glob, query_scale=None if scalar == hf["head_dim"] else scalar**-0.5,
        cycle=cycle([local if kind == "sliding_attention" else Layer() for kind in kinds]))


def their_gemma3(cfg: DecoderConfig, ids: Ids) -> tuple[dict, dict]:
    head_dim = cfg.head_dim or cfg.width // cfg.heads
    near = next((layer.rope for layer in cfg.cycle if layer.window), None) or cfg.rope
    ropes = {"full_attention": cfg.rope, "sliding_attention": near}
    out = their_decoder(cfg, ids, "gemma3_text")
    out |= {
        "hidden_activation": out.pop("hidden_act"), "attention_bias": cfg.qkv_bias, "sliding_window": window(cfg),
        "layer_types": their_layers(cfg),
        "query_pre_attn_scalar": head_dim if cfg.query_scale is None else round(cfg.query_scale**-2),
        "rope_parameters": {kind: their_rope(r)["rope_parameters"] for kind, r in ropes.items()},
        "rope_local_base_freq": near.theta,                     # as transformers 4 has it, with rope_theta and rope_scaling
    }  # fmt: skip
    return out, {}


def normed(cfg: DecoderConfig, where: str) -> bool:
    return cfg.norms == where and getattr(cfg.norm, "offset", 0) == 1


GEMMA = causal_lm("gemma", "GemmaForCausalLM", gemma, their_gemma, lambda c: normed(c, "before"))
GEMMA3_TEXT = replace(
    causal_lm("gemma3_text", "Gemma3ForCausalLM", gemma3, their_gemma3, lambda c: normed(c, "both")),
    parts=(Part(theirs="", ours="", rows=GEMMA3_ROWS, of=lambda c: c),))
