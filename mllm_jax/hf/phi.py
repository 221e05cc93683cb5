"""Phi 1 to 2 (microsoft/phi-2): attention and feed-forward layer read the same norm, biases everywhere, on the logits too."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.hf.family import Part, linear, norm, row
from mllm_jax.hf.llama import DEFAULTS, causal_lm, decoder, their_decoder
from mllm_jax.hf.options import Ids, partial, their_partial
from mllm_jax.nn.param import LayerNorm

ROWS = (
    row("model.embed_tokens.weight", "embedding/table"),
    *(row("model.layers.{i}." + r.theirs, "blocks/0/" + r.ours, r.how) for r in (
        *norm("input_layernorm", "norm1"),
        *linear("self_attn.q_proj", "attn/q", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("self_attn.k_proj", "attn/k", "(g k) d -> d g k", "(g k) -> g k"),
        *linear("self_attn.v_proj", "attn/v", "(g k) d -> d g k", "(g k) -> g k"),
        *linear("self_attn.dense", "attn/o", "d (h k) -> h k d"),
        *norm("self_attn.q_layernorm", "attn/q_norm"),
        *norm("self_attn.k_layernorm", "attn/k_norm"),
        *linear("mlp.fc1", "mlp/up", "f d -> d f"),
        *linear("mlp.fc2", "mlp/down", "d f -> f d"),
    )),
    *norm("model.final_layernorm", "norm"),
    row("lm_head.weight", "head", "v d -> d v"),
    row("lm_head.bias", "head_bias"),
)  # fmt: skip
OWN = DEFAULTS | {
    "vocab_size": 51_200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "qk_layernorm": False,
}  # fmt: skip


def phi(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DecoderConfig:
    hf, part = partial(OWN | dict(hf))
    cfg = decoder(hf, gated=False, norms="parallel", qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=hf["qk_layernorm"])
    return replace(cfg, norm=LayerNorm(eps=hf["layer_norm_eps"]), rope=replace(cfg.rope, part=part), head="biased")


def their_phi(cfg: DecoderConfig, ids: Ids) -> tuple[dict, dict]:
    out = their_decoder(cfg, ids, "phi")
    # Its own name of the approximation, whose operations are in another order.
    own = {"layer_norm_eps": out.pop("rms_norm_eps"), "qk_layernorm": cfg.qk_norm,
           "hidden_act": "gelu_new" if cfg.activation == "gelu_tanh" else out["hidden_act"]}
    return their_partial(out, cfg.rope.part) | own, {}


PHI = replace(causal_lm("phi", "PhiForCausalLM", phi, their_phi, lambda c: c.norms == "parallel" and c.head == "biased"),
              parts=(Part(theirs="", ours="", rows=ROWS, of=lambda c: c),))
