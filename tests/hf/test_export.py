"""What we write, transformers opens: all keys, the same logits, the same pixels and token ids."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import Pad
from mllm_jax.hf.export import export
from mllm_jax.hf.family import parameter_shapes
from mllm_jax.hf.load import load
from mllm_jax.nn.lora import LoRA
from mllm_jax.nn.position import interpolate
from tests.hf import ours
from tests.hf.test_parity import check_pixels, close, llava_rows


def reopened(torch, auto, folder, **kwargs):
    """The model of transformers from a folder, with nothing missing and nothing left over."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **kwargs)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "llama_biased", "llama_linear", "opt", "stablelm", "phi"])
def test_language_model_comes_back(saved, torch, tmp_path, name):
    from transformers import AutoModelForCausalLM

    it = saved(name)
    cfg, params = load(it.folder)
    export(params, cfg, tmp_path / "out", family="mistral" if name == "mistral" else None, seq_len=128)
    model = reopened(torch, AutoModelForCausalLM, tmp_path / "out", attn_implementation="eager")
    assert type(model) is type(it.model)
    ids = torch.tensor(np.random.default_rng(0).integers(0, 90, (2, 50)))
    assert torch.equal(model(ids).logits, it.model(ids).logits)


@pytest.mark.parametrize("name", ["clip", "siglip", "clip_vision", "siglip_vision"])
def test_encoder_comes_back(saved, torch, tmp_path, name):
    from tests.hf import tiny

    it = saved(name)
    cfg, params = load(it.folder)
    export(params, cfg, tmp_path / "out")
    model = reopened(torch, type(it.model), tmp_path / "out")
    theirs, mine = dict(it.model.named_parameters()), dict(model.named_parameters())
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[k], mine[k]) for k in theirs)
    inputs = {"pixel_values": torch.randn(2, 3, tiny.SIZE, tiny.SIZE)}
    if "vision" not in name:
        inputs["input_ids"] = torch.randint(2, 90, (2, 12))
    for a, b in zip(model(**inputs).to_tuple(), it.model(**inputs).to_tuple()):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", [f"llava-{t}-{d}" for t in ("clip", "siglip", "pad") for d in ("llama", "mistral", "qwen2", "qwen3")])
