"""StableLM (stabilityai/stablelm-2-1_6b, arXiv:2402.17834): Llama with layer norms, and of each head only a quarter turns."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.hf.llama import DEFAULTS, causal_lm, decoder, their_decoder
from mllm_jax.hf.options import Ids, partial, their_partial
from mllm_jax.nn.param import LayerNorm

OWN = DEFAULTS | {
    "vocab_size": 50_304, "intermediate_size": 6912, "hidden_size": 2560, "num_key_value_heads": 32, "use_qkv_bias": False,
    "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25,
}  # fmt: skip


def stablelm(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DecoderConfig:
    hf = OWN | dict(hf)
    for key in ("qk_layernorm", "use_parallel_residual"):
        if hf.get(key):
            raise ConfigError(f"stablelm: {key}=true, of StableLM 2 12B, is not supported; the models of 1.6B and 3B have it not")
    hf, part = partial(hf)
    cfg = decoder(hf, qkv_bias=hf["use_qkv_bias"])
    return replace(cfg, norm=LayerNorm(eps=hf["layer_norm_eps"]), rope=replace(cfg.rope, part=part))


def their_stablelm(cfg: DecoderConfig, ids: Ids) -> tuple[dict, dict]:
    out = their_decoder(cfg, ids, "stablelm")
    own = {"layer_norm_eps": out.pop("rms_norm_eps"), "use_qkv_bias": cfg.qkv_bias}
    return their_partial(out, cfg.rope.part) | own, {}


STABLELM = causal_lm("stablelm", "StableLmForCausalLM", stablelm, their_stablelm,
                     lambda c: isinstance(c.norm, LayerNorm) and c.norms == "before" and c.gated and c.rope is not None)
