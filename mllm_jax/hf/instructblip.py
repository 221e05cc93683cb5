"""InstructBLIP (arXiv:2305.06500) as `InstructBlipForConditionalGeneration` with Vicuna: BLIP-2 whose Q-Former reads the instruction.

The tokenizer of what the Q-Former reads lies in a folder of its own, `qformer_tokenizer`.
"""

from collections.abc import Mapping
from typing import Any

from mllm_jax.connectors.qformer import QFormerConfig
from mllm_jax.hf import blip2, language, llama, llava
from mllm_jax.hf.family import Family, Part, norm, row
from mllm_jax.hf.options import Ids
from mllm_jax.models.mllm import MLLMConfig

EMBEDDINGS = (*(row(f"embeddings.{r.theirs}", r.ours) for r in blip2.WORDS), *norm("embeddings.layernorm", "norm"))


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    return MLLMConfig(inputs={"image": blip2.tower(hf, pre, words=True)}, decoder=blip2.decoder_of(hf, "instructblip", "llama"))


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    own, pre = blip2.their_tower(llava.the_tower(cfg, "instructblip", QFormerConfig), "instructblip")
    out = {
        "model_type": "instructblip", **own, "text_config": language.their_decoder(cfg.decoder, ids), "image_token_index": ids.image,
        "use_decoder_only_language_model": True, "tie_word_embeddings": cfg.decoder.head == "tied", **llava.special(ids),
    }  # fmt: skip
    return out, pre


INSTRUCTBLIP = Family(
    model_type="instructblip", architecture="InstructBlipForConditionalGeneration", config=config, hf_config=hf_config,
    like=lambda c: blip2.connected(c, words=True), processor_class="InstructBlipProcessor",
    processor=lambda cfg: {"num_query_tokens": blip2.CONNECTOR(cfg).queries},
    tokenizers={"qformer_tokenizer": "inputs.image.connector.words.tokenizer"},
    parts=(*blip2.PARTS, Part(theirs="qformer.", ours="inputs/image/connector/former/", rows=EMBEDDINGS, of=blip2.CONNECTOR),
           blip2.OUT, Part(theirs="language_model.", ours="decoder/", rows=llama.ROWS, of=lambda c: c.decoder)),
    ignore=blip2.BUFFERS, free=blip2.WORDS_FREE)