def test_llava_comes_back(saved, torch, tmp_path, name):
    from transformers import AutoModelForImageTextToText

    from tests.hf import tiny

    it = saved(name)
    cfg, params = load(it.folder)
    export(params, cfg, tmp_path / "out", image_token=tiny.IMAGE_TOKEN, max_shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model = reopened(torch, AutoModelForImageTextToText, tmp_path / "out")
    assert type(model) is type(it.model)
    tokens, _, _, _ = llava_rows(cfg.inputs["image"].encoder.grid ** 2, tiny.IMAGE_TOKEN)
    inputs = {"input_ids": torch.tensor(tokens), "pixel_values": torch.randn(3, 3, tiny.SIZE, tiny.SIZE)}
    assert torch.equal(model(**inputs).logits, it.model(**inputs).logits)


TEMPLATE = ("{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %} |{% endfor %}")


@pytest.mark.parametrize("tower", ["clip", "siglip", "pad"])
def test_the_exported_processor_makes_our_pixels_and_ids(saved, torch, tmp_path, tower):
    """From a picture and a question to logits, on both sides, with the real processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tests.hf import tiny

    cfg, params = load(saved(f"llava-{tower}-llama").folder)
    tokenizer = load_tokenizer("bytes")
    vocab = 304
    cfg = replace(cfg, decoder=replace(cfg.decoder, vocab=vocab))
    rng = np.random.default_rng(3)
    params = params | {"decoder/embedding/table": jnp.asarray(rng.normal(size=(vocab, 32)), jnp.float32),
                       "decoder/head": jnp.asarray(rng.normal(size=(32, vocab)), jnp.float32)}
    folder = export(params, cfg, tmp_path / "out", tokenizer=tokenizer, chat_template=TEMPLATE, generation={"max_length": 99})
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "max_length": 99}

    files = tiny.images(2)
    pictures = [Image.open(io.BytesIO(f)).convert("RGB") for f in files]
    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "5 cats?"}]}]
    text = processor.apply_chat_template(turns)
    assert text == "user: <image>5 cats? |"
    text = "<image>" + text                                      # two images
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    tower_cfg = cfg.inputs["image"]
    n, image = tower_cfg.encoder.grid**2, tokenizer.get_vocab()["<image>"]
    ids = [t for piece in tokenizer(text)["input_ids"] for t in ([piece] * n if piece == image else [piece])]
    assert inputs["input_ids"][0].tolist() == ids

    at = np.cumsum(np.array(ids) == image) - 1
    slot = np.where(np.array(ids) == image, at, -1)[None]
    media = ours.media([files], tower_cfg.view, tower_cfg.patch, slot)
    check_pixels(media.values[0], inputs["pixel_values"], tower_cfg.encoder)
    model = reopened(torch, AutoModelForImageTextToText, folder)
    graph, batch = ours.graph_of(cfg), ours.batch(np.array([ids]), [len(ids)], media)
    o = jax.jit(lambda p: ours.merge(graph, p)(batch))(params)
    close(o.hidden @ o.unembed, model(**inputs).logits.detach(), 1e-3)      # logits of order 30


def test_export_needs_no_torch(saved, tmp_path):
    code = f"""
import sys
from mllm_jax.hf.load import load
from mllm_jax.hf.export import export
from mllm_jax.hf.convert import convert_folder
cfg, params = load({str(saved('llava-clip-llama').folder)!r})
export(params, cfg, {str(tmp_path / 'out')!r}, image_token=95)
convert_folder({str(tmp_path / 'out')!r}, {str(tmp_path / 'native')!r})
assert "torch" not in sys.modules and "transformers" not in sys.modules, "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_options_without_a_place_are_named(saved, tmp_path):
    cfg, params = load(saved("llava-clip-llama").folder)
    tower = cfg.inputs["image"]
    deep = replace(cfg, inputs={"image": replace(tower, connector=MLPConfig(depth=3))})
    with pytest.raises(ConfigError, match=r"'llava' cannot express inputs.image.connector.depth=3 \(it would be 2\)"):
        export(params, deep, tmp_path / "a", image_token=1)
    odd = replace(cfg, inputs={"image": replace(tower, view=Pad(size=32, fill=(0, 0, 0)))})
    with pytest.raises(ConfigError, match=r"inputs.image.view.fill=\(0, 0, 0\)"):
        export(params, odd, tmp_path / "a", image_token=1)
    scaled = replace(cfg, decoder=replace(cfg.decoder, embed_scale=2.0))
    with pytest.raises(ConfigError, match="decoder.embed_scale=2.0"):
        export(params, scaled, tmp_path / "a", image_token=1)
    with pytest.raises(ConfigError, match="with its tokenizer, or with image_token"):
        export(params, cfg, tmp_path / "a")
    with pytest.raises(ConfigError, match="differ in 1 paths: decoder/head"):
        export({k: v for k, v in params.items() if k != "decoder/head"}, cfg, tmp_path / "a", image_token=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_replaced(saved, tmp_path):
    cfg, params = load(saved("llama").folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("four years")
    with pytest.raises(ConfigError, match="is not a model folder"):
        export(params, cfg, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "four years"
    export(params, cfg, tmp_path / "model")
    export(params, cfg, tmp_path / "model", dtype="bfloat16")                   # a model is replaced by a model
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model"]


def test_adapters_are_merged_and_positions_written_as_used(saved, tmp_path):
    cfg, params = load(saved("llava-clip-llama").folder)
    adapted = LoRA(model=cfg, rank=2, alpha=4.0, targets=("decoder/blocks/0/attn/q",))
    rng = np.random.default_rng(0)
    lora = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in parameter_shapes(adapted).items() if k not in params}
    assert len(lora) == 2
    _, back = load(export(params | lora, adapted, tmp_path / "lora", image_token=1))
    a, b = (lora[f"decoder/blocks/0/attn/q/lora/{x}"] for x in "ab")
    want = params["decoder/blocks/0/attn/q/kernel"] + 2.0 * jnp.einsum("ldr,lrhk->ldhk", a, b)
    np.testing.assert_allclose(back["decoder/blocks/0/attn/q/kernel"], want, atol=1e-5)

    tower = cfg.inputs["image"]
    encoder = replace(tower.encoder, table=4, grid=6)
    larger = replace(cfg, inputs={"image": replace(tower, encoder=encoder, view=replace(tower.view, size=48))})
    got, back = load(export(params, larger, tmp_path / "larger", image_token=1))
    assert got.inputs["image"].encoder == replace(encoder, table=None)
    table = params["inputs/image/encoder/position"]
    np.testing.assert_array_equal(back["inputs/image/encoder/position"][1:], interpolate(table[1:], 6))


def test_any_view_goes_with_either_tower(saved, torch, tmp_path):
    """A squashing view before a tower with a class token (the recipe first/digits) is written and read back as such."""
    from transformers import AutoImageProcessor

    from mllm_jax.data.views import Square
    from tests.hf import tiny

    for name, view in (("llava-clip-llama", Square(size=32)), ("llava-siglip-llama", Square(size=32, crop=True)),
                       ("llava-siglip-llama", Square(size=32, resample="bilinear"))):
        cfg, params = load(saved(name).folder)
        tower = replace(cfg.inputs["image"], view=view)
        cfg = replace(cfg, inputs={"image": tower})
        folder = export(params, cfg, tmp_path / "out", image_token=1)
        assert load(folder)[0] == cfg
        files = tiny.images(3)
        media = ours.media([files], view, tower.patch, np.full((1, 1), -1))
        check_pixels(media.values[0], tiny.pixel_values(AutoImageProcessor.from_pretrained(folder), files), tower.encoder)


def test_the_processor_of_a_dual_encoder(saved, torch, tmp_path):
    """Text through the tokenizer and pictures through the processor, to the similarity of the pair."""
    from transformers import AutoModel, AutoProcessor

    from tests.hf import tiny

    cfg, params = load(saved("siglip").folder)
    tokenizer = load_tokenizer("bytes")
    cfg = replace(cfg, text=replace(cfg.text, vocab=280))
    table = jnp.asarray(np.random.default_rng(0).normal(size=(280, 24)), jnp.float32)
    folder = export(params | {"text/embedding/table": table}, cfg, tmp_path / "out", tokenizer=tokenizer)
    processor = AutoProcessor.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(f)).convert("RGB") for f in tiny.images(2)]
    inputs = processor(images=pictures, text=["two", "cats"], padding="max_length", max_length=12, return_tensors="pt")
    theirs = reopened(torch, AutoModel, folder)(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    tower = cfg.inputs["image"]
    media = ours.media([[f] for f in tiny.images(2)], tower.view, tower.patch, np.full((2, 12), -1))
    graph, batch = ours.graph_of(cfg), ours.batch(inputs["input_ids"].numpy(), [12, 12], media)
    o = jax.jit(lambda p: ours.merge(graph, p)(batch))(params | {"text/embedding/table": table})
    close(o.scale * o.embeds["image"] @ o.embeds["text"].T + o.bias, theirs.logits_per_image.detach())

    clip, params = load(saved("clip").folder)
    clip = replace(clip, text=replace(clip.text, vocab=280))
    tokenizer.eos_token = tokenizer.bos_token           # whose id is 2
    with pytest.raises(ConfigError, match="end token of the tokenizer needs another id"):
        export(params, clip, tmp_path / "clip", tokenizer=tokenizer)
