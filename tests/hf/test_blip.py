"""BLIP-2 and InstructBLIP from pictures and words to tokens, gradients and files, each against transformers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.data.batch import collate, decode_items, prompt_batch
from mllm_jax.data.pack import one_row, pack, row_spec
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.generate import Sampling, generate
from mllm_jax.hf.convert import convert_folder
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.family import differences
from mllm_jax.hf.load import load, load_subtree
from mllm_jax.hf.peft import save_adapter
from mllm_jax.models.bridge import alone
from mllm_jax.nn.param import merge, split
from mllm_jax.objectives import NextToken
from mllm_jax.types import Batch
from tests.hf import ours
from tests.hf.test_convert import stored
from tests.hf.test_export import reopened
from tests.hf.test_load import rewritten, same
from tests.hf.test_parity import LOSS, check_gradients, check_pixels, close

NAMES = ("blip-2", "instructblip")


@dataclass
class Case:
    name: str
    made: Any
    folder: Path
    cfg: Any
    params: dict
    tokenizer: Any

    @property
    def model(self):
        return self.made.model

    @property
    def common(self) -> dict:
        return {"template": self.made.template, "tokenizer": self.tokenizer, "towers": self.cfg.inputs}

    def batch(self, rows: list[list]) -> Batch:
        """Rows of these examples, padded at the end."""
        sequences = [[encode(e, **self.common) for e in row] for row in rows]
        length = max(sum(map(len, row)) for row in sequences) + 5
        items = max(sum(len(e.media) for e in row) for row in rows)
        spec = row_spec(length, {"image": items}, self.cfg.inputs, self.tokenizer.pad_token_id)
        placed = [next(pack(row, spec)) if len(row) > 1 else one_row(row[0], spec) for row in sequences]
        decoded = [decode_items(row.media, self.cfg.inputs, exact=True) for row in placed]
        return jax.tree.map(jnp.asarray, collate(placed, decoded, spec))

    def theirs(self, torch, batch: Batch, processor: Any = None) -> dict:
        """Their inputs: our ids, which a test compares with the processor's, and what the processor makes of the pictures."""
        from tests.hf import tiny_blip

        processor = processor or self.made.processor
        files = [(picture, "".join(p.text for p in e.turns[0].parts)) for e in self.made.examples for picture in tiny_blip.pictures(e)]
        out = {"input_ids": torch.tensor(np.asarray(batch.tokens)), "attention_mask": torch.tensor(np.asarray(batch.segments))}
        made = processor(images=[f for f, _ in files], text=[t for _, t in files], padding=True, return_tensors="pt")
        return out | {k: v for k, v in made.items() if k.startswith(("pixel", "qformer"))}


@pytest.fixture(scope="module")
def cases(torch, tmp_path_factory):
    from tests.hf import tiny_blip

    out = {}
    for name in NAMES:
        made = tiny_blip.MODELS[name]()
        folder = tiny_blip.save(made, tmp_path_factory.mktemp("blip") / name)
        cfg, params = load(folder)
        out[name] = Case(name, made, folder, cfg, params, load_tokenizer(str(folder)))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_pixels_and_ids_are_those_of_the_processor(cases, torch, name):
    from tests.hf import tiny_blip

    it = cases[name]
    processor = it.made.processor
    for example in it.made.examples:
        prompt = prompt_batch([example], **it.common)
        asked = "".join(p.text for p in example.turns[0].parts)
        real = prompt.segments[0] > 0
        if len(example.media) == 1:                             # the processor knows one image for each text
            made = processor(images=tiny_blip.pictures(example), text=asked)
            assert prompt.tokens[0][real].tolist() == np.asarray(made["input_ids"])[0].tolist()
        elif not example.media:
            assert prompt.tokens[0][real].tolist() == processor.tokenizer(asked)["input_ids"]
    batch = it.batch([[e] for e in it.made.examples])
    media, inputs = batch.media["image"], it.theirs(torch, batch)
    there = np.asarray(media.mask).reshape(-1)
    check_pixels(media.values.reshape(-1, *media.values.shape[2:])[there], inputs["pixel_values"], it.cfg.inputs["image"].encoder)
    if name == "instructblip":
        text = np.asarray(media.text).reshape(-1, media.text.shape[-1])[there]
        want = np.where(inputs["qformer_attention_mask"], inputs["qformer_input_ids"], -1)
        np.testing.assert_array_equal(text[:, : want.shape[1]], want)
        assert (text[:, want.shape[1] :] == -1).all() and len(set(map(tuple, want))) == 2
    # What is trained: the answer with its end; and the token that begins it, where nothing was asked.
    said = [it.tokenizer.decode(np.asarray(batch.targets[r])[np.asarray(batch.weights[r]) > 0]) for r in range(len(it.made.examples))]
    assert said == {"blip-2": [" the moon\n", " no\n", " me\n", "<s>a moon, and on it me\n"],
                    "instructblip": [" the moon</s>", " no</s>", " me</s>"]}[name]


