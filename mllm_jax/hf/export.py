"""Export: our parameters as a Hugging Face folder that `transformers` opens, one tensor in memory at a time.

    config.json  generation_config.json  model*.safetensors (+ index)
    tokenizer files, chat_template.jinja  preprocessor_config.json  processor_config.json

The folder appears at the end, whole.  No torch is needed to write it.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mllm_jax.config import ConfigError
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.hf import families
from mllm_jax.hf.family import Family, Link, parameter_shapes
from mllm_jax.hf.options import Ids
from mllm_jax.hf.tensors import INDEX, Writer, replacing, shards
from mllm_jax.models.dual_encoder import DualEncoderConfig
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.nn.lora import LoRA, merge_adapters
from mllm_jax.nn.position import interpolate

SHARD_BYTES = 5 << 30


def export(
    params: Mapping[str, jax.Array],
    cfg: Any,
    folder: str | Path,
    *,
    family: str | None = None,
    tokenizer: Any = None,
    chat_template: str | None = None,
    generation: Mapping[str, Any] | None = None,
    image_token: int | None = None,
    seq_len: int | None = None,
    dtype: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the model and returns the folder.

    Adapters are merged, and interpolated tables of positions written as they are used.  On several hosts all
    call this, and the first writes.

    Args:
      family: its `model_type`, where it is not clear (mistral rather than llama).
      tokenizer: a fast one of transformers; its files and special tokens go into the folder.
      chat_template: Jinja; None takes that of the tokenizer.
      generation: more fields of generation_config.json.
      image_token: id of the placeholder of images; None asks the tokenizer.
      seq_len: the longest row, for `max_position_embeddings` of rotary models.
      dtype: of all tensors; None keeps that of each parameter.

    Raises:
      ConfigError: the family has no such option (the message names it), parameters and configuration differ,
        the tokenizer has more tokens than the model, or `folder` holds something else.
    """
    folder = Path(folder)
    params, cfg = _plain(dict(params), cfg)
    chosen = families.family(family) if family else families.family_of(cfg)
    ids = _ids(tokenizer, image_token, seq_len, cfg)
    config, preprocessor = chosen.express(cfg, ids)
    links = chosen.links(cfg)
    _check(params, cfg)
    name = str(np.dtype(dtype or next(iter(params.values())).dtype))
    files = {"config.json": {"architectures": [chosen.architecture], **config, "dtype": name}}
    if hasattr(cfg, "decoder") or chosen.architecture.endswith("ForCausalLM"):
        special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
        files["generation_config.json"] = {**special, **(generation or {})}
    if preprocessor:
        files["preprocessor_config.json"] = preprocessor | {"processor_class": chosen.processor_class}
    if chosen.processor:
        files["processor_config.json"] = {"processor_class": chosen.processor_class, **chosen.processor(cfg)}
    first = jax.process_index() == 0
    with replacing(folder) if first else contextlib.nullcontext() as new:
        if first:
            for file, content in files.items():
                (new / file).write_text(json.dumps(content, indent=2) + "\n")
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
                _save_tokenizers(chosen, cfg, new)
            if template := chat_template or getattr(tokenizer, "chat_template", None):
                (new / "chat_template.jinja").write_text(template)
        write_hf(new, chosen, links, stream(params, links, dtype), {k: dtype or p.dtype for k, p in params.items()}, max_shard_bytes)
    if jax.process_count() > 1:         # nobody goes on to read what is not there yet
        multihost_utils.sync_global_devices(f"export {folder}")
    return folder


