"""BLIP-2 (arXiv:2301.12597): `Blip2ForConditionalGeneration` with OPT, and `Blip2ForImageTextRetrieval`, its first stage.

One matrix makes queries, keys and values of the tower, and one vector is their bias, whose part for keys is zero: softmax does
not see it, we have no such parameter, and should a file have other values there, they are left out.  transformers keeps
neither the layer that writes captions nor the temperature of the first stage.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.qformer import QFormerConfig, Words
from mllm_jax.encoders.vit import EVA_G14_224, ViTConfig
from mllm_jax.hf import clip, language, llama, llava, opt
from mllm_jax.hf.family import Family, Part, linear, norm, row
from mllm_jax.hf.options import CLIP_COLOURS, Ids, activation, colours, their_view, view
from mllm_jax.models.bridge import BridgeConfig
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.param import LayerNorm

QKV = [(f"attn/{x}", (n, 3)) for n, x in enumerate("qkv")]
VISION = (
    row("embeddings.class_embedding", "class_token", "1 1 d -> d"),
    *linear("embeddings.patch_embedding", "patch", "d c p q -> (p q c) d"),
    row("embeddings.position_embedding", "position", "1 n d -> n d"),
    *(row("encoder.layers.{i}." + r.theirs, "blocks/0/" + r.ours, r.how, r.part) for r in (
        *norm("layer_norm1", "norm1"),
        *(row("self_attn.qkv.weight", f"{ours}/kernel", "(h k) d -> d h k", part) for ours, part in QKV),
        *(row("self_attn.qkv.bias", f"{ours}/bias", "(h k) -> h k", part) for ours, part in QKV),
        *linear("self_attn.projection", "attn/o", "d (h k) -> h k d"),
        *norm("layer_norm2", "norm2"),
        *linear("mlp.fc1", "mlp/up", "f d -> d f"),
        *linear("mlp.fc2", "mlp/down", "d f -> f d"),
    )),
    *norm("post_layernorm", "norm"),
)  # fmt: skip
HEADS = ("(h k) d -> d h k", "(h k) -> h k")
FORMER = (
    row("query_tokens", "queries", "1 q d -> q d"),
    *(row("qformer.encoder.layer.{i}." + r.theirs, "blocks/0/" + r.ours, r.how) for r in (
        *(r for theirs, ours, after in (("attention", "attn", "norm1"), ("crossattention", "cross", "cross_norm")) for r in (
            *linear(f"{theirs}.attention.query", f"{ours}/q", *HEADS),
            *linear(f"{theirs}.attention.key", f"{ours}/k", *HEADS),
            *linear(f"{theirs}.attention.value", f"{ours}/v", *HEADS),
            *linear(f"{theirs}.output.dense", f"{ours}/o", "d (h k) -> h k d"),
            *norm(f"{theirs}.output.LayerNorm", after),
        )),
        *(r for kind, mlp, after in (("_query", "mlp", "norm2"), ("", "text_mlp", "text_norm")) for r in (
            *linear(f"intermediate{kind}.dense", f"{mlp}/up", "f d -> d f"),
            *linear(f"output{kind}.dense", f"{mlp}/down", "d f -> f d"),
            *norm(f"output{kind}.LayerNorm", after),
        )),
    )),
)  # fmt: skip
WORDS = (row("word_embeddings.weight", "embedding/table"), row("position_embeddings.weight", "position"))
PROJECTIONS = (
    *linear("vision_projection", "inputs/image/connector/out", "f d -> d f"),
    *linear("text_projection", "text", "f d -> d f"),
    *linear("itm_head", "match", "f d -> d f"),
)
BUFFERS = (r"embeddings\.position_ids$", *llama.BUFFERS)
# What a language model reads of the text is said by the folder of its tokenizer.
WORDS_FREE = (r"inputs\.image\.connector\.words\.(tokenizer|length)",)


def vit(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> ViTConfig:
    """The `vision_config`; what it leaves out is as in EVA-CLIP-g."""
    hf = their_vit(EVA_G14_224, "") | dict(hf)
    return replace(
        EVA_G14_224, width=hf["hidden_size"], depth=hf["num_hidden_layers"], heads=hf["num_attention_heads"], mlp=hf["intermediate_size"],
        patch=hf["patch_size"], grid=hf["image_size"] // hf["patch_size"], activation=activation(hf["hidden_act"]),
        norm=LayerNorm(eps=hf["layer_norm_eps"]), qkv_bias=hf["qkv_bias"], **colours(pre, CLIP_COLOURS))


def their_vit(cfg: ViTConfig, model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, **clip.their_tower(cfg), "image_size": cfg.grid * cfg.patch, "patch_size": cfg.patch,
            "qkv_bias": cfg.qkv_bias}


def former(hf: Mapping[str, Any], queries: int, tokens: int, *, words: bool) -> QFormerConfig:
    """The `qformer_config`; what it leaves out is as in BERT."""
    hf = {"vocab_size": 30_522} | their_former(QFormerConfig(tokens=0), 0, "") | dict(hf)
    return QFormerConfig(
        tokens=tokens, queries=queries, width=hf["hidden_size"], depth=hf["num_hidden_layers"], heads=hf["num_attention_heads"],
        mlp=hf["intermediate_size"], every=hf["cross_attention_frequency"], activation=activation(hf["hidden_act"]),
        norm=LayerNorm(eps=hf["layer_norm_eps"]),
        words=words_of(hf["vocab_size"], hf["max_position_embeddings"]) if words else None)


def words_of(vocab: int, positions: int) -> Words:
    usual = Words()
    return replace(usual, vocab=vocab, positions=positions, length=min(usual.length, positions))


def their_former(cfg: QFormerConfig, width: int, model_type: str) -> dict[str, Any]:
    text = {"vocab_size": cfg.words.vocab} if cfg.words else {}
    return {
        "model_type": model_type, **clip.their_tower(cfg), "cross_attention_frequency": cfg.every, "encoder_hidden_size": width,
        "max_position_embeddings": cfg.words.positions if cfg.words else 512, **text,
    }  # fmt: skip


def tower(hf: Mapping[str, Any], pre: Mapping[str, Any], *, words: bool) -> TowerConfig:
    """The tower that both families, and InstructBLIP, read images with."""
    encoder = vit(hf.get("vision_config") or {}, pre)
    connector = former(hf.get("qformer_config") or {}, hf.get("num_query_tokens", 32), encoder.grid**2 + 1, words=words)
    # Its image processor resizes to the square, and never crops.
    square = view({**pre, "do_center_crop": False}, encoder.grid * encoder.patch, crop=False)
    return TowerConfig(view=square, encoder=encoder, connector=connector)


def their_tower(of: TowerConfig, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what config.json says of the tower, the image processor) with names of types that begin with `family`."""
    encoder, connector = of.encoder, of.connector
    if encoder.key_bias and encoder.qkv_bias or not encoder.keep_class or not encoder.final_norm:
        raise ConfigError("blip-2 has a tower like EVA-CLIP: without bias of keys, with class token and last norm among its features")
    out = {
        "vision_config": their_vit(encoder, f"{family}_vision_model"), "num_query_tokens": connector.queries,
        "qformer_config": their_former(connector, encoder.width, f"{family}_qformer"),
    }  # fmt: skip
    return out, their_view(of.view, encoder) | {"image_processor_type": "BlipImageProcessor"}


