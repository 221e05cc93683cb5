"""Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923) and Qwen3-VL: images and videos of any size, M-RoPE.

Files hold the names of the first two as they were before `language_model`, which is also written.  Published configurations
of them are flat: what is said of the language model stands beside `vision_config`.

Surprise of transformers 5.23: after a video with more steps than rows and columns its prompt counts on from rows and columns,
and its answer from the largest position; here, as in the published code, both go on after the largest.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.config import ConfigError
from mllm_jax.connectors.merge import MergeConfig
from mllm_jax.data.layouts import QWEN3_VIDEO, Spans
from mllm_jax.data.native import Native
from mllm_jax.data.video import Frames
from mllm_jax.encoders.native import NativeViTConfig
from mllm_jax.hf import llama, qwen
from mllm_jax.hf.family import Family, Part, Row, linear, norm, row
from mllm_jax.hf.llava import special
from mllm_jax.hf.options import CLIP_COLOURS, HALF_COLOURS, RESAMPLE, Ids, activation, colours, their_activation
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import Also, TowerConfig
from mllm_jax.nn.param import RMSNorm

VISION = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
DEFAULTS = {
    "qwen2_vl": VISION | {"embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"},
    "qwen2_5_vl": VISION | {"hidden_size": 3584, "intermediate_size": 3420, "hidden_act": "silu", "window_size": 112,
                            "fullatt_block_indexes": (7, 15, 23, 31), "tokens_per_second": 4},
    "qwen3_vl": VISION | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
                          "num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24)},
}  # fmt: skip
TEXT = {
    "qwen2_vl": {"vocab_size": 152_064, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80},
    "qwen3_vl": {"max_position_embeddings": 128_000, "rope_theta": 5e5},
}
TEXT["qwen2_5_vl"] = TEXT["qwen2_vl"]
SECTIONS = {"qwen2_vl": (16, 24, 24), "qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}
TAGS = {"video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}


def videos(view: Native, patch: int, pre: Mapping[str, Any] | None = None) -> Frames:
    """What the video processor does, or without one qwen_vl_utils: two frames a second, of 128 to 768 tokens, 115,200 in all.

    That of Qwen3-VL limits all frames together, here as with its `cap_pixels_per_frame`.
    """
    pre, token = pre or {}, (patch * view.merge) ** 2
    size = {"shortest_edge": 128 * token, "longest_edge": 768 * token} | (pre.get("size") or {})
    most, total = int(size["longest_edge"]), view.steps * int(pre.get("max_video_tokens", 128_000) * token * 0.9)
    if str(pre.get("video_processor_type", "")).startswith("Qwen3"):
        most, total = pre.get("max_video_tokens", 768) * token, most
    return Frames(
        view=replace(view, min_pixels=int(size["shortest_edge"]), max_pixels=most), frames=pre.get("max_frames", 768),
        fps=float(pre.get("fps") or 2.0), least=pre.get("min_frames", 4), pick="nearest", budget=total)


def processor(kind: str, cfg: MLLMConfig) -> dict[str, Any]:
    """processor_config.json: how videos are read."""
    encoder, frames = cfg.inputs["image"].encoder, cfg.inputs["image"].also["video"].view
    new, token = kind == "qwen3_vl", (encoder.patch * frames.view.merge) ** 2
    total = frames.budget or frames.frames * frames.view.max_pixels
    return {
        "video_processor": {
            "video_processor_type": f"Qwen{3 if new else 2}VLVideoProcessor", "do_sample_frames": True, "fps": frames.fps,
            "min_frames": frames.least, "max_frames": frames.frames, "cap_pixels_per_frame": True,
            "size": {"shortest_edge": frames.view.min_pixels, "longest_edge": total if new else frames.view.max_pixels},
            "max_video_tokens": frames.view.max_pixels // token if new else round(total / frames.view.steps / 0.9 / token),
            **{k: v for k, v in their_view(frames.view, encoder).items() if k not in ("image_processor_type", "size", "min_pixels", "max_pixels")},
        },
    }  # fmt: skip


def tower(kind: str, encoder: NativeViTConfig, view: Native, video: Frames, *, rate: float | None = None) -> TowerConfig:
    """How images and videos enter a model of this `model_type`; `rate` is of positions of a second of video."""
    connector = MergeConfig(side=view.merge, norm=encoder.norm, deep=len(encoder.deep))
    layout = {"qwen2_vl": None, "qwen2_5_vl": Spans(rate=rate), "qwen3_vl": QWEN3_VIDEO}[kind]
    return TowerConfig(view=view, encoder=encoder, connector=connector, place="grid", also={"video": Also(view=video, layout=layout)})


def config(kind: str, hf: Mapping[str, Any], pre: Mapping[str, Any]) -> MLLMConfig:
    vision, text = DEFAULTS[kind] | (hf.get("vision_config") or {}), hf.get("text_config") or hf
    text = {k: v for k, v in (TEXT[kind] | dict(text)).items() if v is not None or k not in TEXT[kind]}
    tied = hf.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
    decoder = (qwen.qwen3 if kind == "qwen3_vl" else qwen.qwen2)(text | {"tie_word_embeddings": tied}, {})
    if decoder.rope.sections is None:
        decoder = replace(decoder, rope=replace(decoder.rope, sections=SECTIONS[kind]))
    decoder = replace(decoder, rope=replace(decoder.rope, interleaved=kind == "qwen3_vl"))
    encoder, images, rate = vit(kind, vision, pre), view(vision, pre), vision.get("tokens_per_second")
    video = videos(images, encoder.patch, pre.get("video_processor"))
    return MLLMConfig(inputs={"image": tower(kind, encoder, images, video, rate=rate and float(rate))}, decoder=decoder)


def vit(kind: str, hf: Mapping[str, Any], pre: Mapping[str, Any]) -> NativeViTConfig:
    base = (hf.get("rope_parameters") or {}).get("rope_theta", 1e4)
    if {hf.get("in_channels", 3), hf.get("in_chans", 3)} != {3} or base != 1e4:
        raise ConfigError(f"{kind}: a tower of in_channels={hf.get('in_channels')} and rope_theta={base} is not supported; 3 and 10000 are")
    out = NativeViTConfig(
        width=hf.get("embed_dim", hf.get("hidden_size")), depth=hf["depth"], heads=hf["num_heads"], patch=hf["patch_size"],
        steps=hf["temporal_patch_size"], mlp=hf.get("intermediate_size", 0), activation=activation(hf["hidden_act"]),
        **colours(pre, HALF_COLOURS if kind == "qwen3_vl" else CLIP_COLOURS))
    if kind == "qwen2_vl":
        return replace(out, mlp=int(hf["mlp_ratio"] * out.width))
    if kind == "qwen2_5_vl":
        square = out.patch * hf["spatial_merge_size"]
        return replace(out, gated=True, norm=RMSNorm(eps=1e-6), window=hf["window_size"] // square * hf["spatial_merge_size"],
                       full=tuple(hf["fullatt_block_indexes"]))
    side, deep = math.isqrt(hf["num_position_embeddings"]), tuple(hf["deepstack_visual_indexes"])
    if side**2 != hf["num_position_embeddings"] or list(deep) != sorted(set(deep)):
        raise ConfigError(f"{kind}: num_position_embeddings={hf['num_position_embeddings']} must be a square, and "
                          f"deepstack_visual_indexes={list(deep)} must rise")
    return replace(out, patch_bias=True, positions=side, deep=deep)


def their_vit(tower: TowerConfig, width: int) -> dict[str, Any]:
    cfg, merge = tower.encoder, tower.connector.side
    out = {"depth": cfg.depth, "num_heads": cfg.heads, "in_channels": 3, "patch_size": cfg.patch, "spatial_merge_size": merge,
           "temporal_patch_size": cfg.steps, "hidden_act": their_activation(cfg.activation)}
    if cfg.positions is not None:
        return out | {"hidden_size": cfg.width, "intermediate_size": cfg.mlp, "out_hidden_size": width,
                      "num_position_embeddings": cfg.positions**2, "deepstack_visual_indexes": list(cfg.deep)}
    if cfg.window is not None:
        return out | {"hidden_size": cfg.width, "intermediate_size": cfg.mlp, "out_hidden_size": width, "window_size": cfg.window * cfg.patch,
                      "fullatt_block_indexes": list(cfg.full), "tokens_per_second": int(tower.also["video"].layout.rate)}
    ratio = cfg.mlp // cfg.width
    return out | {"embed_dim": cfg.width, "hidden_size": width, "mlp_ratio": ratio}


def view(vision: Mapping[str, Any], pre: Mapping[str, Any]) -> Native:
    """What the image processor does.

    Raises:
      ConfigError: it cuts other patches than the tower reads, or leaves one of its steps out.
    """
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if pre.get(key, True) is not True:
            raise ConfigError(f"the image processor says {key}={pre[key]}; only True is supported")
    for key, of in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size"), ("temporal_patch_size", "temporal_patch_size")):
        if pre.get(key, vision[of]) != vision[of]:
            raise ConfigError(f"the image processor says {key}={pre[key]} and the tower {of}={vision[of]}; they must be the same")
    if pre.get("resample", 3) not in RESAMPLE:
        raise ConfigError(f"the image processor says resample={pre['resample']}; supported are {RESAMPLE}")
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280} | (pre.get("size") or {})
    limit = lambda key, old: int(size[key] if pre.get(old) is None else pre[old])
    return Native(
        merge=vision["spatial_merge_size"], steps=vision["temporal_patch_size"], resample=RESAMPLE[pre.get("resample", 3)],
        min_pixels=limit("shortest_edge", "min_pixels"), max_pixels=limit("longest_edge", "max_pixels"))


def their_view(view: Native, encoder: NativeViTConfig) -> dict[str, Any]:
    """preprocessor_config.json, with the limits as transformers 4 and 5 write them."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": view.min_pixels, "longest_edge": view.max_pixels},
        "min_pixels": view.min_pixels, "max_pixels": view.max_pixels, "resample": {n: k for k, n in RESAMPLE.items()}[view.resample],
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(encoder.mean),
        "image_std": list(encoder.std), "patch_size": encoder.patch, "temporal_patch_size": encoder.steps, "merge_size": view.merge,
    }  # fmt: skip


