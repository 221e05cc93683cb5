"""OPT (arXiv:2205.01068): learned positions whose table begins two rows before position 0, LayerNorm, ReLU, a tied head.

OPT-350M, whose norms come after each sum and whose embeddings are narrower than its layers, is not supported.
"""

from collections.abc import Mapping
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.hf import llama
from mllm_jax.hf.family import Family, Part, linear, norm, row
from mllm_jax.hf.options import Ids, activation, their_activation
from mllm_jax.nn.param import LayerNorm

ROWS = (
    row("model.decoder.embed_tokens.weight", "embedding/table"),
    row("model.decoder.embed_positions.weight", "position"),
    *(row("model.decoder.layers.{i}." + r.theirs, "blocks/0/" + r.ours, r.how) for r in (
        *norm("self_attn_layer_norm", "norm1"),
        *linear("self_attn.q_proj", "attn/q", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("self_attn.k_proj", "attn/k", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("self_attn.v_proj", "attn/v", "(h k) d -> d h k", "(h k) -> h k"),
        *linear("self_attn.out_proj", "attn/o", "d (h k) -> h k d"),
        *norm("final_layer_norm", "norm2"),
        *linear("fc1", "mlp/up", "f d -> d f"),
        *linear("fc2", "mlp/down", "d f -> f d"),
    )),
    *norm("model.decoder.final_layer_norm", "norm"),
    row("lm_head.weight", "head", "v d -> d v"),
)  # fmt: skip
OFFSET = 2
DEFAULTS = {
    "vocab_size": 50_272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12,
    "max_position_embeddings": 2048, "activation_function": "relu", "tie_word_embeddings": True,
}  # fmt: skip
ONLY = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True, "layer_norm_elementwise_affine": True}


def decoder(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> DecoderConfig:
    hf = DEFAULTS | ONLY | dict(hf)
    for key, value in (ONLY | {"word_embed_proj_dim": hf["hidden_size"]}).items():
        if (have := hf.get(key)) is not None and have != value:
            raise ConfigError(f"opt with {key}={have} is not supported; supported is {value} (all published sizes but 350M)")
    return DecoderConfig(
        vocab=hf["vocab_size"], width=hf["hidden_size"], depth=hf["num_hidden_layers"], heads=hf["num_attention_heads"],
        mlp=hf["ffn_dim"], gated=False, activation=activation(hf["activation_function"]), norm=LayerNorm(),
        qkv_bias=True, out_bias=True, mlp_bias=True, rope=None, positions=hf["max_position_embeddings"] + OFFSET,
        position_offset=OFFSET, head="tied" if hf["tie_word_embeddings"] else "own")


def their_decoder(cfg: DecoderConfig, ids: Ids) -> tuple[dict, dict]:
    return {
        "model_type": "opt", "vocab_size": cfg.vocab, "hidden_size": cfg.width, "word_embed_proj_dim": cfg.width, "ffn_dim": cfg.mlp,
        "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.heads, "max_position_embeddings": cfg.positions - OFFSET,
        "activation_function": their_activation(cfg.activation), "do_layer_norm_before": True,
        "tie_word_embeddings": cfg.head == "tied", "bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad,
    }, {}  # fmt: skip


OPT = Family(
    model_type="opt", architecture="OPTForCausalLM", config=decoder, hf_config=their_decoder, ignore=llama.BUFFERS,
    like=lambda c: isinstance(c, DecoderConfig) and c.position_offset == OFFSET,
    layouts=((r"^(?=decoder\.)", "model."),),                   # of the model without its head
    parts=(Part(theirs="", ours="", rows=ROWS, of=lambda c: c),))