@pytest.mark.parametrize("name", NAMES)
def test_states_logits_loss_and_gradients(cases, torch, name):
    """Rows with one image, two and none, of different lengths."""
    it = cases[name]
    batch = it.batch([[e] for e in it.made.examples])
    labels = np.full(batch.tokens.shape, -100)
    labels[:, 1:] = np.where(batch.weights > 0, batch.targets, -100)[:, :-1]
    inputs = it.theirs(torch, batch)
    out = it.model(**inputs, labels=torch.tensor(labels), output_hidden_states=True)
    it.model.zero_grad()
    out.loss.backward()
    graph, real = ours.graph_of(it.cfg), np.asarray(batch.segments) > 0

    @jax.jit
    def run(params):
        model = merge(graph, params)
        o = model(batch)
        states = ours.decoder_states(model.decoder, model.embed(batch).x, batch)
        media = batch.media["image"]
        return model.inputs["image"].encoder(media).tokens, model.inputs["image"](media).tokens, states, o.hidden, o.hidden @ o.unembed

    seen, queries, states, hidden, logits = run(it.params)
    there = np.asarray(batch.media["image"].mask).reshape(-1)
    items = lambda x: x.reshape(len(there), -1, x.shape[-1])[there]
    close(items(seen), out.vision_outputs.last_hidden_state.detach())
    n = it.cfg.inputs["image"].connector.queries
    close(items(queries), it.model.language_projection(out.qformer_outputs.last_hidden_state[:, :n]).detach())
    theirs = out.language_model_outputs
    for k in range(it.cfg.decoder.depth):
        close(states[k][real], theirs.hidden_states[k].detach()[real])
    close(hidden[real], theirs.hidden_states[-1].detach()[real])
    close(logits[real], out.logits.detach()[real])
    p, q = (torch.log_softmax(torch.tensor(np.asarray(x))[real], -1) for x in (out.logits.detach(), logits))
    assert (p.exp() * (p - q)).sum(-1).abs().max() <= 1e-6
    loss = lambda params: NextToken().score(merge(graph, params)(batch), batch)["loss"].value
    value, gradients = jax.jit(jax.value_and_grad(loss))(it.params)
    close(value, out.loss.detach(), LOSS)
    check_gradients(it, it.cfg, gradients, least=50)
    if name == "blip-2":                # packed equals unpacked; of InstructBLIP in tests/train/test_packing.py, with gradients
        packed = it.batch([list(it.made.examples)])
        one = jax.jit(lambda params: merge(graph, params)(packed).hidden)(it.params)
        close(np.asarray(one)[np.asarray(packed.segments) > 0], np.asarray(hidden)[real], 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_of_32_tokens(cases, torch, name):
    """Prompts of different lengths, padded at the left."""
    it = cases[name]
    prompt = jax.tree.map(jnp.asarray, prompt_batch(it.made.examples, **it.common))
    graph, n, rows = ours.graph_of(it.cfg), 32, len(it.made.examples)
    keys = jax.random.split(jax.random.key(0), rows)
    made = jax.jit(lambda params: generate(graph, params, prompt, Sampling(max_new_tokens=n), jnp.zeros(0, jnp.int32), keys))(it.params)
    theirs = it.model.generate(**it.theirs(torch, prompt), max_new_tokens=n, do_sample=False)
    np.testing.assert_array_equal(made, theirs[:, -n:])
    assert len(np.unique(np.asarray(made))) > 10


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(cases, torch, tmp_path, name):
    """What is written is what was read, and transformers opens it and its processor."""
    from transformers import AutoProcessor

    it = cases[name]
    old = lambda t: t | {"qformer.embeddings.position_ids": np.arange(40)[None]}
    got, back = load(rewritten(it.folder, tmp_path / "old", change=old))
    assert differences(got, it.cfg, describe(it.folder)[0].free) == {}
    same(back, it.params)
    native = convert_folder(it.folder, tmp_path / "native")
    assert stored(convert_folder(native, tmp_path / "back", "hf")) == stored(it.folder)
    folder = export(it.params, it.cfg, tmp_path / "out", tokenizer=it.tokenizer, seq_len=192)
    assert stored(folder) == stored(it.folder)
    family, cfg = describe(folder)
    assert family.key == name and differences(cfg, it.cfg, family.free) == {}
    model = reopened(torch, type(it.model), folder)
    batch = it.batch([[e] for e in it.made.examples])
    inputs = it.theirs(torch, batch)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, it.model(**inputs).logits)
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    again = it.theirs(torch, batch, processor)
    assert again.keys() == inputs.keys() and all(torch.equal(again[k], v) for k, v in inputs.items())
    if name == "instructblip":
        assert cfg.inputs["image"].words.tokenizer == str(folder / "qformer_tokenizer")


