"""Adapters as a folder of PEFT: `peft` opens it, and the model answers as ours does with its adapters merged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mllm_jax.config import ConfigError
from mllm_jax.hf.export import export
from mllm_jax.hf.family import parameter_shapes
from mllm_jax.hf.load import load
from mllm_jax.hf.peft import save_adapter, without_adapters
from mllm_jax.nn.lora import LoRA
from tests.hf.test_parity import llava_rows

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")      # asked for by peft
CONNECTOR = "inputs/image/connector/"


def adapted(folder, targets: tuple[str, ...], trained: str = "") -> tuple[LoRA, dict[str, jax.Array], set[str]]:
    """(model, parameters, what trained besides): random adapters on a checkpoint, and some parameters changed."""
    cfg, params = load(folder)
    cfg = LoRA(model=cfg, rank=3, alpha=12.0, targets=targets)
    rng = np.random.default_rng(5)
    draw = lambda shape: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)
    changed = {k for k in params if trained and k.startswith(trained)}
    new = {k: draw(s) for k, s in parameter_shapes(cfg).items() if k not in params}
    return cfg, params | {k: params[k] + draw(params[k].shape) for k in changed} | new, changed


def logits(model, torch, **inputs) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def check(torch, tmp_path, it, cfg, params, changed, inputs) -> dict[str, np.ndarray]:
    """The folder opens on the base with the logits of the merged export, and as PEFT would write it; its tensors."""
    from tests.hf import tiny

    folder = save_adapter(params, cfg, tmp_path / "adapter", trained=changed, base=str(it.folder))
    export(params, cfg, tmp_path / "merged", image_token=tiny.IMAGE_TOKEN if hasattr(cfg, "inputs") else None, seq_len=128)
    before = logits(it.model, torch, **inputs)
    merged = logits(type(it.model).from_pretrained(tmp_path / "merged", dtype=torch.float32), torch, **inputs)
    model = peft.PeftModel.from_pretrained(type(it.model).from_pretrained(it.folder, dtype=torch.float32), folder)
    # x A B + x W instead of x (W + A B): noise of float32, which three layers of random weights make larger.
    np.testing.assert_allclose(logits(model, torch, **inputs), merged, atol=1e-4)
    assert np.abs(merged - before).max() > 0.1
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    for key, x in ours.items():
        np.testing.assert_array_equal(x, theirs[key], err_msg=key)
    return ours


def test_a_language_model_with_adapters_opens(saved, torch, tmp_path):
    it = saved("llama")
    cfg, params, changed = adapted(it.folder, ("*/attn/*", "*/mlp/*"))
    ids = torch.tensor(np.random.default_rng(0).integers(0, 90, (2, 20)))
    tensors = check(torch, tmp_path, it, cfg, params, changed, {"input_ids": ids})
    assert len(tensors) == 3 * 7 * 2    # layers, matrices of a layer, halves
    # By hand: of the output of attention, the last layer; two axes are read.
    a, b = (np.asarray(params[f"blocks/0/attn/o/lora/{half}"][2]) for half in "ab")
    key = "base_model.model.model.layers.2.self_attn.o_proj.lora_{}.weight"
    np.testing.assert_array_equal(tensors[key.format("A")], a.reshape(-1, 3).T)
    np.testing.assert_array_equal(tensors[key.format("B")], b.T)


def test_a_llava_with_adapters_and_a_trained_connector_opens(saved, torch, tmp_path):
    from tests.hf import tiny

    it = saved("llava-clip-llama")
    cfg, params, changed = adapted(it.folder, ("decoder/blocks/*/attn/*", "inputs/image/encoder/blocks/*/mlp/*"), CONNECTOR)
    tokens, _, _, _ = llava_rows(cfg.inputs["image"].encoder.grid ** 2, tiny.IMAGE_TOKEN)
    inputs = {"input_ids": torch.tensor(tokens), "pixel_values": torch.randn(3, 3, tiny.SIZE, tiny.SIZE)}
    tensors = check(torch, tmp_path, it, cfg, params, changed, inputs)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"]
    assert "base_model.model.model.multi_modal_projector.linear_1.bias" in tensors
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 12.0, str(it.folder))


def test_what_peft_cannot_hold_is_named(saved, tmp_path):
    folder = saved("llava-clip-llama").folder
    cfg, params, _ = adapted(folder, ("inputs/image/encoder/patch",))
    with pytest.raises(ConfigError, match="inputs/image/encoder/patch/kernel of ours is .*patch_embedding.weight of llava, 24x3x8x8, .*lora.layers"):
        save_adapter(params, cfg, tmp_path / "a")
    cfg, params, _ = adapted(saved("clip").folder, ("text/blocks/*",))
    with pytest.raises(ConfigError, match="logit_scale was trained besides the adapters.*'the model' holds adapters too"):
        save_adapter(params, cfg, tmp_path / "a", trained={"log_scale"})
    with pytest.raises(ConfigError, match="the model has no adapters"):
        save_adapter(*without_adapters(params, cfg), tmp_path / "a")
    assert not (tmp_path / "a").exists()
