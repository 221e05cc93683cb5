"""Tiny random models of transformers, with every norm, bias, class token, position and scale randomized.

What starts at zero or one would hide a swapped or forgotten tensor.
"""

import io
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from PIL import Image

PATCH, SIZE, VOCAB, IMAGE_TOKEN = 8, 32, 96, 95
LM = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
      "num_key_value_heads": 2, "max_position_embeddings": 128}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE,
         "patch_size": PATCH}
TEXT = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 12, "eos_token_id": 94, "bos_token_id": 93, "pad_token_id": 1}

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
GEMMA3_ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}
DECODERS = {
    "llama": lambda: hf.LlamaConfig(**LM, rms_norm_eps=1e-5),
    "mistral": lambda: hf.MistralConfig(**LM, sliding_window=None, head_dim=16),
    "qwen2": lambda: hf.Qwen2Config(**LM, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": lambda: hf.Qwen3Config(**LM, head_dim=12, tie_word_embeddings=True),
    "llama_biased": lambda: hf.LlamaConfig(**LM, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "mistral_window": lambda: hf.MistralConfig(**LM, sliding_window=9),
    "qwen2_window": lambda: hf.Qwen2Config(
        **LM, use_sliding_window=True, sliding_window=7, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "gemma": lambda: hf.GemmaConfig(**LM, head_dim=12, pad_token_id=None),       # whose gradient torch would leave out
    "gemma3_text": lambda: hf.Gemma3TextConfig(
        **LM | {"num_hidden_layers": 4}, head_dim=12, sliding_window=10, query_pre_attn_scalar=20, pad_token_id=None,
        layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=GEMMA3_ROPES),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
        pad_token_id=None),             # whose gradient torch would leave out
    "phi": lambda: hf.PhiConfig(**LM, qk_layernorm=True, rope_parameters={"rope_type": "default", "rope_theta": 1e3,
                                                                         "partial_rotary_factor": 0.25}),
    "stablelm": lambda: hf.StableLmConfig(**LM, use_qkv_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e3,
                                                                                    "partial_rotary_factor": 0.5}),
    "llama_linear": lambda: hf.LlamaConfig(**LM, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
}
TOWERS = {
    "clip": lambda: hf.CLIPVisionConfig(**TOWER),
    "siglip": lambda: hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
}
PROCESSORS = {
    "clip": lambda: hf.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
    "siglip": lambda: hf.SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}),
    "pad": lambda: hf.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
}
LLAVAS = [f"llava-{t}-{d}" for t in TOWERS for d in ("llama", "mistral", "qwen2", "qwen3")] + ["llava-siglip-gemma", "llava-clip-stablelm"]


def build(name: str) -> tuple[torch.nn.Module, object | None]:
    """(a random model in evaluation mode, its image processor)."""
    processor = None
    if name in DECODERS:
        config = DECODERS[name]()
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    elif name in ("clip", "siglip"):
        kind = {"clip": hf.CLIPModel, "siglip": hf.SiglipModel}[name]
        extra = {"projection_dim": 20} if name == "clip" else {}
        config = kind.config_class(text_config=TEXT, vision_config=TOWER, **extra)
        model, processor = kind(config), PROCESSORS[name]()
    elif name.endswith("_vision"):
        model = {"clip_vision": hf.CLIPVisionModel, "siglip_vision": hf.SiglipVisionModel}[name](
            {"clip_vision": hf.CLIPVisionConfig, "siglip_vision": hf.SiglipVisionConfig}[name](**TOWER))
    else:
        _, tower, decoder = name.split("-")
        clip = tower != "siglip"
        config = hf.LlavaConfig(
            vision_config=TOWERS["clip" if clip else "siglip"](), text_config=DECODERS[decoder](), image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-2 if clip else -1, vision_feature_select_strategy="default" if clip else "full",
            image_seq_length=(SIZE // PATCH) ** 2)
        model, processor = hf.LlavaForConditionalGeneration(config), PROCESSORS[tower]()
    randomize(model)
    return model.eval().float(), processor


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name or "layrnorm" in name:
                p.copy_(0.2 * noise + float(name.endswith("weight")))
            elif name.endswith("logit_scale"):
                p.fill_(1.7)
            else:
                p.copy_(noise * (0.2 if p.ndim < 2 else p.shape[-1] ** -0.5))


def save(name: str, folder: Path) -> tuple[torch.nn.Module, object | None]:
    """As `build`, and written as transformers writes it."""
    model, processor = build(name)
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return model, processor


def images(n: int, seed: int = 0) -> list[bytes]:
    """PNG files of different sizes and shapes, smooth enough that resizing them matters."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize([(70, 41), (33, 90), (50, 50), (32, 32)][i % 4], Image.Resampling.BILINEAR).save(file, "png")
        out.append(file.getvalue())
    return out


def pixel_values(processor, files: list[bytes]) -> torch.Tensor:
    """What transformers makes of the files, f32[n 3 h w]."""
    pictures = [Image.open(io.BytesIO(f)).convert("RGB") for f in files]
    return torch.tensor(np.stack(processor(images=pictures, return_tensors="np")["pixel_values"]))
