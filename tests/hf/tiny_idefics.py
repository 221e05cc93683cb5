"""Tiny random Idefics with its processor, and documents with none, one and several images.

    resampled   a perceiver and normalized queries, one number a gate, read by every second layer, a head of its own
    plain       all patches and the class token, a gate for each channel, read by every layer, the head is the embedding
"""

from pathlib import Path

import torch
import transformers as hf

from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.types import Blob, Example, Part, Turn
from tests.hf.tiny import images, randomize
from tests.hf.tiny_gemma import Made, pictures

SIZE, PATCH = 32, 8
TOWER = {"embed_dim": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH}
LM = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 256}
PERCEIVER = {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 10, "qk_layer_norms_perceiver": True}
KINDS = {
    "resampled": {"num_hidden_layers": 4, "cross_layer_interval": 2, "qk_layer_norms": True, "use_resampler": True,
                  "perceiver_config": {"use_resampler": True, **PERCEIVER}},
    "plain": {"num_hidden_layers": 2, "alpha_type": "vector", "tie_word_embeddings": True},
}


def make(kind: str, folder: Path) -> Made:
    """`folder` is for the tokenizer: of the language model, to which the tokens of images are added at the end."""
    load_tokenizer("bytes", media=()).save_pretrained(folder)
    old = load_tokenizer(str(folder), media=())
    words = load_tokenizer(str(folder), media=("image",), tokens=("<fake_token_around_image>", "<end_of_utterance>"))
    processor = hf.IdeficsProcessor(hf.IdeficsImageProcessorPil(image_size=SIZE), words)
    config = hf.IdeficsConfig(
        **LM, **KINDS[kind], vocab_size=len(old), additional_vocab_size=len(words) - len(old), vision_config=TOWER,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model = hf.IdeficsForVisionText2Text(config)
    randomize(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.requires_grad_(True)
            if ".1.ln.weight" in name:
                p.add_(1)
            if name.endswith(("self_attn.q_proj.weight", "self_attn.v_proj.weight")):
                p.mul_(3)                   # so that answers come from what stands before, and not from the last token
            if "alpha" in name:             # open, and each in its own way
                p.copy_(0.8 + 0.3 * torch.randn(p.shape, generator=generator))
    model.generation_config.eos_token_id = None     # answers of equal length
    model.set_attn_implementation("eager")

    def call(example: Example, **options) -> dict:
        files = iter(pictures(example))
        items = [part.text if part.kind == "text" else next(files) for turn in example.turns for part in turn.parts]
        return processor(text=items, add_eos_token=example.turns[-1].role == "assistant", **options)

    examples = (document("so it began ", 0, 1, " two at once, ", 2, "and the end."), document(3, "a moon"), document("no picture at all"))
    return Made(model.eval().float(), processor, "idefics", examples, call)


def document(*pieces: str | int) -> Example:
    """Text and numbers of images."""
    files = images(4)
    used = [p for p in pieces if isinstance(p, int)]
    parts = tuple(Part(text=p) if isinstance(p, str) else Part(kind="image", media=used.index(p)) for p in pieces)
    return Example(id=str(pieces), turns=(Turn(role="assistant", parts=parts),), media=tuple(Blob(kind="image", data=files[i]) for i in used))


def save(made: Made, folder: Path) -> Path:
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return folder