def test_a_bias_of_keys_is_left_out_and_changes_nothing(cases, torch, tmp_path):
    it = cases["blip-2"]
    wide = it.cfg.inputs["image"].encoder.width
    change = lambda t: {k: np.concatenate([v[:wide], v[wide : 2 * wide] + 1, v[2 * wide :]]) if k.endswith("qkv.bias") else v for k, v in t.items()}
    same(load(rewritten(it.folder, tmp_path / "x", change=change))[1], it.params)
    other = reopened(torch, type(it.model), tmp_path / "x")
    pixels = torch.randn(1, 3, 32, 32)
    close(other.vision_model(pixels).last_hidden_state.detach(), it.model.vision_model(pixels).last_hidden_state.detach(), 1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_and_a_trained_projection_open_in_peft(cases, torch, tmp_path):
    """The queries are a parameter of the whole model, which PEFT does not save beside adapters inside it."""
    peft, it = pytest.importorskip("peft"), cases["instructblip"]
    from tests.hf.test_peft import adapted

    cfg, params, changed = adapted(it.folder, ("decoder/blocks/*/attn/*",), "inputs/image/connector/out")
    folder = save_adapter(params, cfg, tmp_path / "adapter", trained=changed, base=str(it.folder))
    merged = export(params, cfg, tmp_path / "merged", tokenizer=it.tokenizer, seq_len=192)
    inputs = it.theirs(torch, it.batch([[e] for e in it.made.examples]))
    opened = peft.PeftModel.from_pretrained(reopened(torch, type(it.model), it.folder), folder).eval()
    with torch.no_grad():
        want = reopened(torch, type(it.model), merged)(**inputs).logits
        close(opened(**inputs).logits, want)
        assert (want - it.model(**inputs).logits).abs().max() > 0.1
    with pytest.raises(ConfigError, match="query_tokens was trained besides the adapters"):
        save_adapter(params, cfg, tmp_path / "no", trained={"inputs/image/connector/former/queries"})


def test_retrieval(torch, tmp_path):
    """Cosines, the answers of the matching head, and their gradients; there and back."""
    from tests.hf import tiny, tiny_blip

    made = tiny_blip.retrieval()
    folder = tiny_blip.save(made, tmp_path / "x")
    cfg, params = load(folder)
    tokenizer = load_tokenizer(str(folder), media=())
    captions = ["The moon on earth.", "who, me?", "on"]
    files = tiny.images(3)
    texts = made.processor.tokenizer(captions, padding=True, return_tensors="pt")
    pixels = tiny.pixel_values(made.processor.image_processor, files)
    both = {"input_ids": texts.input_ids, "attention_mask": texts.attention_mask, "pixel_values": pixels}
    cosines, matching = made.model(**both), made.model(**both, use_image_text_matching_head=True)
    pull = torch.randn(matching.logits_per_image.shape)
    made.model.zero_grad()
    (torch.diagonal(cosines.logits_per_image).sum() + (matching.logits_per_image * pull).sum()).backward()

    tower, lengths = cfg.inputs["image"], texts.attention_mask.sum(1).tolist()
    media = ours.media([[f] for f in files], tower.view, tower.patch, np.full(texts.input_ids.shape, -1))
    graph, batch = ours.graph_of(cfg), ours.batch(texts.input_ids.numpy(), lengths, media)
    check_pixels(media.values[:, 0], pixels, tower.encoder)

    def run(params):
        out = merge(graph, params)(batch)
        alike = out.scale * jnp.max(jnp.einsum("bnd,cd->bcn", out.embeds["image"], out.embeds["text"]), axis=-1)
        return jnp.trace(alike) + jnp.sum(out.pairs.logits[:, 0] * pull.numpy()), (out, alike)

    (_, (out, alike)), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    close(out.embeds["image"], cosines.image_embeds.detach())
    close(out.embeds["text"], cosines.text_embeds.detach())
    close(alike, cosines.logits_per_image.detach())
    close(out.pairs.logits[:, 0], matching.logits_per_image.detach())
    check_gradients(Case("", made, folder, cfg, params, tokenizer), cfg, gradients, least=50)

    back = export(params, cfg, tmp_path / "out", tokenizer=tokenizer)
    assert stored(back) == stored(folder) == stored(convert_folder(convert_folder(folder, tmp_path / "native"), tmp_path / "hf", "hf"))
    family, again = describe(back)
    assert family.key == "blip-2-retrieval" and differences(again, cfg, family.free) == {}
    with torch.no_grad():
        assert torch.equal(reopened(torch, type(made.model), back)(**both).logits_per_image, cosines.logits_per_image)
    # Where InstructBLIP starts from: the tower, and the Q-Former with its words.
    image = cfg.inputs["image"]
    for at, part in (("inputs/image/encoder/", image.encoder), ("inputs/image/connector/former/", image.connector.former)):
        want = {k.removeprefix(at): v for k, v in params.items() if k.startswith(at)}
        same(load_subtree(folder, part, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in want.items()}), want)
    # A first stage that can write captions has more than transformers keeps.
    with pytest.raises(ConfigError, match="blip-2 has no place for|cannot express captions=True"):
        export(params, replace(cfg, captions=True), tmp_path / "no", tokenizer=tokenizer)