def decoder_of(hf: Mapping[str, Any], where: str, kind: str) -> Any:
    """The language model, which must be of this kind; the published ones are that, and T5."""
    text = dict(hf.get("text_config") or {})
    if text.setdefault("model_type", "opt") != kind:
        raise ConfigError(f"{where} with the language model {text['model_type']} is not supported; supported is {kind}")
    return language.decoder(text, where)


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    if (hf.get("qformer_config") or {}).get("use_qformer_text_input"):
        raise ConfigError("blip-2 with use_qformer_text_input=true has layers for text that its language model never reads; "
                          "only Blip2ForImageTextRetrieval is supported with them")
    return MLLMConfig(inputs={"image": tower(hf, pre, words=False)}, decoder=decoder_of(hf, "blip-2", "opt"))


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    own, pre = their_tower(llava.the_tower(cfg, "blip-2", QFormerConfig), "blip_2")
    out = {
        "model_type": "blip-2", **own, "text_config": language.their_decoder(cfg.decoder, ids), "image_token_index": ids.image,
        "use_decoder_only_language_model": True, "tie_word_embeddings": cfg.decoder.head == "tied", **llava.special(ids),
    }  # fmt: skip
    return out, pre


def retrieval(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> BridgeConfig:
    image = replace(tower(hf, pre, words=True), route="pool")
    return BridgeConfig(inputs={"image": image}, dim=hf.get("image_text_hidden_size", 256), temperature=None, captions=False)


def their_retrieval(cfg: BridgeConfig, ids: Ids) -> tuple[dict, dict]:
    own, pre = their_tower(cfg.tower, "blip_2")
    own["qformer_config"]["use_qformer_text_input"] = True
    # Its processor would write 32 placeholders before each text, for the model to cut off again.
    return {"model_type": "blip-2", **own, "image_text_hidden_size": cfg.dim, "image_token_index": None}, pre


def connected(cfg: Any, *, words: bool) -> bool:
    """Whether a language model reads a Q-Former's queries."""
    formers = [t.connector for t in cfg.inputs.values()] if isinstance(cfg, MLLMConfig) else []
    return len(formers) == 1 and isinstance(formers[0], QFormerConfig) and (formers[0].words is not None) == words


TOWER = lambda c: c.inputs["image"].encoder
CONNECTOR = lambda c: c.inputs["image"].connector
PARTS = (
    Part(theirs="vision_model.", ours="inputs/image/encoder/", rows=VISION, of=TOWER),
    Part(theirs="", ours="inputs/image/connector/former/", rows=FORMER, of=CONNECTOR),
)
NORM = Part(theirs="qformer.", ours="inputs/image/connector/former/", rows=norm("layernorm", "norm"), of=CONNECTOR)
OUT = Part(theirs="", ours="inputs/image/connector/", rows=linear("language_projection", "out", "f d -> d f"), of=CONNECTOR)

BLIP2 = Family(
    model_type="blip-2", architecture="Blip2ForConditionalGeneration", config=config, hf_config=hf_config,
    like=lambda c: connected(c, words=False), processor_class="Blip2Processor",
    processor=lambda cfg: {"num_query_tokens": CONNECTOR(cfg).queries},
    parts=(*PARTS, NORM, OUT, Part(theirs="language_model.", ours="decoder/", rows=opt.ROWS, of=lambda c: c.decoder)),
    ignore=BUFFERS)
RETRIEVAL = Family(
    model_type="blip-2", variant="retrieval", architecture="Blip2ForImageTextRetrieval", config=retrieval,
    hf_config=their_retrieval, like=lambda c: isinstance(c, BridgeConfig), processor_class="Blip2Processor",
    processor=lambda cfg: {"num_query_tokens": None},
    parts=(*PARTS, NORM, Part(theirs="embeddings.", ours="inputs/image/connector/former/", rows=WORDS, of=CONNECTOR),
           Part(theirs="", ours="", rows=PROJECTIONS, of=lambda c: c)),
    ignore=BUFFERS, free=WORDS_FREE)
