"""BERT (arXiv:1810.04805), which Q-Formers start from: a Q-Former without queries.  It is read, and never written.

The embedding of kinds of segments is left out, as BLIP-2 leaves it out (LAVIS, Qformer.py), and so is what stands on top.
"""

from collections.abc import Mapping
from typing import Any

from mllm_jax.connectors.qformer import QFormerConfig, Words
from mllm_jax.hf.blip2 import WORDS, former
from mllm_jax.hf.family import CannotExpress, Family, Part, linear, norm, row
from mllm_jax.hf.options import Ids

HEADS = ("(h k) d -> d h k", "(h k) -> h k")
ROWS = (
    *(row(f"bert.embeddings.{r.theirs}", r.ours) for r in WORDS),
    *norm("bert.embeddings.LayerNorm", "norm"),
    *(row("bert.encoder.layer.{i}." + r.theirs, "blocks/0/" + r.ours, r.how) for r in (
        *linear("attention.self.query", "attn/q", *HEADS),
        *linear("attention.self.key", "attn/k", *HEADS),
        *linear("attention.self.value", "attn/v", *HEADS),
        *linear("attention.output.dense", "attn/o", "d (h k) -> h k d"),
        *norm("attention.output.LayerNorm", "norm1"),
        *linear("intermediate.dense", "text_mlp/up", "f d -> d f"),
        *linear("output.dense", "text_mlp/down", "d f -> f d"),
        *norm("output.LayerNorm", "text_norm"),
    )),
)  # fmt: skip


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> QFormerConfig:
    return former({**hf, "cross_attention_frequency": 0}, queries=0, tokens=0, words=True)


def hf_config(cfg: QFormerConfig, ids: Ids) -> tuple[dict, dict]:
    raise CannotExpress(f"bert is read and never written; its {Words.__name__} come back with the model that started from it")


BERT = Family(
    model_type="bert", architecture="BertModel", config=config, hf_config=hf_config,
    # Files of before 2019 call the scale and bias of a norm gamma and beta.
    memory=((r"^bert\.", ""),),
    layouts=((r"^(?!bert\.|cls\.)", "bert."), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    ignore=(r"^cls\.", r"\.pooler\.", r"token_type_embeddings\.weight$", r"position_ids$"),
    parts=(Part(theirs="", ours="", rows=ROWS, of=lambda c: c),))
