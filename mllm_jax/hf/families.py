"""The families of the Hub, by `model_type`; and what a folder holds."""

import json
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError, override
from mllm_jax.hf import (
    bert,
    blip2,
    clip,
    cogvlm,
    gemma,
    gemma3,
    idefics,
    idefics3,
    instructblip,
    internvl,
    llama,
    llava,
    llava_next,
    llava_onevision,
    opt,
    paligemma,
    phi,
    qwen,
    qwen_vl,
    siglip,
    stablelm,
)
from mllm_jax.hf.family import CannotExpress, Family

FAMILIES: dict[str, Family] = {
    f.key: f
    for f in (
        clip.CLIP, clip.CLIP_VISION, siglip.SIGLIP, siglip.SIGLIP_VISION,
        llama.LLAMA, llama.MISTRAL, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA, gemma.GEMMA3_TEXT, opt.OPT,
        phi.PHI, stablelm.STABLELM,
        paligemma.PALIGEMMA,
        gemma3.GEMMA3,
        idefics.IDEFICS,
        qwen_vl.QWEN3_VL, qwen_vl.QWEN2_5_VL, qwen_vl.QWEN2_VL,
        cogvlm.COGVLM,
        idefics3.IDEFICS3, idefics3.SMOLVLM,
        internvl.INTERNVL,
        llava_next.LLAVA_NEXT,
        llava_onevision.LLAVA_ONEVISION,
        bert.BERT,
        blip2.BLIP2,
        blip2.RETRIEVAL,
        instructblip.INSTRUCTBLIP,
        llava.LLAVA,                    # what no other one takes
    )
}  # fmt: skip


def family(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type={model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_of(cfg: Any) -> Family:
    """The family that a model of ours is written as, unless another is asked for: the first that says it is alike."""
    for found in FAMILIES.values():
        if found.like(cfg):
            return found
    raise CannotExpress(f"no family of the Hub is like this {type(cfg).__name__}")


def describe(folder: Path) -> tuple[Family, Any]:
    """The family of a folder and its configuration as ours.

    Raises:
      ConfigError: no config.json, or it asks for something that is not supported.
    """
    hf = _json(folder / "config.json")
    if not hf:
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    # One type may have several architectures; and code that came with a folder may have given its models no type.
    named = [f for f in FAMILIES.values() if f.architecture in (hf.get("architectures") or ())]
    if "model_type" not in hf and not named:
        raise ConfigError(f"{folder}/config.json has no model_type; supported are {', '.join(FAMILIES)}")
    found = next((f for f in named if f.model_type == hf.get("model_type", f.model_type)), None) or family(hf["model_type"])
    whole = _json(folder / "processor_config.json")
    pre = _json(folder / "preprocessor_config.json") or whole.get("image_processor") or {}
    if video := _json(folder / "video_preprocessor_config.json") or whole.get("video_processor"):
        pre = pre | {"video_processor": video}
    try:
        cfg = found.config(hf, pre)
        for beside, path in found.tokenizers.items():
            cfg = override(cfg, f"{path}={folder / beside}") if (folder / beside).is_dir() else cfg
        return found, cfg
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
