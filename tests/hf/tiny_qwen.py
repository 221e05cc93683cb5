"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL with their image processors, and what their towers read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

from mllm_jax.data.tokenizer import load_tokenizer
from tests.hf.tiny import randomize

PATCH, SQUARE = 8, 16
TAGS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VISION = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
GRIDS = ((1, 4, 6), (1, 8, 8), (2, 8, 12), (1, 10, 14))         # the last ones leave windows of 4 x 4 that are not full
SIZE = {"shortest_edge": 2 * SQUARE**2, "longest_edge": 24 * SQUARE**2}


@dataclass
class Made:
    model: torch.nn.Module
    processor: Any
    template: str


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Bytes and the tags of Qwen; the end of a turn ends an answer."""
    out = load_tokenizer("bytes", media=(), tokens=TAGS)
    out.eos_token = "<|im_end|>"
    return out


def ids(words: hf.PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
             "vision_end_token_id": "<|vision_end|>"}
    return {k: words.convert_tokens_to_ids(v) for k, v in names.items()}


def qwen2_vl() -> Made:
    vision = VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    return finished(hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLProcessor, vision, text, "qwen2_vl")


def qwen2_5_vl() -> Made:
    vision = VISION | {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1],
                       "tokens_per_second": 3}
    text = TEXT | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    return finished(hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLProcessor, vision, text, "qwen2_vl")


def qwen3_vl() -> Made:
    vision = VISION | {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32, "num_position_embeddings": 49,
                       "deepstack_visual_indexes": [0, 1], "depth": 4}
    text = TEXT | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
                                                       "mrope_interleaved": True}}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return finished(hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLProcessor, vision, text, "qwen3_vl", **half)


MODELS = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


def finished(config, model, processor, vision: dict, text: dict, template: str, **colours) -> Made:
    words = tokenizer()
    tied = text.get("tie_word_embeddings", False)
    cfg = config(vision_config=vision, text_config=text | {"vocab_size": len(words)}, tie_word_embeddings=tied, **ids(words))
    made = model(cfg)
    randomize(made)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if ".norm" in name or "ln_q" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) + float(name.endswith("weight")))
        if tied:                        # scaled up and tied, the embedding would have every token call for itself
            made.get_input_embeddings().weight.mul_(0.05)
    made.generation_config.eos_token_id = None                  # answers of equal length
    made.set_attn_implementation("eager")
    pictures = hf.Qwen2VLImageProcessorPil(patch_size=PATCH, size=SIZE, **colours)
    return Made(made.eval().float(), unchecked(processor, pictures, words), template)


def unchecked(processor: type, pictures: Any, words: hf.PreTrainedTokenizerFast) -> Any:
    """The processor with no reader of videos, for which transformers wants torchvision."""
    free = type(processor.__name__, (processor,), {"check_argument_for_proper_class": lambda *_: None})
    return free(pictures, words)


def save(made: Made, folder: Path) -> Path:
    made.model.save_pretrained(folder)
    made.processor.image_processor.save_pretrained(folder)
    made.processor.tokenizer.save_pretrained(folder)
    return folder


def patches(grids: tuple = GRIDS, seed: int = 0) -> np.ndarray:
    """f32[n u] of these grids one after another, in the order (channel, time, row, column) of transformers."""
    return np.random.default_rng(seed).standard_normal((sum(int(np.prod(g)) for g in grids), 3 * 2 * PATCH**2)).astype(np.float32)
