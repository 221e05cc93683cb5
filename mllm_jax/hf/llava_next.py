"""LLaVA-NeXT (LLaVA-VL/LLaVA-NeXT) as `LlavaNextForConditionalGeneration`: LLaVA, with an image cut into tiles.

The table is that of LLaVA and one learned vector, the newline that ends each row of the image.  The pinpoints stand twice in a
folder, in pixels: the model reads those of config.json, the image processor its own, and they must agree.
"""

from collections.abc import Mapping
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.layouts import AnyRes
from mllm_jax.data.tiles import NEXT, Tiles
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.hf import clip, language, llama, llava
from mllm_jax.hf.family import Family, Part, row
from mllm_jax.hf.options import Ids, resampling, their_colours, their_resampling
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig


def config(hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    encoder, connector, size = llava.parts(hf, pre, "llava_next")
    if encoder.keep_class:
        raise ConfigError("llava_next: vision_feature_select_strategy='full' keeps the class token, which has no place in the image; "
                          "only 'default' is supported with a tower that has one")
    view = tiles(hf, pre, size, "llava_next", NEXT)
    image = TowerConfig(view=view, encoder=encoder, connector=connector, layout=AnyRes())
    return MLLMConfig(inputs={"image": image}, decoder=language.of_model(hf, "llava_next"))


def tiles(
    hf: Mapping[str, Any], pre: Mapping[str, Any], size: int, where: str, usual: tuple[tuple[int, int], ...],
) -> Tiles:
    """The view of an image processor that cuts tiles of the tower's size by `image_grid_pinpoints`, (height, width) in pixels.

    Raises:
      ConfigError: tiles of another size, or pinpoints that the model does not share or that are not made of whole tiles.
    """
    given = [n for key in ("size", "crop_size") if isinstance(pre.get(key), Mapping) for n in pre[key].values() if n is not None]
    if wrong := {n for n in given if n != size}:
        raise ConfigError(f"{where}: the image processor cuts tiles of {sorted(wrong)} pixels; those of the tower have {size}")
    both = [c["image_grid_pinpoints"] for c in (hf, pre) if c.get("image_grid_pinpoints")]
    if both and both[0] != both[-1]:
        raise ConfigError(f"{where}: image_grid_pinpoints is {both[0]} in config.json and {both[-1]} in the image processor; make them the same")
    if odd := [p for p in (both[0] if both else ()) if p[0] % size or p[1] % size]:
        raise ConfigError(f"{where}: the pinpoint {odd[0]} is not made of tiles of {size}x{size} pixels")
    pinpoints = tuple((height // size, width // size) for height, width in both[0]) if both else usual
    return Tiles(size=size, pinpoints=pinpoints, resample=resampling(pre))


def their_pinpoints(view: Tiles) -> list[list[int]]:
    return [[rows * view.size, columns * view.size] for rows, columns in view.pinpoints]


def hf_config(cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower = llava.the_tower(cfg, "llava_next", MLPConfig)
    out = llava.their_parts(cfg, ids, "llava_next")
    out |= {"image_grid_pinpoints": their_pinpoints(tower.view), "image_seq_length": tower.encoder.grid**2}
    return out, their_tiles(tower.view, tower.encoder)


def their_tiles(view: Tiles, encoder: ViTConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "LlavaNextImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": view.size}, "resample": their_resampling(view.resample),
        "do_center_crop": True, "crop_size": {"height": view.size, "width": view.size}, "do_pad": True,
        "image_grid_pinpoints": their_pinpoints(view), **their_colours(encoder),
    }  # fmt: skip


NEWLINE_PART = Part(theirs="", ours="", rows=(row("image_newline", "inputs/image/marks/newline"),), of=lambda c: c)
LLAVA_NEXT = Family(
    model_type="llava_next", architecture="LlavaNextForConditionalGeneration", config=config, hf_config=hf_config,
    like=lambda c: isinstance(c, MLLMConfig) and any(
        t.layout == AnyRes() and isinstance(t.view, Tiles) and not t.also for t in c.inputs.values()),
    processor=llava.processor, processor_class="LlavaNextProcessor",
    parts=(llava.TOWER_PART, llava.CONNECTOR_PART, NEWLINE_PART, llava.DECODER_PART),
    layouts=llava.LAYOUTS, memory=llava.MEMORY, ignore=(*clip.BUFFERS, *llama.BUFFERS), free=(r"inputs\.image\.encoder\.pool",),
)
