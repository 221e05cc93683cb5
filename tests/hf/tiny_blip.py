"""Tiny random BLIP-2 and InstructBLIP with their processors, and conversations with none, one and two images."""

import io
import string
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.types import Blob, Example, Part, Turn
from tests.hf.tiny import images, randomize

SIZE, PATCH, QUERIES = 32, 8, 5
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH}
FORMER = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 40,
          "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": None}
LM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 192, "pad_token_id": None}


def writer() -> hf.PreTrainedTokenizerFast:
    """Bytes, with a token that begins every text, as OPT's and Vicuna's tokenizers write it."""
    words = load_tokenizer("bytes")
    bos = words.bos_token
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words.bos_token_id)])
    return words


def bert() -> hf.BertTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*special, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), *".,?!", "the", "##on"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(letters)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = [(w, special.index(w)) for w in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    named = {f"{w.strip('[]').lower()}_token": w for w in special}
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, **named, model_input_names=["input_ids", "attention_mask"])


@dataclass
class Made:
    model: torch.nn.Module
    processor: hf.ProcessorMixin
    template: str
    examples: tuple[Example, ...]


def blip2() -> Made:
    words = writer()
    processor = hf.Blip2Processor(picture(), words, num_query_tokens=QUERIES)
    config = hf.Blip2Config(
        vision_config=VISION, qformer_config=FORMER, num_query_tokens=QUERIES, image_token_index=words.convert_tokens_to_ids("<image>"),
        text_config=hf.OPTConfig(**LM, vocab_size=264, ffn_dim=48).to_dict())
    examples = (talk(1, "what on earth?", "the moon"), talk(2, "the same?", "no"), talk(0, "who on?", "me"), talk(1, "", "a moon, and on it me"))
    return Made(finished(hf.Blip2ForConditionalGeneration(config)), processor, "blip2", examples)


def instructblip() -> Made:
    words, read = writer(), bert()
    processor = hf.InstructBlipProcessor(picture(), words, read, num_query_tokens=QUERIES)
    config = hf.InstructBlipConfig(
        vision_config=VISION, qformer_config=FORMER | {"vocab_size": len(read) + 1}, num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        text_config=hf.LlamaConfig(**LM, vocab_size=264, intermediate_size=48, num_key_value_heads=2).to_dict())
    examples = (talk(1, "what on earth?", "the moon"), talk(2, "The same?", "no"), talk(0, "who on?", "me"))
    return Made(finished(hf.InstructBlipForConditionalGeneration(config)), processor, "instructblip", examples)


MODELS = {"blip-2": blip2, "instructblip": instructblip}


def retrieval() -> Made:
    read = bert()
    config = hf.Blip2Config(
        vision_config=VISION, qformer_config=FORMER | {"vocab_size": len(read) + 1, "use_qformer_text_input": True},
        num_query_tokens=QUERIES, image_text_hidden_size=12, image_token_index=None)
    return Made(finished(hf.Blip2ForImageTextRetrieval(config)), hf.Blip2Processor(picture(), read), "clip", ())


def picture() -> hf.BlipImageProcessorPil:
    return hf.BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})


def finished(model: torch.nn.Module) -> torch.nn.Module:
    """Random throughout, but for the bias of keys, which is nobody's."""
    randomize(model)
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[VISION["hidden_size"] : 2 * VISION["hidden_size"]] = 0
        if isinstance(model, hf.Blip2ForConditionalGeneration):         # whose embedding, being the head too, would call for itself
            model.get_input_embeddings().weight.mul_(0.1)
    if model.can_generate():
        model.generation_config.eos_token_id = None             # answers of equal length
    return model.eval().float()


def save(made: Made, folder: Path) -> Path:
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return folder


def talk(count: int, question: str, answer: str) -> Example:
    files = images(4)[:count]
    asked = [Part(kind="image", media=i) for i in range(count)] + ([Part(text=question)] if question else [])
    turns = Turn(role="user", parts=tuple(asked)), Turn(role="assistant", parts=(Part(text=answer),))
    return Example(id=f"{count} {question}", turns=turns, media=tuple(Blob(kind="image", data=f) for f in files))


def pictures(example: Example) -> list[Image.Image]:
    return [Image.open(io.BytesIO(blob.data)).convert("RGB") for blob in example.media]
