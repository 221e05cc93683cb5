"""Llama, Vicuna and Mistral; the tables of other language models begin here.

Mistral is the same network, whose layers may see the last positions only.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.decoders.layers import Layer
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.hf.family import Family, Part, Row, linear, norm, row
from mllm_jax.hf.options import Ids, activation, cycle, rope, their_activation, their_rope, window
from mllm_jax.nn.param import RMSNorm

ROWS = (
    row("model.embed_tokens.weight", "embedding/table"),
    *(row("model.layers.{i}." + r.theirs, "blocks/0/" + r.ours, r.how) for r in (
        *norm("input_layernorm", "norm1"),
        *linear("self_attn.q_proj", "attn/q", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("self_attn.k_proj", "attn/k", "(g k) d -> d g k", "(g k) -> g k"),
        *linear("self_attn.v_proj", "attn/v", "(g k) d -> d g k", "(g k) -> g k"),
        *linear("self_attn.o_proj", "attn/o", "d (h k) -> h k d"),
        row("self_attn.q_norm.weight", "attn/q_norm/scale"),
        row("self_attn.k_norm.weight", "attn/k_norm/scale"),
        *norm("post_attention_layernorm", "norm2"),
        *linear("mlp.gate_proj", "mlp/gate", "f d -> d f"),
        *linear("mlp.up_proj", "mlp/up", "f d -> d f"),
        *linear("mlp.down_proj", "mlp/down", "d f -> f d"),
    )),
    *norm("model.norm", "norm"),
    row("lm_head.weight", "head", "v d -> d v"),
)  # fmt: skip


def inside(place: str) -> tuple[Row, ...]:
    """The rows where the language model without its head is called `place` and not "model."."""
    return tuple(replace(r, theirs=r.theirs.replace("model.", place, 1)) for r in ROWS)


# The frequencies are computed; a tied head is the embedding, also where a file repeats it.
BUFFERS = (r"rotary_emb\.inv_freq$", r"lm_head\.weight$")
DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "head_dim": None, "sliding_window": None,
}  # fmt: skip


def decoder(hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    """A language model from its configuration with all defaults filled in; `layer_types` names those with a window."""
    closes = hf["sliding_window"] is not None and hf["sliding_window"] < hf["max_position_embeddings"]
    kinds = hf.get("layer_types") or ["sliding_attention"] * hf["num_hidden_layers"]
    layers = [Layer(window=hf["sliding_window"] if closes and kind == "sliding_attention" else None) for kind in kinds]
    heads, groups, width = hf["num_attention_heads"], hf["num_key_value_heads"], hf["hidden_size"]
    return DecoderConfig(
        vocab=hf["vocab_size"], width=width, depth=hf["num_hidden_layers"], heads=heads, mlp=hf["intermediate_size"],
        kv_heads=None if groups == heads else groups, head_dim=None if hf["head_dim"] == width // heads else hf["head_dim"],
        activation=activation(hf["hidden_act"]), norm=RMSNorm(eps=hf["rms_norm_eps"]), rope=rope(hf),
        head="tied" if hf["tie_word_embeddings"] else "own", cycle=cycle(layers), **options)


def their_decoder(cfg: DecoderConfig, ids: Ids, model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type, "vocab_size": cfg.vocab, "hidden_size": cfg.width, "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads or cfg.heads,
        "head_dim": cfg.head_dim or cfg.width // cfg.heads, "hidden_act": their_activation(cfg.activation),
        # A window as long as the longest row never closes, and would be read as none.
        "rms_norm_eps": cfg.norm.eps, "max_position_embeddings": max(ids.length or 4096, (window(cfg) or 0) + 1),
        **their_rope(cfg.rope),
        "tie_word_embeddings": cfg.head == "tied",
        "bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad,
    }  # fmt: skip


def llama(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DecoderConfig:
    hf = DEFAULTS | {"attention_bias": False, "mlp_bias": False} | dict(hf)
    if hf["sliding_window"] is not None:
        raise ConfigError(f"sliding_window={hf['sliding_window']}: llama has no window in transformers; if the model was trained "
                          "with one, its model_type is mistral; otherwise set it to null in config.json")
    return decoder(hf, qkv_bias=hf["attention_bias"], out_bias=hf["attention_bias"], mlp_bias=hf["mlp_bias"])


def their_llama(cfg: DecoderConfig, ids: Ids) -> tuple[dict, dict]:
    return their_decoder(cfg, ids, "llama") | {"attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}, {}


def mistral(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DecoderConfig:
    own = {"intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
    return decoder(DEFAULTS | own | dict(hf))


def their_mistral(cfg: DecoderConfig, ids: Ids) -> tuple[dict, dict]:
    return their_decoder(cfg, ids, "mistral") | {"sliding_window": window(cfg)}, {}


def plain(cfg: DecoderConfig) -> bool:
    """Whether the norms are where Llama has them, and what they are there."""
    return cfg.norms == "before" and getattr(cfg.norm, "offset", 1) == 0


def causal_lm(model_type: str, architecture: str, config, hf_config, like: Callable[[DecoderConfig], bool]) -> Family:
    return Family(
        model_type=model_type, architecture=architecture, config=config, hf_config=hf_config, ignore=BUFFERS,
        like=lambda c: isinstance(c, DecoderConfig) and like(c),
        layouts=((r"^(?!model\.|lm_head\.)", "model."),),       # of the model without its head
        parts=(Part(theirs="", ours="", rows=ROWS, of=lambda c: c),))


LLAMA = causal_lm("llama", "LlamaForCausalLM", llama, their_llama,
                  lambda c: plain(c) and not c.qk_norm and (not c.qkv_bias or c.out_bias) and window(c) is None)
# Llama with other numbers, and written as Llama unless it has a window or is asked for.
MISTRAL = causal_lm("mistral", "MistralForCausalLM", mistral, their_mistral,
                    lambda c: plain(c) and not c.qk_norm and not c.qkv_bias and window(c) is not None)
