"""The language models that the multimodal families of the Hub are built on, by `model_type` of their text configuration."""

from collections.abc import Mapping
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.hf import gemma, llama, opt, qwen, stablelm
from mllm_jax.hf.family import CannotExpress, Family
from mllm_jax.hf.options import Ids

DECODERS: dict[str, Family] = {
    f.model_type: f
    for f in (llama.LLAMA, llama.MISTRAL, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA, opt.OPT, stablelm.STABLELM)
}  # fmt: skip


def decoder(text: Mapping[str, Any], where: str, *, tied: bool | None = None) -> DecoderConfig:
    """A `text_config` as ours; `tied` is what the configuration around it says of the head."""
    kind = text.get("model_type", "llama")
    if kind not in DECODERS:
        raise ConfigError(f"{where} with the language model {kind} is not supported; supported are {', '.join(DECODERS)}")
    return DECODERS[kind].config({**text, **({} if tied is None else {"tie_word_embeddings": tied})}, {})


def of_model(hf: Mapping[str, Any], where: str, *, either: bool = False) -> DecoderConfig:
    """The language model of a configuration that has a `text_config`.

    Whether its head is tied says the configuration around it, or `either` of them, as in LLaVA and LLaVA-OneVision.
    """
    text = hf.get("text_config") or {}
    return decoder(text, where, tied=bool(hf.get("tie_word_embeddings") or (either and text.get("tie_word_embeddings"))))


def their_decoder(cfg: DecoderConfig, ids: Ids) -> dict[str, Any]:
    """The `text_config` of a decoder of ours."""
    for found in DECODERS.values():
        if found.like(cfg):
            return found.hf_config(cfg, ids)[0]
    raise CannotExpress(f"no language model of the Hub is like this decoder: {cfg}")
