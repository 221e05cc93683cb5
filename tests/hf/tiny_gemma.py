"""Tiny random PaliGemma and Gemma 3 with their processors, and conversations with none, one and two images."""

import io
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from PIL import Image

from mllm_jax.types import Blob, Example, Part, Turn
from tests.hf.tiny import GEMMA3_ROPES, images, randomize

SIZE, PATCH = 64, 8
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIZE,
         "patch_size": PATCH, "vision_use_head": False}
LM = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
      "max_position_embeddings": 512}


def tokenizer(**options) -> hf.GemmaTokenizer:
    """Letters, bytes, and the merges that matter: new lines in a row are one token, as in the published vocabulary."""
    merges = [("\n", "\n"), ("\n\n", "\n"), ("\n\n", "\n\n"), ("\n\n\n", "\n\n"), ("t", "h"), ("th", "e"), ("▁", "the"), ("o", "n")]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    plain = [f"<0x{i:02X}>" for i in range(256)] + list("▁\n" + string.ascii_letters + string.digits + ".,:?!<>_")
    words = list(dict.fromkeys([*special, *plain, *("".join(m) for m in merges)]))
    return hf.GemmaTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, **options)


@dataclass
class Made:
    model: torch.nn.Module
    processor: hf.ProcessorMixin
    template: str
    examples: tuple[Example, ...]
    call: Callable[[Example], dict]     # what the processor makes of an example, with its answer where it takes one


def paligemma() -> Made:
    processor = hf.PaliGemmaProcessor(
        hf.SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_seq_length=(SIZE // PATCH) ** 2), tokenizer())
    words = processor.tokenizer
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER), image_token_index=words.convert_tokens_to_ids("<image>"), projection_dim=32,
        text_config=hf.GemmaConfig(**LM, vocab_size=len(words), num_hidden_layers=3), hidden_size=32)

    def call(example: Example) -> dict:
        question, answer = (said(turn) for turn in example.turns)
        return processor(text="<image>" * len(example.media) + question, images=pictures(example), suffix=answer)

    examples = (talk(1, "caption en", "the moon"), talk(2, "the same?\n on", "<loc0012><loc0500> no"), talk(0, "who on?", "me"))
    return Made(finished(hf.PaliGemmaForConditionalGeneration(config)), processor, "paligemma", examples, call)


def gemma3() -> Made:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(extra_special_tokens=named)
    words.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}, replace_extra_special_tokens=False)
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3), words, image_seq_length=16)
    text = hf.Gemma3TextConfig(
        **LM, vocab_size=len(words), num_hidden_layers=4, query_pre_attn_scalar=20, rope_parameters=GEMMA3_ROPES,
        sliding_window=10, layer_types=["sliding_attention", "full_attention"] * 2)      # an image is longer than the window
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**TOWER), text_config=text, mm_tokens_per_image=16, image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id)

    def call(example: Example) -> dict:
        from mllm_jax.data.templates import chat_template

        content = lambda turn: [{"type": p.kind, "text": p.text} if p.kind == "text" else {"type": p.kind} for p in turn.parts]
        rendered = words.apply_chat_template(
            [{"role": t.role, "content": content(t)} for t in example.turns], chat_template=chat_template("gemma", words), tokenize=False)
        return processor(text=rendered, images=pictures(example) or None, add_special_tokens=False)

    examples = (talk(1, "what on earth?", "the moon"), talk(2, "\nthe same?", "no"), talk(0, "who on?", "me"))
    return Made(finished(hf.Gemma3ForConditionalGeneration(config)), processor, "gemma", examples, call)


MODELS = {"paligemma": paligemma, "gemma3": gemma3}


def finished(model: torch.nn.Module) -> torch.nn.Module:
    """Random throughout; norms of Gemma keep what is added to 1."""
    randomize(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and "vision" not in name:
                p.sub_(1)
        # Scaled up and tied, the embedding would have every token call for itself.
        model.get_input_embeddings().weight.mul_(0.05)
    model.generation_config.eos_token_id = None                 # answers of equal length
    model.set_attn_implementation("eager")
    return model.eval().float()


def save(made: Made, folder: Path) -> Path:
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return folder


def talk(count: int, question: str, answer: str) -> Example:
    """A question with images before, or in the middle of two texts."""
    files = images(4)[:count]
    asked = [part for i in range(count) for part in (Part(text="and"), Part(kind="image", media=i))][1:] + [Part(text=question)]
    turns = Turn(role="user", parts=tuple(asked)), Turn(role="assistant", parts=(Part(text=answer),))
    return Example(id=f"{count} {question}", turns=turns, media=tuple(Blob(kind="image", data=f) for f in files))


def said(turn: Turn) -> str:
    return "".join(part.text for part in turn.parts)


def pictures(example: Example) -> list[Image.Image]:
    return [Image.open(io.BytesIO(blob.data)).convert("RGB") for blob in example.media if blob.kind == "image"]
