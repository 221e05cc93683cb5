"""Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299): SigLIP on tiles, pixel shuffle, one matrix, Llama or SmolLM2.

One table for two classes, `Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`; the first SmolVLM is an
Idefics3 to the Hub, the second one a SmolVLM, which reads videos.  Their towers differ from SigLIP in that the last norm is applied
and that patches find their positions by fractions of the side (`in_order`).

Surprises of videos: frames stand in the row as images of one tile, behind the time of each.  They are brought to the size at which
images are cut before they are squashed into a tile, because the size of the image processor overrules `video_size`.  Transformers
resizes them by torchvision, images by Pillow: values of a frame may differ by one level of 255.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.shuffle import ShuffleConfig
from mllm_jax.data.layouts import IDEFICS3 as LAYOUT
from mllm_jax.data.layouts import IDEFICS3_WHOLE, SMOLVLM_VIDEO
from mllm_jax.data.tiles import OneTile, SplitTiles
from mllm_jax.data.video import Frames
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.hf import clip, language, llama, llava, siglip
from mllm_jax.hf.family import Family, Part, row
from mllm_jax.hf.options import Ids, resampling, their_colours, their_resampling
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import Also, TowerConfig

VISION = {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16, "image_size": 224,
          "patch_size": 32, "vision_use_head": False}
LARGEST = 4096                          # pixels of a longer side that the image processor would not exceed
FRAMES, FPS = 64, 1.0                   # where a folder does not say; those of SmolVLM2


def config(kind: str, hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    vision = VISION | (hf.get("vision_config") or {})
    encoder = siglip.vit(vision, pre)
    if not in_order(encoder.grid):
        raise ConfigError(f"{kind}: of {encoder.grid} patches a side transformers may give some the positions of their neighbours; "
                          "such towers are not supported")
    connector = ShuffleConfig(grid=encoder.grid, side=hf.get("scale_factor", 2), mlp=MLPConfig(depth=1, bias=False))
    look = view(kind, pre, vision["image_size"])
    also = {"video": Also(view=frames(pre, look), layout=SMOLVLM_VIDEO)} if kind == "smolvlm" else {}
    image = TowerConfig(
        view=look, encoder=encoder, connector=connector, layout=LAYOUT if isinstance(look, SplitTiles) else IDEFICS3_WHOLE, also=also)
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


def view(kind: str, pre: Mapping[str, Any], size: int) -> SplitTiles | OneTile:
    """The view of an image processor for tiles of this size."""
    tile = (pre.get("max_image_size") or {}).get("longest_edge", size)
    longest = (pre.get("size") or {}).get("longest_edge", 4 * size)
    if tile != size or longest is None or longest > LARGEST:
        raise ConfigError(f"{kind}: the image processor cuts tiles of {tile} pixels, of a longer side of {longest}; those of the tower have "
                          f"{size}, and the longer side at most {LARGEST}")
    return (SplitTiles if pre.get("do_image_splitting", True) else OneTile)(size=size, longest=longest, resample=resampling(pre, usual=1))


def frames(pre: Mapping[str, Any], image: SplitTiles | OneTile) -> Frames:
    """The view of a video processor, which may be written inside the image processor."""
    film = pre.get("video_processor") or pre
    given = film.get("video_sampling") or {}
    size = film.get("size") or given.get("video_size") or {}
    either = lambda *values: next(v for v in values if v is not None)
    return Frames(
        view=OneTile(size=image.size, longest=min(size.get("longest_edge", image.longest), LARGEST), resample=resampling(film, usual=1)),
        frames=either(given.get("max_frames"), film.get("num_frames"), FRAMES), fps=float(either(given.get("fps"), film.get("fps"), FPS)),
        pick="inside")


def hf_config(kind: str, cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower, name = llava.the_tower(cfg, kind, ShuffleConfig), {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    if not isinstance(tower.view, (SplitTiles, OneTile)):
        raise ConfigError(f"the family {kind!r} cannot express the view {tower.view!r}; SplitTiles and OneTile it can")
    out = {
        "model_type": kind, "image_token_id": ids.image, "scale_factor": tower.connector.side,
        "vision_config": siglip.their_vit(tower.encoder, tower.view.size) | {"model_type": f"{kind}_vision"},
        "text_config": language.their_decoder(cfg.decoder, ids), "tie_word_embeddings": cfg.decoder.head == "tied",
        **llava.special(ids),
    }  # fmt: skip
    pre = {
        "image_processor_type": f"{name}ImageProcessor", "do_image_splitting": isinstance(tower.view, SplitTiles),
        **their_resizing(tower.view, tower.encoder),
    }  # fmt: skip
    return out, pre


def their_resizing(view: SplitTiles | OneTile, encoder: ViTConfig) -> dict[str, Any]:
    """What the processors of images and of videos say alike."""
    return {
        "do_convert_rgb": True, "do_resize": True, "size": {"longest_edge": view.longest}, "resample": their_resampling(view.resample),
        "max_image_size": {"longest_edge": view.size}, "do_pad": True, **their_colours(encoder),
    }  # fmt: skip


def like(kind: str, cfg: Any) -> bool:
    if not isinstance(cfg, MLLMConfig):
        return False
    return any(t.layout in (LAYOUT, IDEFICS3_WHOLE) and ("video" in t.also) == (kind == "smolvlm") for t in cfg.inputs.values())


def processor(cfg: MLLMConfig) -> dict[str, Any]:
    tower = cfg.inputs["image"]
    out = {"image_seq_len": (tower.connector.grid // tower.connector.side) ** 2}
    if "video" not in tower.also:
        return out
    film = tower.also["video"].view
    return out | {"video_processor": {
        "video_processor_type": "SmolVLMVideoProcessor", "do_sample_frames": True, "num_frames": film.frames, "fps": film.fps,
        **their_resizing(film.view, tower.encoder),
    }}  # fmt: skip


def family(kind: str, name: str) -> Family:
    return Family(
        model_type=kind, architecture=f"{name}ForConditionalGeneration", config=partial(config, kind), hf_config=partial(hf_config, kind),
        like=partial(like, kind), processor=processor, processor_class=f"{name}Processor",
        parts=(
            Part(theirs="model.vision_model.", ours="inputs/image/encoder/", rows=clip.IMAGE, of=lambda c: c.inputs["image"].encoder),
            Part(theirs="model.connector.", ours="inputs/image/connector/", of=lambda c: c.inputs["image"].connector,
                 rows=(row("modality_projection.proj.weight", "mlp/layers/0/kernel", "f d -> d f"),)),
            Part(theirs="", ours="decoder/", rows=llama.inside("model.text_model."), of=lambda c: c.decoder),
        ),
        ignore=(*clip.BUFFERS, *llama.BUFFERS), free=(r"inputs\.image\.also\.video\.view\.(frames|fps|view\.longest)",))


IDEFICS3, SMOLVLM = family("idefics3", "Idefics3"), family("smolvlm", "SmolVLM")
