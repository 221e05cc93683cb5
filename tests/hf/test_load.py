"""Import: every key layout, every part, every shard; and each fault has its line."""

import json
import logging
import shutil
from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mllm_jax.config import ConfigError
from mllm_jax.connectors.pool import NestedConfig
from mllm_jax.decoders.layers import Layer
from mllm_jax.hf.family import parameter_shapes
from mllm_jax.hf.load import load, load_subtree
from mllm_jax.nn.gated import Gated, open_flamingo
from mllm_jax.nn.lora import LoRA
from mllm_jax.nn.moe import MoEConfig
from mllm_jax.nn.param import axes_of
from mllm_jax.sharding import Layout, sharding_of
from tests.hf import ours


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]), k


def rewritten(folder, out, rename=lambda k: k, change=lambda t: t, config=lambda c: c):
    """A copy of a folder with other names, tensors or configuration."""
    shutil.copytree(folder, out)
    tensors = {rename(k): np.ascontiguousarray(x) for k, x in change(load_file(folder / "model.safetensors")).items()}
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config(json.loads((folder / "config.json").read_text()))))
    return out


def wanted(cfg, dtype=jnp.float32):
    return {k: jax.ShapeDtypeStruct(s, dtype) for k, s in parameter_shapes(cfg).items()}


def in_memory(key: str) -> str:
    """llava: what transformers 5 writes -> what it calls them while running."""
    return key.replace("language_model.lm_head", "lm_head") if "lm_head" in key else "model." + key.replace("language_model.model", "language_model")


LAYOUTS = {
    "hub": lambda k: k.replace("vision_tower.", "vision_tower.vision_model."),
    "in memory": in_memory,
    "in memory of 4.x": lambda k: in_memory(k).replace("vision_tower.", "vision_tower.vision_model."),
}


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-siglip-qwen2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_llava_keys_of_every_layout(saved, tmp_path, name, layout):
    folder = saved(name).folder
    cfg, params = load(folder)
    got, back = load(rewritten(folder, tmp_path / "x", LAYOUTS[layout]))
    assert got == cfg
    same(back, params)


def test_other_layouts(saved, tmp_path):
    # The tower alone, with the prefix that old files have; the language model of the class without a head.
    cfg, params = load(saved("clip_vision").folder)
    same(load(rewritten(saved("clip_vision").folder, tmp_path / "v", lambda k: "vision_model." + k))[1], params)
    cfg, params = load(saved("qwen3").folder)                   # tied, so that it has all it needs
    same(load(rewritten(saved("qwen3").folder, tmp_path / "q", lambda k: k.removeprefix("model.")))[1], params)


def test_a_decoder_with_positions_on_three_axes_starts_from_a_language_model(saved):
    """On text the axes are the same; who asks for other rotations than that is told."""
    cfg, params = load(saved("qwen2").folder)
    grown = replace(cfg, rope=replace(cfg.rope, sections=(2, 1, 1)))
    same(load_subtree(saved("qwen2").folder, grown, wanted(grown)), params)
    other = replace(grown, rope=replace(grown.rope, theta=5.0))
    with pytest.raises(ConfigError, match="rope.theta is 1000000.0 in the checkpoint and 5.0 in the model"):
        load_subtree(saved("qwen2").folder, other, wanted(other))


def test_an_encoder_may_leave_out_last_layers_that_nobody_runs(saved):
    folder = saved("siglip").folder
    cfg, params = load(folder)
    encoder = replace(cfg.inputs["image"].encoder, depth=2, pool="none", final_norm=False)
    got = load_subtree(folder, encoder, wanted(encoder))
    assert got.keys() == parameter_shapes(encoder).keys()
    for path, x in got.items():
        whole = params[f"inputs/image/{path}"]
        np.testing.assert_array_equal(x, whole[:2] if path.startswith("blocks/") else whole)
    with pytest.raises(ConfigError, match="depth is 3 in the checkpoint and 2 in the model"):        # its vector would be another
        load_subtree(folder, replace(encoder, pool="map"), wanted(replace(encoder, pool="map")))


def test_old_buffers_are_ignored_and_a_repeated_tied_head_too(saved, tmp_path):
    def with_buffers(tensors):
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
                 "lm_head.weight": tensors["model.embed_tokens.weight"]}
        return tensors | extra

    same(load(rewritten(saved("qwen3").folder, tmp_path / "q", change=with_buffers))[1], load(saved("qwen3").folder)[1])


