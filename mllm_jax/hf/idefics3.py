"""Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299): SigLIP on tiles, pixel shuffle, one matrix, Llama or SmolLM2.

One table for two classes, `Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`; the first SmolVLM is an
Idefics3 to the Hub, the second one a SmolVLM, and it is written as an Idefics3 unless family="smolvlm" is asked for.  Their towers
differ from SigLIP in that the last norm is applied and that patches find their positions by fractions of the side (`in_order`).
Videos of SmolVLM are not read.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.shuffle import ShuffleConfig
from mllm_jax.data.layouts import IDEFICS3 as LAYOUT
from mllm_jax.data.tiles import SplitTiles
from mllm_jax.hf import clip, language, llama, llava, siglip
from mllm_jax.hf.family import Family, Part, row
from mllm_jax.hf.options import Ids, resampling, their_colours, their_resampling
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig

VISION = {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16, "image_size": 224,
          "patch_size": 32, "vision_use_head": False}
LARGEST = 4096                          # pixels of a longer side that the image processor would not exceed


def config(kind: str, hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    vision = VISION | (hf.get("vision_config") or {})
    encoder = siglip.vit(vision, pre)
    if not in_order(encoder.grid):
        raise ConfigError(f"{kind}: of {encoder.grid} patches a side transformers may give some the positions of their neighbours; "
                          "such towers are not supported")
    connector = ShuffleConfig(grid=encoder.grid, side=hf.get("scale_factor", 2), mlp=MLPConfig(depth=1, bias=False))
    image = TowerConfig(view=view(kind, pre, vision["image_size"]), encoder=encoder, connector=connector, layout=LAYOUT)
    return MLLMConfig(inputs={"image": image}, decoder=language.of_model(hf, kind))


def in_order(n: int) -> bool:
    """Whether `Idefics3VisionEmbeddings` gives each of n patches of a tile its own of the n positions of the tower, on any processor.

    Patch i is at i / n, and its position is how many of 1/n, 2/n, ... are not above that.  In float32 i * (1/n) may fall below i/n,
    and then the patch gets the position before.  torch makes the bounds a register at a time, so that for some n the width of
    registers decides.  All is in order for the sides published (26, 27, 32), and not for 19, 25, 29, 31, 36, 37, 38, ...
    """
    step, i = 1 / n, np.arange(n - 1)
    places = np.arange(1, n, dtype=np.float32) * (np.float32(1) / np.float32(n))
    for lanes in (1, 4, 8, 16):
        first = (step + step * (i // lanes * lanes)).astype(np.float32).astype(np.float64)      # of a register
        whole = i < len(i) // (2 * lanes) * 2 * lanes
        bounds = np.where(whole & (lanes > 1), first + i % lanes * step, step + step * i).astype(np.float32)
        if (places < bounds).any():
            return False
    return True


def view(kind: str, pre: Mapping[str, Any], size: int) -> SplitTiles:
    """The view of an image processor for tiles of this size."""
    tile = (pre.get("max_image_size") or {}).get("longest_edge", size)
    longest = (pre.get("size") or {}).get("longest_edge", 4 * size)
    if pre.get("do_image_splitting", True) is not True:
        raise ConfigError(f"{kind}: the image processor says do_image_splitting=false; set it to true, and give the recipe a view of one tile")
    if tile != size or longest is None or longest > LARGEST:
        raise ConfigError(f"{kind}: the image processor cuts tiles of {tile} pixels, of a longer side of {longest}; those of the tower have "
                          f"{size}, and the longer side at most {LARGEST}")
    return SplitTiles(size=size, longest=longest, resample=resampling(pre, usual=1))


def hf_config(kind: str, cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower, name = llava.the_tower(cfg, kind, ShuffleConfig), {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    size, longest = tower.view.size, tower.view.longest
    out = {
        "model_type": kind, "image_token_id": ids.image, "scale_factor": tower.connector.side,
        "vision_config": siglip.their_vit(tower.encoder, size) | {"model_type": f"{kind}_vision"},
        "text_config": language.their_decoder(cfg.decoder, ids), "tie_word_embeddings": cfg.decoder.head == "tied",
        **llava.special(ids),
    }  # fmt: skip
    pre = {
        "image_processor_type": f"{name}ImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": {"longest_edge": longest},
        "resample": their_resampling(tower.view.resample), "do_image_splitting": True, "max_image_size": {"longest_edge": size},
        "do_pad": True, **their_colours(tower.encoder),
    }  # fmt: skip
    return out, pre


def like(cfg: Any) -> bool:
    return isinstance(cfg, MLLMConfig) and any(t.layout == LAYOUT and isinstance(t.view, SplitTiles) for t in cfg.inputs.values())


def processor(cfg: MLLMConfig) -> dict[str, Any]:
    connector = cfg.inputs["image"].connector
    return {"image_seq_len": (connector.grid // connector.side) ** 2}


def family(kind: str, name: str) -> Family:
    return Family(
        model_type=kind, architecture=f"{name}ForConditionalGeneration", config=partial(config, kind), hf_config=partial(hf_config, kind),
        like=like, processor=processor, processor_class=f"{name}Processor",
        parts=(
            Part(theirs="model.vision_model.", ours="inputs/image/encoder/", rows=clip.IMAGE, of=lambda c: c.inputs["image"].encoder),
            Part(theirs="model.connector.", ours="inputs/image/connector/", of=lambda c: c.inputs["image"].connector,
                 rows=(row("modality_projection.proj.weight", "mlp/layers/0/kernel", "f d -> d f"),)),
            Part(theirs="", ours="decoder/", rows=llama.inside("model.text_model."), of=lambda c: c.decoder),
        ),
        ignore=(*clip.BUFFERS, *llama.BUFFERS))


IDEFICS3, SMOLVLM = family("idefics3", "Idefics3"), family("smolvlm", "SmolVLM")