def hf_config(kind: str, cfg: MLLMConfig, ids: Ids) -> tuple[dict, dict]:
    tower = cfg.inputs.get("image")
    if len(cfg.inputs) != 1 or tower is None or type(tower.encoder) is not NativeViTConfig or type(tower.view) is not Native:
        raise ConfigError(f"the family {kind!r} has one input, image, of native resolution; the model has {sorted(cfg.inputs)}")
    video = tower.also.get("video")
    if video is None or not isinstance(video.view, Frames) or (kind == "qwen2_5_vl" and getattr(video.layout, "rate", None) is None):
        raise ConfigError(f"the family {kind!r} reads videos too; give the tower also={{'video': ...}}, as tower() of hf/qwen_vl.py does")
    text = (qwen.their_qwen3 if kind == "qwen3_vl" else qwen.their_qwen2)(cfg.decoder, ids)[0]
    tags = {key: ids.tokens[token] for key, token in TAGS.items() if token in ids.tokens} | (
        {} if ids.video is None else {"video_token_id": ids.video})
    out = {
        "model_type": kind, "image_token_id": ids.image, **tags, "tie_word_embeddings": cfg.decoder.head == "tied",
        "vision_config": their_vit(tower, cfg.decoder.width), "text_config": text | {"model_type": f"{kind}_text"}, **special(ids),
    }  # fmt: skip
    return out, their_view(tower.view, tower.encoder)