def test_missing_and_unknown_tensors_are_named(saved, tmp_path):
    folder = saved("llama").folder
    drop = lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up_proj" not in k}
    with pytest.raises(ConfigError, match="1 tensors of llama are missing: model.layers.1.mlp.up_proj.weight"):
        load(rewritten(folder, tmp_path / "a", change=drop))
    with pytest.raises(ConfigError, match="1 tensors are not in the table of llama: model.extra.weight"):
        load(rewritten(folder, tmp_path / "b", change=lambda t: t | {"model.extra.weight": np.ones(3, np.float32)}))
    with pytest.raises(ConfigError, match="model.norm.weight is 31; config.json promises 32"):
        load(rewritten(folder, tmp_path / "c", change=lambda t: t | {"model.norm.weight": np.ones(31, np.float32)}))


def test_the_faults_of_a_folder_have_a_line_each(saved, tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="has no config.json"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"hf://no/such cannot be fetched .* give the folder instead"):
        load("hf://no/such")
    folder = saved("llama").folder
    cut = shutil.copytree(folder, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ConfigError, match="cut short or damaged"):
        load(cut)
    (cut / "model.safetensors").write_bytes(data[:50])
    with pytest.raises(ConfigError, match="not a safetensors file, or is cut short"):
        load(cut)
    (cut / "model.safetensors").rename(cut / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no checkpoint of PyTorch 1.6 or later"):
        load(cut)
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ConfigError, match="1 of 1 shards are missing"):
        load(cut)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; supported are clip"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
        ({"sliding_window": 16}, "sliding_window=16: llama has no window"),
    ],
)
def test_what_is_not_supported_is_refused(saved, tmp_path, change, match):
    with pytest.raises(ConfigError, match=match):
        load(rewritten(saved("llama").folder, tmp_path / "x", config=lambda c: c | change))


def test_a_window_that_never_closes_is_no_window(saved, tmp_path):
    for name, change in (("mistral", {"sliding_window": 128}), ("qwen2", {"use_sliding_window": True, "sliding_window": 8})):
        cfg, _ = load(saved(name).folder)
        assert load(rewritten(saved(name).folder, tmp_path / name, config=lambda c, change=change: c | change))[0] == cfg


def test_old_spelling_of_rotary_options(saved, tmp_path):
    def old(c):
        p = c.pop("rope_parameters")
        return c | {"rope_theta": p.pop("rope_theta"), "rope_scaling": {"type": p.pop("rope_type"), **p}}

    for name in ("llama_biased", "llama_linear"):
        assert load(rewritten(saved(name).folder, tmp_path / name, config=old))[0] == load(saved(name).folder)[0]