def test_a_q_former_starts_from_bert(torch, tmp_path):
    """The hidden states of BERT; and a Q-Former with its layers for text, whose queries are fresh."""
    from transformers import BertConfig, BertModel

    from tests.hf import tiny

    made = BertModel(BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=36,
                                max_position_embeddings=20, pad_token_id=None), add_pooling_layer=True).eval()
    tiny.randomize(made)
    made.embeddings.token_type_embeddings.weight.data.zero_()       # which BLIP-2 leaves out
    made.save_pretrained(tmp_path / "x")
    lengths, tokens = [9, 6], np.random.default_rng(0).integers(0, 40, (2, 9))
    real = np.arange(9) < np.array(lengths)[:, None]
    want = made(torch.tensor(tokens), attention_mask=torch.tensor(real.astype(int))).last_hidden_state.detach()
    cfg, params = load(tmp_path / "x")
    text = alone(ours.batch(tokens, lengths))
    close(jax.jit(lambda p: merge(ours.graph_of(cfg), p)(None, text))(params)[real], want[real])

    wide = replace(cfg, tokens=17, queries=4, every=2, words=replace(cfg.words, vocab=41))
    fresh = split(wide.build(8, 12, rngs=nnx.Rngs(0)).former)[1]
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in fresh.items()}
    old = lambda k: "bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    found = load_subtree(rewritten(tmp_path / "x", tmp_path / "old", old), wide, shapes)
    assert fresh.keys() - found.keys() == {k for k in fresh if k == "queries" or "cross" in k or "/mlp/" in k or "norm2" in k}
    np.testing.assert_array_equal(found["embedding/table"][:40], params["embedding/table"])
    for layer in range(3):
        for path in ("attn/q/kernel", "text_mlp/down/bias", "text_norm/scale", "norm1/bias"):
            np.testing.assert_array_equal(found[f"blocks/{layer % 2}/{path}"][layer // 2], params[f"blocks/0/{path}"][layer])


@pytest.mark.parametrize(("name", "where", "change", "match"), [
    ("blip-2", "text_config", {"model_type": "t5"}, "blip-2 with the language model t5 is not supported; supported is opt"),
    ("blip-2", "qformer_config", {"use_qformer_text_input": True}, "layers for text that its language model never reads"),
    ("blip-2", "text_config", {"word_embed_proj_dim": 16}, "opt with word_embed_proj_dim=16 is not supported; supported is 32"),
    ("instructblip", "text_config", {"model_type": "t5"}, "instructblip with the language model t5 is not supported; supported is llama"),
])
def test_what_is_not_supported_is_refused(cases, tmp_path, name, where, change, match):
    with pytest.raises(ConfigError, match=match):
        load(rewritten(cases[name].folder, tmp_path / "x", config=lambda c: c | {where: c[where] | change}))
