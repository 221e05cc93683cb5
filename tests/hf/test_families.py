"""Configurations: what we say is what they say, for presets and recipes; `load(save(x)) == x`."""

from dataclasses import replace

import pytest

from mllm_jax.config import load as recipe
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.hf.families import FAMILIES, family_of
from mllm_jax.hf.family import differences
from mllm_jax.hf.options import Ids

# From the config.json of the Hub, without what does not matter here.
PUBLISHED = {
    "openai/clip-vit-large-patch14": (
        "clip_vision_model", vit.CLIP_L14_224,
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}),
    "google/siglip-so400m-patch14-384": (
        "siglip_vision_model", vit.SIGLIP_SO400M_384,
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384,
         "patch_size": 14}),
    "meta-llama/Llama-3.1-8B": (
        "llama", llm.LLAMA_3_1_8B,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
         "max_position_embeddings": 131072,
         "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                          "original_max_position_embeddings": 8192}}),
    "mistralai/Mistral-7B-v0.1 without its window": (
        "mistral", llm.MISTRAL_7B,
        {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-5, "sliding_window": None,
         "max_position_embeddings": 32768}),
    "Qwen/Qwen2-7B": (
        "qwen2", llm.QWEN2_7B,
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
         "num_key_value_heads": 4, "rope_theta": 1000000.0, "vocab_size": 152064, "use_sliding_window": False,
         "sliding_window": 131072, "max_position_embeddings": 131072}),
    "Qwen/Qwen3-8B": (
        "qwen3", llm.QWEN3_8B,
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36, "head_dim": 128,
         "num_key_value_heads": 8, "rope_theta": 1000000, "vocab_size": 151936, "max_position_embeddings": 40960}),
    "facebook/opt-2.7b": (
        "opt", llm.OPT_2_7B,
        {"activation_function": "relu", "do_layer_norm_before": True, "ffn_dim": 10240, "hidden_size": 2560, "max_position_embeddings": 2048,
         "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 50272, "word_embed_proj_dim": 2560}),
    "microsoft/phi-2": (
        "phi", llm.PHI_2,
        {"hidden_act": "gelu_new", "hidden_size": 2560, "intermediate_size": 10240, "layer_norm_eps": 1e-5, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_theta": 10000.0,
         "vocab_size": 51200}),
    "stabilityai/stablelm-2-1_6b": (
        "stablelm", llm.STABLELM_2_1_6B,
        {"hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "layer_norm_eps": 1e-5, "max_position_embeddings": 4096,
         "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32, "partial_rotary_factor": 0.25,
         "rope_theta": 10000, "use_qkv_bias": True, "vocab_size": 100352}),
    "google/gemma-2b": (
        "gemma", llm.GEMMA_2B,
        {"hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18,
         "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000, "rope_theta": 10000.0}),
    "google/gemma-3-4b-it, text_config": (
        "gemma3_text", llm.GEMMA3_4B,
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    "google/gemma-3-12b-it, text_config": (
        "gemma3_text", llm.GEMMA3_12B,
        {"hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48, "num_key_value_heads": 8,
         "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    "google/gemma-3-27b-it, text_config": (
        "gemma3_text", llm.GEMMA3_27B,
        {"head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "num_hidden_layers": 62,
         "num_key_value_heads": 16, "query_pre_attn_scalar": 168, "sliding_window": 1024,
         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_model(name):
    model_type, preset, hf = PUBLISHED[name]
    if model_type == "clip_vision_model":
        hf = hf | {"image_size": 224}
    assert differences(FAMILIES[model_type].config(hf, {}), preset) == {}


QWEN_ROPE = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
QWEN = {
    "2-7b": ("qwen2_vl", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "vocab_size": 152064, "tie_word_embeddings": False, **QWEN_ROPE,
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584, "patch_size": 14}}),
    "2.5-3b": ("qwen2_5_vl", {
        "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "vocab_size": 151936, "tie_word_embeddings": True, **QWEN_ROPE,
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048,
                          "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}}),
    "3-4b": ("qwen3_vl", {
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}},
        "vision_config": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "deepstack_visual_indexes": [5, 11, 17],
                          "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16}}),
}  # fmt: skip


@pytest.mark.parametrize("size", QWEN)
def test_qwen_vl_is_the_published_model(size):
    model_type, hf = QWEN[size]
    model = recipe(f"resolution/qwen2_vl:model={size}").model
    assert differences(FAMILIES[model_type].config(hf, {}), model, (r".*\bview(\..*)?",)) == {}
    family = family_of(model)
    assert family.model_type == model_type and len(family.links(model)) > 400
    theirs = family.express(model, Ids(bos=1, eos=5, pad=0, image=7, video=8, length=64))
    assert differences(family.config(*theirs), model, family.free) == {}


@pytest.mark.parametrize("name", ["contrastive/clip", "contrastive/siglip", "projector/llava_15", "first/digits", "resampler/blip2",
                                  "resampler/instructblip"])
def test_a_recipe_has_a_place_on_the_hub(name):
    model = recipe(name).model
    family = family_of(model)
    theirs = family.express(model, Ids(bos=1, eos=5, pad=0, image=7, length=64))
    assert differences(family.config(*theirs), model, family.free) == {}
    assert len(family.links(model)) > 100                       # every parameter has a row


def test_differences_are_those_of_meaning():
    cfg = llm.LLAMA
    assert differences(cfg, replace(cfg, kv_heads=32, head_dim=128)) == {}
    assert list(differences(cfg, replace(cfg, kv_heads=8))) == ["kv_heads"]
    deep = replace(vit.CLIP_L14_336, layer=-2)
    assert differences(deep, replace(deep, layer=23, table=24)) == {}
