"""Qwen2 (and 2.5) and Qwen3: Llama with biases on queries, keys and values, or with norms on queries and keys."""

from collections.abc import Mapping
from typing import Any

from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.hf.llama import DEFAULTS, causal_lm, decoder, plain, their_decoder
from mllm_jax.hf.options import Ids, their_layers, window

QWEN = DEFAULTS | {
    "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32, "max_position_embeddings": 32_768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip


def with_window(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The window counts only if it is switched on, and, where `layer_types` are not told, from `max_window_layers` on."""
    depth, full = hf["num_hidden_layers"], hf["max_window_layers"]
    kinds = hf.get("layer_types") or ["full_attention" if i < full else "sliding_attention" for i in range(depth)]
    return {**hf, "layer_types": kinds, "sliding_window": hf["sliding_window"] if hf["use_sliding_window"] else None}


def their_window(cfg: DecoderConfig) -> dict[str, Any]:
    if window(cfg) is None:
        return {"use_sliding_window": False}
    kinds = their_layers(cfg)
    return {"use_sliding_window": True, "sliding_window": window(cfg), "max_window_layers": kinds.index("sliding_attention"),
            "layer_types": kinds}


def qwen2(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DecoderConfig:
    return decoder(with_window(QWEN | dict(hf)), qkv_bias=True)


def qwen3(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DecoderConfig:
    hf = with_window(QWEN | {"head_dim": 128, "attention_bias": False} | dict(hf))
    return decoder(hf, qk_norm=True, qkv_bias=hf["attention_bias"], out_bias=hf["attention_bias"])


def their_qwen2(cfg: DecoderConfig, ids: Ids) -> tuple[dict, dict]:
    return their_decoder(cfg, ids, "qwen2") | their_window(cfg), {}


def their_qwen3(cfg: DecoderConfig, ids: Ids) -> tuple[dict, dict]:
    return their_decoder(cfg, ids, "qwen3") | their_window(cfg) | {"attention_bias": cfg.qkv_bias}, {}


QWEN2 = causal_lm("qwen2", "Qwen2ForCausalLM", qwen2, their_qwen2,
                  lambda c: plain(c) and c.qkv_bias and not c.out_bias and not c.qk_norm)
QWEN3 = causal_lm("qwen3", "Qwen3ForCausalLM", qwen3, their_qwen3, lambda c: plain(c) and c.qk_norm)