def blocks(*mlp: tuple[str, str, str]) -> tuple[Row, ...]:
    """The tower, with the names of its feed-forward layers."""
    return (
        *linear("patch_embed.proj", "patch", "d c t p q -> (t p q c) d"),
        row("pos_embed.weight", "position"),
        *(row("blocks.{i}." + r.theirs, "blocks/0/" + r.ours, r.how, r.part) for r in (
            *norm("norm1", "norm1"), *norm("norm2", "norm2"),
            *(row("attn.qkv.weight", f"attn/{x}/kernel", "(h k) d -> d h k", (n, 3)) for n, x in enumerate("qkv")),
            *(row("attn.qkv.bias", f"attn/{x}/bias", "(h k) -> h k", (n, 3)) for n, x in enumerate("qkv")),
            *linear("attn.proj", "attn/o", "d (h k) -> h k d"),
            *(r for theirs, ours, how in mlp for r in linear(f"mlp.{theirs}", f"mlp/{ours}", how)),
        )),
    )  # fmt: skip


def merger(name: str, ours: str, *parts: str) -> tuple[Row, ...]:
    first, up, down = (f"{name}.{x}" for x in parts)
    return *norm(first, f"{ours}/norm"), *linear(up, f"{ours}/up", "f d -> d f"), *linear(down, f"{ours}/down", "f d -> d f")


