"""Stages with adapters: what trains, what a later stage starts from."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mllm_jax.config import ConfigError, load
from mllm_jax.nn.lora import LEAVES, merge_adapters
from mllm_jax.recipe import LowRank, Recipe
from mllm_jax.sharding import Layout
from mllm_jax.train.adapters import model_of, save_adapters
from mllm_jax.train.checkpoint import read_params
from mllm_jax.train.folder import RunOptions
from mllm_jax.train.run import train
from mllm_jax.train.state import Blueprint

Q = "decoder/blocks/0/attn/q/kernel"


def recipe(**stages: LowRank) -> Recipe:
    base = load("projector/llava_15").tiny()
    stage = replace(base.stages["instruct"], steps=2, weights={}, evals={}, train=("inputs/image/connector/*", "decoder/*"))
    return replace(base, samples=1, stages={name: replace(stage, lora=lora) for name, lora in stages.items()})


def params(out: Path, cfg: Recipe, stage: str) -> dict[str, np.ndarray]:
    layout = Layout(mesh={"data": 1})
    shapes = Blueprint(model_of(cfg, stage), layout, layout.make_mesh(jax.devices()[:1])).shapes
    return {k: np.asarray(v) for k, v in read_params(out / "stages" / stage, shapes).items()}


def test_adapters_train_and_are_merged_for_the_stage_after(tmp_path: Path):
    cfg = recipe(whole=LowRank(), low=LowRank(rank=3, alpha=12.0), again=LowRank(rank=3, alpha=12.0), merged=LowRank(),
                 last=LowRank(rank=3, alpha=12.0))
    # This one trains nothing of the decoder, so that it has what it started from.
    cfg = replace(cfg, stages={**cfg.stages, "merged": replace(cfg.stages["merged"], train=("inputs/image/connector/*",))})
    train(cfg, RunOptions(name="test/test", out=tmp_path, layout=Layout(mesh={"data": 2, "fsdp": 2, "tensor": 2})))
    whole, low, again, merged, last = (params(tmp_path, cfg, stage) for stage in cfg.stages)
    assert low.keys() - whole.keys() == {k for k in low if k.endswith(LEAVES)} != set()
    still = [k for k in whole if np.array_equal(whole[k], low[k])]
    assert all(k in still for k in whole if k.startswith("decoder/")), "a part with adapters trains nothing else"
    assert all(k not in still for k in whole if k.startswith("inputs/image/connector/"))
    assert all(np.any(low[k] != again[k]) for k in low if k.endswith(LEAVES)), "the stage after goes on with the adapters"
    want = merge_adapters({k: v for k, v in again.items() if k.startswith("decoder/")}, 3, 12.0)
    assert np.any(want[Q] != whole[Q])
    assert set(want) == {k for k in merged if k.startswith("decoder/")}
    for k, x in want.items():
        np.testing.assert_allclose(merged[k], x, rtol=1e-6, atol=1e-7, err_msg=k)    # one product in another program
    # What the checkpoint with adapters is read as by whoever knows nothing of them.
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    folded = read_params(tmp_path / "stages" / "low", {Q: jax.ShapeDtypeStruct(whole[Q].shape, np.float32, sharding=one)})
    np.testing.assert_allclose(folded[Q], merge_adapters(low, 3, 12.0)[Q], rtol=1e-6, atol=1e-7)
    # The run ends with adapters, and so with a folder of PEFT, in which the connector is whole.
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    half = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[half], last[Q.replace("kernel", "lora/a")][1].T)
    assert "base_model.model.model.multi_modal_projector.linear_1.weight" in tensors
    named = replace(cfg, stages={"last": replace(cfg.stages["last"], weights={"*": "hf://org/name"})})
    assert [save_adapters(r, "last", last, tmp_path / "other") for r in (cfg, named)] == [None, "org/name"]


def test_a_part_without_such_layers_is_named(tmp_path: Path):
    cfg = recipe(low=LowRank(rank=2, parts=("decoder", "inputs/image/encoder"), layers=("*/gate",)))
    with pytest.raises(ConfigError, match="lora.parts names 'inputs/image/encoder', in which no linear layer matches"):
        train(cfg, RunOptions(name="test/test", out=tmp_path, layout=Layout(mesh={"data": -1})))
