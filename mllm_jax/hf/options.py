"""Options that several families of the Hub write in the same way: activations, rotary positions, image processors."""

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from mllm_jax.config import ConfigError, config
from mllm_jax.data.views import Pad, Square
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.encoders.vit import CLIP_MEAN, CLIP_STD, HALF, ViTConfig
from mllm_jax.nn.position import LinearScaling, Llama3Scaling, Rope

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
}  # fmt: skip
RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}                        # numbers of PIL
LONGEST_CYCLE = 8


def activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def their_activation(name: str) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def rope(hf: Mapping[str, Any]) -> Rope:
    """`rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    p = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(p.get("rope_theta", hf.get("rope_theta", 1e4)))
    kind = p.get("rope_type", p.get("type", "default"))
    if p.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={p['partial_rotary_factor']} is not supported; whole heads turn here")
    if kind in ("default", "mrope"):    # "mrope" is what the first files of Qwen2-VL say
        sections = p.get("mrope_section") and tuple(p["mrope_section"])
        return Rope(theta=theta, sections=sections, interleaved=bool(sections and p.get("mrope_interleaved")))
    if kind == "linear":
        return Rope(theta=theta, scaling=LinearScaling(factor=float(p["factor"])))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(p["factor"]), low=float(p["low_freq_factor"]), high=float(p["high_freq_factor"]),
            original=int(p["original_max_position_embeddings"]))
        return Rope(theta=theta, scaling=scaling)
    raise ConfigError(f"rope_type={kind!r} is not supported; supported are default, linear, llama3")


def partial(hf: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The configuration without `partial_rotary_factor`, the part of a head that turns, which has two places; and that part."""
    parameters = dict(hf.get("rope_parameters") or {})
    part = parameters.pop("partial_rotary_factor", hf["partial_rotary_factor"])
    return {**hf, "rope_parameters": parameters}, part


def their_partial(out: Mapping[str, Any], part: float) -> dict[str, Any]:
    return {**out, "partial_rotary_factor": part, "rope_parameters": {**out["rope_parameters"], "partial_rotary_factor": part}}


def their_rope(r: Rope | None) -> dict[str, Any]:
    """Both spellings: transformers 4 would read its default, and be wrong in silence, without the older one."""
    if r is None:
        return {}
    scaling = None
    if isinstance(r.scaling, LinearScaling):
        scaling = {"rope_type": "linear", "factor": r.scaling.factor}
    if isinstance(r.scaling, Llama3Scaling):
        s = r.scaling
        scaling = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low, "high_freq_factor": s.high,
                   "original_max_position_embeddings": s.original}
    if r.sections is not None:
        scaling = {"rope_type": "default", "mrope_section": list(r.sections), **({"mrope_interleaved": True} if r.interleaved else {})}
    new = {"rope_type": "default", "rope_theta": r.theta, **(scaling or {})}
    return {"rope_parameters": new, "rope_theta": r.theta, **({"rope_scaling": scaling} if scaling else {})}


def cycle(layers: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest cycle that gives these layers, one after another.

    Raises:
      ConfigError: they do not take turns: every place of a cycle is compiled by itself.
    """
    n = next(n for n in range(1, len(layers) + 1) if all(layer == layers[i % n] for i, layer in enumerate(layers)))
    if n > LONGEST_CYCLE:
        raise ConfigError(f"the {len(layers)} layers repeat after {n}; kinds of layers that take turns within {LONGEST_CYCLE} are supported")
    return tuple(layers[:n])


def window(cfg: DecoderConfig) -> int | None:
    """The window of the layers that have one."""
    return next((layer.window for layer in cfg.cycle if layer.window), None)


def their_layers(cfg: DecoderConfig) -> list[str]:
    """`layer_types`: which layers have the window."""
    return ["sliding_attention" if cfg.cycle[i % len(cfg.cycle)].window else "full_attention" for i in range(cfg.depth)]


def view(pre: Mapping[str, Any], size: int, *, crop: bool) -> Square | Pad:
    """What an image processor does, as a view; `size` and `crop` are what the family does where it does not say.

    Raises:
      ConfigError: it does something that no view does.
    """
    resample = resampling(pre)
    named = pre.get("image_processor_type", "")
    crop = pre.get("do_center_crop", not named.startswith("Siglip") if named else crop)
    sizes = [pre[k] for k in ("crop_size", "size") if pre.get(k) is not None and (k == "size" or crop)]
    numbers = {n for s in sizes for n in ([s] if isinstance(s, int) else s.values())} or {size}
    if len(numbers) > 1:
        raise ConfigError(f"the image processor resizes and crops to different sizes {sorted(numbers)}; one is supported")
    (size,) = numbers
    if pre.get("do_pad"):
        mean = pre.get("image_mean") or CLIP_MEAN
        return Pad(size=size, fill=tuple(int(m * 255) for m in mean), resample=resample)
    if not crop and pre and isinstance(pre.get("size"), Mapping) and "shortest_edge" in pre["size"]:
        raise ConfigError("the image processor keeps the aspect ratio without cropping; images would differ in size")
    return Square(size=size, crop=crop, resample=resample)


def resampling(pre: Mapping[str, Any], usual: int = 3) -> str:
    """The filter of an image processor that resizes, rescales and normalizes; otherwise a ConfigError."""
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if pre.get(key, True) is not True:
            raise ConfigError(f"the image processor says {key}={pre[key]}; only True is supported")
    if pre.get("resample", usual) not in RESAMPLE:
        raise ConfigError(f"the image processor says resample={pre['resample']}; supported are {RESAMPLE}")
    return RESAMPLE[pre.get("resample", usual)]


def their_resampling(name: str) -> int:
    return next(number for number, ours in RESAMPLE.items() if ours == name)


def colours(pre: Mapping[str, Any], default: tuple) -> dict[str, tuple[float, ...]]:
    mean, std = default
    return {"mean": tuple(pre.get("image_mean") or mean), "std": tuple(pre.get("image_std") or std)}


CLIP_COLOURS, HALF_COLOURS = (CLIP_MEAN, CLIP_STD), (HALF, HALF)


def their_view(v: Any, encoder: ViTConfig) -> dict[str, Any]:
    """preprocessor_config.json of a view and the colours of its encoder."""
    if not isinstance(v, (Square, Pad)):
        raise ConfigError(f"view={v!r} has no image processor here; Square and Pad have")
    crop = isinstance(v, Pad) or v.crop
    name = "LlavaImageProcessor" if isinstance(v, Pad) else "CLIPImageProcessor" if crop else "SiglipImageProcessor"
    square = {"height": v.size, "width": v.size}
    return {
        "image_processor_type": name,
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": v.size} if crop else square,
        "resample": their_resampling(v.resample),
        **({"do_center_crop": True, "crop_size": square} if crop else {}),
        **({"do_pad": True} if isinstance(v, Pad) else {}), **their_colours(encoder),
    }  # fmt: skip


def their_colours(encoder: ViTConfig) -> dict[str, Any]:
    """What every image processor does with pixels that have their size."""
    return {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(encoder.mean), "image_std": list(encoder.std)}


@config
class Ids:
    """What the tokenizer says, for the files of an export; None where unknown."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    image: int | None = None
    video: int | None = None
    length: int | None = None           # positions of the longest row, where the model does not say
    tokens: Mapping[str, int] = field(default_factory=dict)     # those that were added, by name