UP, DOWN = "f d -> d f", "d f -> f d"
OLD = merger("merger", "merger", "ln_q", "mlp.0", "mlp.2")
NEW = ("norm", "linear_fc1", "linear_fc2")
TABLES = {                              # of the tower, and of the connector
    "qwen2_vl": (blocks(("fc1", "up", UP), ("fc2", "down", DOWN)), OLD),
    "qwen2_5_vl": (blocks(("gate_proj", "gate", UP), ("up_proj", "up", UP), ("down_proj", "down", DOWN)), OLD),
    "qwen3_vl": (blocks(("linear_fc1", "up", UP), ("linear_fc2", "down", DOWN)),
                 merger("merger", "merger", *NEW) + merger("deepstack_merger_list.{i}", "deep", *NEW)),
}  # fmt: skip


def family(kind: str, name: str, like: Any) -> Family:
    new = kind == "qwen3_vl"
    text = llama.inside("model.language_model.") if new else llama.ROWS
    visual = "model.visual." if new else "visual."
    ours, connector = TABLES[kind]
    return Family(
        model_type=kind, architecture=f"{name}ForConditionalGeneration",
        config=lambda hf, pre: config(kind, hf, pre), hf_config=lambda cfg, ids: hf_config(kind, cfg, ids),
        like=lambda c: isinstance(c, MLLMConfig) and any(type(t.encoder) is NativeViTConfig and like(t.encoder) for t in c.inputs.values()),
        processor=lambda cfg: processor(kind, cfg), processor_class=f"{name}Processor",
        parts=(
            Part(theirs=visual, ours="inputs/image/encoder/", rows=ours, of=lambda c: c.inputs["image"].encoder),
            Part(theirs=visual, ours="inputs/image/connector/", rows=connector, of=lambda c: c.inputs["image"].connector),
            Part(theirs="", ours="decoder/", rows=text, of=lambda c: c.decoder),
        ),
        layouts=((r"^(?!model\.|lm_head\.)", "model."),) if new else (
            (r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
        memory=() if new else ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")),
        ignore=llama.BUFFERS, free=(r"inputs\.image\.also\.video\.view(\..*)?",))


QWEN3_VL = family("qwen3_vl", "Qwen3VL", lambda c: c.positions is not None)
QWEN2_5_VL = family("qwen2_5_vl", "Qwen2_5_VL", lambda c: c.window is not None)
QWEN2_VL = family("qwen2_vl", "Qwen2VL", lambda c: True)