def test_the_short_configuration_of_old_llava_folders():
    """What llava-hf/llava-1.5-7b-hf has in its config.json; the rest are defaults of transformers."""
    from mllm_jax.decoders import transformer as llm
    from mllm_jax.encoders.vit import CLIP_L14_336
    from mllm_jax.hf.families import family

    hf = {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000, "model_type": "llava",
        "pad_token_id": 32001, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
        "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
                          "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
                          "vocab_size": 32000},
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
    }  # fmt: skip
    pre = {"crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 336}
    cfg = family("llava").config(hf, pre)
    assert cfg.decoder == replace(llm.VICUNA_7B, vocab=32_064)
    assert cfg.inputs["image"].encoder == replace(CLIP_L14_336, layer=-2)
    assert cfg.inputs["image"].view.size == 336 and cfg.inputs["image"].view.crop


def test_sharded_tensors_come_to_the_right_devices(saved):
    folder = saved("llava-clip-llama").folder
    cfg, whole = load(folder)
    layout = Layout(mesh={"data": 1, "fsdp": 4, "tensor": 2})
    mesh = layout.make_mesh()
    axes = axes_of(jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    shardings = {k: sharding_of(axes[k], x.shape, layout, mesh) for k, x in whole.items()}
    _, params = load(folder, shardings=shardings)
    same(params, whole)
    assert all(params[k].sharding == shardings[k] for k in params)
    kernel = params["decoder/blocks/0/mlp/up/kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 8, 24)               # embed over 4, mlp over 2


def test_parts_of_a_checkpoint(saved):
    llava, clip = saved("llava-clip-llama").folder, saved("clip").folder
    cfg, params = load(llava)
    below = lambda prefix, p: {k.removeprefix(prefix): x for k, x in p.items() if k.startswith(prefix)}
    sub, got = load(llava, part="decoder")
    assert sub == cfg.decoder
    same(got, below("decoder/", params))
    encoder, projected = cfg.inputs["image"].encoder, load(clip)[1]
    # The tower of CLIP for a model that reads another layer of it.
    target = replace(load(clip)[0].inputs["image"].encoder, layer=-2)
    same(load_subtree(clip, target, wanted(target)), below("inputs/image/", projected))
    same(load_subtree(llava, encoder, wanted(encoder)), below("inputs/image/encoder/", params))
    with pytest.raises(ConfigError, match="has no part 'text'; it has inputs/image/encoder, inputs/image/connector, decoder"):
        load(llava, part="text")
    with pytest.raises(ConfigError, match="holds no ViTConfig; it holds DecoderConfig"):
        load_subtree(saved("llama").folder, encoder, wanted(encoder))


def test_a_stage_begins_with_parts_of_several_checkpoints(saved):
    """The parts that `Stage.weights` names: a tower, what is in it, a tower of a dual encoder, a few tensors of a part."""
    folder = saved("llava-clip-llama").folder
    cfg, params = load(folder)
    under = lambda subtree, of: {k.removeprefix(subtree): x for k, x in of.items() if k.startswith(subtree)}
    for subtree, part in (("inputs/image/", cfg.inputs["image"]), ("inputs/image/connector/", cfg.inputs["image"].connector)):
        same(load_subtree(folder, part, under(subtree, wanted(cfg))), under(subtree, params))
    dual, _ = load(saved("clip").folder)
    got = load_subtree(saved("clip_vision").folder, dual.inputs["image"], under("inputs/image/", wanted(dual)))
    same(got, load(saved("clip_vision").folder)[1])
    some = {k: s for k, s in wanted(cfg.decoder).items() if "norm" in k}
    same(load_subtree(folder, cfg.decoder, some), {k: params[f"decoder/{k}"] for k in some})


def test_a_name_of_the_hub_is_looked_up_in_its_cache(saved, tmp_path):
    """The layout that huggingface_hub gives its cache; offline, as on a machine without network."""
    import os
    import subprocess
    import sys

    hub = tmp_path / "hub" / "models--org--tiny"
    commit = "0123456789" * 4
    shutil.copytree(saved("llama").folder, hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    code = f"from mllm_jax.hf.load import load; print(load('hf://org/tiny')[0].width, load('hf://org/tiny@{commit}')[0].depth)"
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == ["32", "3"], out.stderr


def test_options_that_no_shape_tells_are_compared(saved):
    folder = saved("llama").folder
    cfg, _ = load(folder)
    other = replace(cfg, rope=replace(cfg.rope, theta=7.0))
    with pytest.raises(ConfigError, match=r"rope.theta is 10000.0 in the checkpoint and 7.0 in the model"):
        load(folder, other)
    with pytest.raises(ConfigError, match="heads is 4 in the checkpoint and 8 in the model"):
        load(folder, replace(cfg, heads=8, head_dim=4))


def test_new_tokens_are_the_mean_of_the_old(saved, caplog):
    folder = saved("llama").folder
    cfg, params = load(folder)
    more = replace(cfg, vocab=cfg.vocab + 7)
    shapes = wanted(more)
    with caplog.at_level(logging.INFO, "mllm_jax.hf.load"):
        got = load_subtree(folder, more, shapes)
    assert "embedding/table grows from 96 to 103 tokens" in caplog.text
    table, head = np.asarray(params["embedding/table"]), np.asarray(params["head"])
    np.testing.assert_array_equal(got["embedding/table"][:96], table)
    np.testing.assert_allclose(got["embedding/table"][96:], np.tile(table.mean(0), (7, 1)), atol=1e-6)
    np.testing.assert_array_equal(got["head"][:, :96], head)
    np.testing.assert_allclose(got["head"][:, 96:], np.tile(head.mean(1)[:, None], (1, 7)), atol=1e-6)
    with pytest.raises(ConfigError, match="has 96 tokens and the model 90; set the vocabulary of the model to at least 96"):
        load(folder, replace(cfg, vocab=90))
    # Rows spread over devices: some hold old tokens only, some new ones only.
    mesh = Layout(mesh={"data": 1, "fsdp": 1, "tensor": 8}).make_mesh()
    more = replace(cfg, vocab=192)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
    _, sharded = load(folder, more, shardings={"embedding/table": sharding})
    np.testing.assert_allclose(sharded["embedding/table"][96:], np.tile(table.mean(0), (96, 1)), atol=1e-6)


def test_a_head_of_its_own_begins_as_the_embedding(saved):
    folder = saved("qwen3").folder
    cfg, params = load(folder)
    assert cfg.head == "tied"
    _, got = load(folder, replace(cfg, head="own", vocab=cfg.vocab + 7))
    table = np.asarray(params["embedding/table"])
    np.testing.assert_array_equal(got["head"][:, : cfg.vocab], table.T)
    np.testing.assert_allclose(got["head"], np.asarray(got["embedding/table"]).T, atol=1e-6)
    with pytest.raises(ConfigError, match="head is 'own' in the checkpoint and 'tied' in the model"):
        load(saved("llama").folder, replace(load(saved("llama").folder)[0], head="tied"))


def test_adapters_are_left_out(saved):
    folder = saved("llama").folder
    cfg, params = load(folder)
    adapted = LoRA(model=cfg, rank=2, alpha=1.0, targets=("blocks/*",))
    same(load_subtree(folder, adapted, wanted(adapted)), params)


def test_experts_begin_as_copies_of_the_dense_layer(saved):
    """Layers 0 and 2 of three are sparse; on a mesh each device fills its own experts."""
    folder = saved("llama").folder
    cfg, params = load(folder)
    sparse = replace(cfg, cycle=(Layer(mlp=MoEConfig(experts=4)), Layer()))
    layout = Layout(mesh={"fsdp": 2, "expert": 2, "tensor": 2})
    mesh, axes = layout.make_mesh(), axes_of(jax.eval_shape(lambda: sparse.build(rngs=nnx.Rngs(0))))
    target = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(axes[k], x.shape, layout, mesh)) for k, x in wanted(sparse).items()}
    got = load_subtree(folder, sparse, target)
    assert target.keys() - got.keys() == {"blocks/0/mlp/router"} and all(got[k].sharding == target[k].sharding for k in got)
    for name in ("gate", "up", "down"):
        one = params[f"blocks/0/mlp/{name}/kernel"]
        experts = np.asarray(got[f"blocks/0/mlp/experts/{name}/kernel"])
        assert experts.shape[1] == 4 and all(np.array_equal(experts[:, e], one[::2]) for e in range(4))
        assert np.array_equal(got[f"blocks/1/mlp/{name}/kernel"], one[1:2])
    assert np.array_equal(got["blocks/0/attn/q/kernel"], params["blocks/0/attn/q/kernel"][::2])
    with pytest.raises(ConfigError, match="mlp is 48 in the checkpoint and 40 in the model"):
        load_subtree(folder, replace(sparse, mlp=40), target)


def test_half_precision_is_kept_or_widened(saved, torch, tmp_path):
    import ml_dtypes

    from tests.hf import tiny

    model, _ = tiny.build("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "x")
    _, kept = load(tmp_path / "x", dtype=None)
    _, wide = load(tmp_path / "x")
    theirs = model.model.embed_tokens.weight.detach()
    assert kept["embedding/table"].dtype == ml_dtypes.bfloat16 and wide["embedding/table"].dtype == jnp.float32
    np.testing.assert_array_equal(wide["embedding/table"], theirs.float().numpy())
    same({k: x.astype(jnp.float32) for k, x in kept.items()}, wide)


def test_a_nested_projector_starts_from_the_one_it_grew_from(saved):
    """M3 begins with a trained LLaVA, whose projector has the same parameters."""
    theirs, params = load(saved("llava-clip-llama").folder)
    connector, prefix = theirs.inputs["image"].connector, "inputs/image/connector/"
    nested = NestedConfig(**vars(connector), grid=theirs.inputs["image"].encoder.grid, windows=(1, 2))
    want = {k.removeprefix(prefix): jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in params.items() if k.startswith(prefix)}
    got = load_subtree(saved("llava-clip-llama").folder, nested, want)
    assert want and all(np.array_equal(got[k], params[prefix + k]) for k in want)
    with pytest.raises(ConfigError, match="depth is 2 in the checkpoint and 3 in the model"):
        load_subtree(saved("llava-clip-llama").folder, replace(nested, depth=3), want)


def test_a_grown_decoder_begins_as_the_language_model_that_it_grew_from(saved):
    """Layers take turns where all were alike; tokens came later; what reads media is not in the checkpoint, and left out."""
    folder = saved("llama").folder
    plain, params = load(folder)
    reads = Gated(width=8, block=replace(open_flamingo(plain.width), heads=2, head_dim=4))
    grown = replace(plain, vocab=plain.vocab + 2, added=2, cycle=(Layer(), Layer(), Layer(reads=reads)))
    want = wanted(grown)
    got = load_subtree(folder, grown, want)
    assert {k for k in want if k not in got} == {k for k in want if "/reads/" in k} != set()
    for k, x in got.items():
        if k.startswith("blocks/"):                             # layer i is the only one at place i
            i = int(k.split("/")[1])
            np.testing.assert_array_equal(x[0], params[f"blocks/0/{k.split('/', 2)[2]}"][i])
    for new, old, axis in (("embedding/added", "embedding/table", 0), ("head_added", "head", 1)):
        np.testing.assert_array_equal(got[old], params[old])
        mean = np.mean(np.asarray(params[old]), axis, keepdims=True)
        np.testing.assert_allclose(got[new], np.repeat(mean, 2, axis), atol=1e-6)
    # So that, with gates closed, it says what the language model says.
    graph, tokens = ours.graph_of(grown), np.arange(12)[None]
    whole = got | {k: jnp.zeros(s.shape) for k, s in want.items() if k not in got}
    run = lambda graph, params: (lambda m, b: m(m.embed(b.tokens), b)[0] @ m.unembed)(ours.merge(graph, params), ours.batch(tokens, [12]))
    np.testing.assert_allclose(run(graph, whole)[..., : plain.vocab], run(ours.graph_of(plain), params), atol=1e-5)