def write_hf(
    folder: Path | None,
    family: Family,
    links: list[Link],
    tensors: Iterator[tuple[Link, np.ndarray]],
    dtypes: Mapping[str, Any],
    max_shard_bytes: float = SHARD_BYTES,
    stem: str = "model",
) -> None:
    """Writes (link, array in our layout) pairs, in any order, as safetensors in shards with an index.

    Without a folder (a host that does not write) the tensors are only asked for.
    """
    spec = {x.theirs: (np.dtype(dtypes[x.ours]), x.their_shape) for x in links}
    files = shards({n: int(np.prod(shape)) * dtype.itemsize for n, (dtype, shape) in spec.items()}, max_shard_bytes, stem)
    with contextlib.ExitStack() as stack:
        writer = {}
        for file, names in files.items() if folder else ():
            opened = stack.enter_context(Writer(folder / file, {n: spec[n] for n in names}, {"format": "pt"}))
            writer |= dict.fromkeys(names, opened)
        for link, x in tensors:
            if folder:
                x = link.to_theirs(x)
                writer[link.theirs].write(link.theirs, x, skip=link.part[0] * x.nbytes if link.part else 0)
            del x                       # before the next one is made
    if folder and len(files) > 1:
        total = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in spec.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: file for file, names in files.items() for n in names}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _save_tokenizers(family: Family, cfg: Any, folder: Path) -> None:
    """Those of the text that towers read, each in its folder beside the weights."""
    from mllm_jax.data.tokenizer import load_tokenizer

    named = lambda node, name: node[name] if isinstance(node, Mapping) else getattr(node, name)
    for beside, path in family.tokenizers.items():
        load_tokenizer(functools.reduce(named, path.split("."), cfg), media=()).save_pretrained(folder / beside)


def stream(params: Mapping[str, jax.Array], links: list[Link], dtype: Any) -> Iterator[tuple[Link, np.ndarray]]:
    """Each link with its layer of our parameter, fetched from where it is when it is asked for."""
    for link in links:
        x = params[link.ours]
        if link.layer is not None:
            # The index is an operand: one program for all layers, on the devices that hold the parameter.
            x = jax.lax.dynamic_index_in_dim(x, link.layer, keepdims=False) if isinstance(x, jax.Array) else x[link.layer]
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        x = np.asarray(x)
        yield link, x if dtype is None else x.astype(dtype, copy=False)


def _plain(params: dict[str, jax.Array], cfg: Any) -> tuple[dict[str, jax.Array], Any]:
    """The same model without adapters and without interpolation on the way."""
    if isinstance(cfg, LoRA):
        params, cfg = merge_adapters(params, cfg.rank, cfg.alpha), cfg.model
    towers = {"inputs/image/encoder/": cfg.inputs["image"]} if isinstance(cfg, MLLMConfig) and "image" in cfg.inputs else (
        {"inputs/image/": cfg.inputs["image"]} if isinstance(cfg, DualEncoderConfig) and "image" in cfg.inputs else {})
    for prefix, tower in towers.items():
        encoder = tower.encoder
        if isinstance(encoder, ViTConfig) and encoder.table not in (None, encoder.grid):
            table, n = params[prefix + "position"], int(encoder.class_token)
            grown = np.concatenate([np.asarray(table[:n]), np.asarray(interpolate(table[n:], encoder.grid))])
            params = params | {prefix + "position": grown.astype(table.dtype)}
            cfg = replace(cfg, inputs={**cfg.inputs, "image": replace(tower, encoder=replace(encoder, table=None))})
    return params, cfg


def _ids(tokenizer: Any, image_token: int | None, seq_len: int | None, cfg: Any) -> Ids:
    if tokenizer is None:
        if isinstance(cfg, MLLMConfig) and image_token is None:
            raise ConfigError("a multimodal model is written with its tokenizer, or with image_token=the id of <image>")
        return Ids(image=image_token, length=seq_len)
    text = getattr(cfg, "decoder", None) or getattr(cfg, "text", cfg)
    if len(tokenizer) > text.vocab:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens and the model {text.vocab}; give the one it was trained with")
    video = None
    if isinstance(cfg, MLLMConfig):
        # Imports transformers, which whoever has a tokenizer has loaded.
        from mllm_jax.data.tokenizer import placeholder

        image_token = placeholder(tokenizer, "image")[1] if image_token is None else image_token
        films = [tower.kinds["video"].layout for tower in cfg.inputs.values() if "video" in tower.also]
        video = placeholder(tokenizer, films[0] and films[0].token or "video")[1] if films else None
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    return Ids(bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id, image=image_token, video=video,
               length=seq_len, tokens=added)


def _check(params: Mapping[str, Any], cfg: Any) -> None:
    shapes = parameter_shapes(cfg)
    if odd := sorted(shapes.keys() ^ params.keys()):
        raise ConfigError(f"parameters and configuration differ in {len(odd)} paths: {', '.join(odd[:5])}")
    for path, shape in shapes.items():
        if tuple(params[path].shape) != shape:
            raise ConfigError(f"{path} is {tuple(params[path].shape)}; its configuration says {shape}")
