"""What a stage with adapters trained, as a folder of PEFT; its base stays what it was.

    adapter_config.json  adapter_model.safetensors

    peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)

Keys are the paths of modules of the transformers class in memory, which differ from those of its files (`Family.memory`).
An adapter x A B of ours, A[in.. r] and B[r out..], is theirs as lora_A[r, in] and lora_B[out, r], where a weight is
one matrix with the same axes in both.  Whatever else the stage trained, such as a connector, PEFT keeps whole and by module.

Source: peft 0.21, `get_peft_model_state_dict`.
"""

import contextlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from mllm_jax.config import ConfigError
from mllm_jax.hf import families
from mllm_jax.hf.export import stream, write_hf
from mllm_jax.hf.family import Family, Link
from mllm_jax.hf.tensors import replacing
from mllm_jax.nn.lora import LEAVES, LoRA
from mllm_jax.nn.param import Params

ROOT = "base_model.model."


def save_adapter(
    params: Mapping[str, jax.Array], cfg: Any, folder: str | Path, *, trained: Collection[str] = (), base: str | None = None,
    family: str | None = None, dtype: Any = None,
) -> Path:
    """Writes the adapters of the model `cfg`, and the other `trained` parameters, and returns the folder.

    Args:
      trained: paths of parameters besides the adapters that differ from the base.
      base: folder or name on the Hub that the adapters belong to.
      family: its `model_type`, where it is not clear.
      dtype: of all tensors; None keeps that of each parameter.

    Raises:
      ConfigError: the model has no adapters, or PEFT has no place for one or for a trained parameter; the message names it.
    """
    folder, (plain, model) = Path(folder), without_adapters(params, cfg)
    chosen = families.family(family) if family else families.family_of(model)
    links = chosen.links(model)
    name = lambda link: ROOT + chosen.in_memory(link.theirs)
    changed = [x for x in links if x.ours.removesuffix("kernel") + LEAVES[0] in params]
    targets = sorted(name(x).removeprefix(ROOT).removesuffix(".weight") for x in changed)
    out = [replace(half, theirs=f"{name(x).removesuffix('weight')}{half.theirs}.weight")
           for x in changed for half in _halves(x, params, chosen)]
    whole = _modules([name(x).removeprefix(ROOT) for x in links if x.ours in plain.keys() & set(trained)], targets)
    out += [replace(x, theirs=name(x)) for x in links if _inside(name(x).removeprefix(ROOT), whole)]
    writes = hasattr(model, "decoder") or chosen.architecture.endswith("ForCausalLM")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if writes else None, "base_model_name_or_path": base,
        "r": cfg.rank, "lora_alpha": cfg.alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": targets,
        "modules_to_save": whole or None, "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "inference_mode": True,
    }  # fmt: skip
    first = jax.process_index() == 0
    with replacing(folder) if first else contextlib.nullcontext() as new:
        if first:
            (new / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_hf(new, chosen, out, stream(params, out, dtype), {k: dtype or p.dtype for k, p in params.items()}, float("inf"), "adapter_model")
    if jax.process_count() > 1:         # nobody goes on to read what is not there yet
        multihost_utils.sync_global_devices(f"adapter {folder}")
    return folder


def without_adapters(params: Mapping[str, jax.Array], cfg: Any) -> tuple[Params, Any]:
    """The model that the adapters are put on.

    Raises:
      ConfigError: it has none.
    """
    if not isinstance(cfg, LoRA):
        raise ConfigError("the model has no adapters; give its last stage some (stages.NAME.lora.rank=8), or export it whole")
    return {k: x for k, x in params.items() if not k.endswith(LEAVES)}, cfg.model


def _halves(link: Link, params: Mapping[str, Any], family: Family) -> tuple[Link, Link]:
    """lora_A and lora_B of a matrix, as links to the two halves of our adapter."""
    a, b = (link.ours.removesuffix("kernel") + leaf for leaf in LEAVES)
    n = params[a].ndim - 1 - (link.layer is not None)           # axes that the layer reads
    theirs, _, ours = link.how.partition(" -> ")
    sides, ours = re.findall(r"\([^)]*\)|\S+", theirs), ours.split()
    reads, gives = ours[:n], ours[n:]
    matrix = len(sides) == 2 and [sorted(re.findall(r"\w+", x)) for x in sides] == [sorted(gives), sorted(reads)]
    if not matrix or link.part is not None:
        raise ConfigError(f"{link.ours} of ours is {link.theirs} of {family.model_type}, {'x'.join(map(str, link.their_shape))}, which is no matrix "
                          "of its own; PEFT has no such adapter: leave that layer out of lora.layers, or export the model whole")
    shape = lambda name: tuple(params[name].shape[link.layer is not None :])
    return (replace(link, theirs="lora_A", ours=a, shape=shape(a), how=f"rank {sides[1]} -> {' '.join(reads)} rank"),
            replace(link, theirs="lora_B", ours=b, shape=shape(b), how=f"{sides[0]} rank -> rank {' '.join(gives)}"))


def _modules(trained: Collection[str], targets: Collection[str]) -> list[str]:
    """The modules to save whole: those that hold these parameters, none inside another.

    Raises:
      ConfigError: a module would hold an adapter, too.
    """
    holders = {n.rpartition(".")[0]: n for n in sorted(trained, reverse=True)}
    for module, parameter in holders.items():
        if inner := [t for t in targets if not module or _inside(t, [module])]:
            raise ConfigError(f"{parameter} was trained besides the adapters, and PEFT saves modules whole, but {module or 'the model'!r} "
                              f"holds adapters too ({inner[0]}); leave it out of train, or export the model whole")
    return sorted(m for m in holders if not _inside(m, [other for other in holders if other != m]))


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{m}.") for m in modules)
