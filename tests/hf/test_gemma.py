"""PaliGemma and Gemma 3 from pictures and words to tokens, gradients and files, each against transformers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.batch import collate, decode_items, prompt_batch
from mllm_jax.data.pack import one_row, pack, row_spec
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.generate import Sampling, generate
from mllm_jax.hf.convert import convert_folder
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.load import load
from mllm_jax.nn.param import merge
from mllm_jax.objectives import NextToken
from mllm_jax.types import Batch
from tests.hf import ours
from tests.hf.test_convert import stored
from tests.hf.test_export import reopened
from tests.hf.test_load import LAYOUTS, rewritten, same
from tests.hf.test_parity import LOSS, check_gradients, check_pixels, close

NAMES = ("paligemma", "gemma3")


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

    def theirs(self, torch, examples: list, length: int) -> dict:
        """What the processor makes of each, in rows of this length."""
        rows = [call(self.made, e) for e in examples]
        fill = {"input_ids": 0, "attention_mask": 0, "token_type_ids": int(self.name == "paligemma"), "labels": -100}
        arrays = {k: [np.pad(row[k], (0, length - len(row[k])), constant_values=v) for row in rows] for k, v in fill.items() if k in rows[0]}
        pixels = [p for row in rows for p in row["pixel_values"]]
        return {k: torch.tensor(np.stack(v)) for k, v in arrays.items()} | {"pixel_values": torch.tensor(np.stack(pixels))}


def call(made, example) -> dict:
    """One row of the processor, as lists; PaliGemma's wants an image, so that a text alone is written by hand."""
    if example.media or made.template == "gemma":
        out = made.call(example)
        return {k: np.asarray(v if k == "pixel_values" else v[0]) for k, v in out.items()} | ({} if example.media else {"pixel_values": []})
    words = made.processor.tokenizer
    asked, answer = ("".join(p.text for p in t.parts) for t in example.turns)
    parts = [words(text, add_special_tokens=False)["input_ids"] for text in (f"<bos>{asked}\n", f"{answer}<eos>")]
    ids = np.concatenate(parts)
    kinds = np.repeat([0, 1], [len(p) for p in parts])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": kinds,
            "labels": np.where(kinds, ids, -100), "pixel_values": []}


@pytest.fixture(scope="module")
def cases(torch, tmp_path_factory):
    from tests.hf import tiny_gemma

    out = {}
    for name in NAMES:
        made = tiny_gemma.MODELS[name]()
        folder = tiny_gemma.save(made, tmp_path_factory.mktemp("gemma") / name)
        cfg, params = load(folder)
        out[name] = Case(name, made, folder, cfg, params, load_tokenizer(str(folder)))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_pixels_and_ids_are_those_of_the_processor(cases, torch, name):
    it = cases[name]
    examples = it.made.examples
    batch = it.batch([[e] for e in examples])
    inputs = it.theirs(torch, examples, batch.tokens.shape[1])
    np.testing.assert_array_equal(batch.tokens, inputs["input_ids"])
    np.testing.assert_array_equal(batch.segments, inputs["attention_mask"])
    media = batch.media["image"]
    assert media.mask.sum() == 3
    check_pixels(media.values.reshape(-1, *media.values.shape[2:])[np.asarray(media.mask).reshape(-1)], inputs["pixel_values"],
                 it.cfg.inputs["image"].encoder)
    if name == "paligemma":             # the answer and its end are trained
        want = inputs["labels"].numpy()[:, 1:]
        np.testing.assert_array_equal(np.where(batch.weights > 0, batch.targets, -100)[:, :-1], want)
        assert "<loc0012>" in it.tokenizer.convert_ids_to_tokens(np.asarray(batch.tokens[1]))


def test_the_text_of_gemma_is_the_published_one(cases):
    from mllm_jax.data.templates import Template
    from mllm_jax.types import Part, Turn

    words = cases["gemma3"].tokenizer
    text = lambda role, *parts: Turn(role=role, parts=tuple(Part(text=p) if p else Part(kind="image", media=0) for p in parts))
    turns = [text("system", "Be kind."), text("user", "", " who <end_of_turn>? "), text("assistant", "me "), text("user", "sure")]
    ids, weights = Template("gemma", words).turns(turns, prompt=True)
    assert words.decode(ids) == (
        "<bos><start_of_turn>user\nBe kind.\n\n\n\n<start_of_image><image_soft_token><end_of_image>\n\nwho <end_of_turn>?<end_of_turn>\n"
        "<start_of_turn>model\nme<end_of_turn>\n<start_of_turn>user\nsure<end_of_turn>\n<start_of_turn>model\n")
    assert not weights.any() and list(ids).count(words.convert_tokens_to_ids("<end_of_turn>")) == 3     # what was typed is letters
    assert words.convert_tokens_to_ids("\n\n\n\n") in ids                                   # text is tokenized with what an image brings
    ids, weights = Template("gemma", words).turns(turns[1:3])
    assert words.decode(ids[weights > 0]) == "me<end_of_turn>"
    assert Template("gemma", words).stops == (words.eos_token_id, words.convert_tokens_to_ids("<end_of_turn>"))


@pytest.mark.parametrize("name", NAMES)
def test_states_logits_loss_and_gradients(cases, torch, name):
    """A row with an image, one with two, one with none, of different lengths; images longer than the window."""
    it = cases[name]
    examples = it.made.examples
    batch = it.batch([[e] for e in examples])
    inputs = it.theirs(torch, examples, batch.tokens.shape[1])
    labels = np.full(batch.tokens.shape, -100)
    labels[:, 1:] = np.where(batch.weights > 0, batch.targets, -100)[:, :-1]
    inputs["labels"] = torch.tensor(labels)
    out = it.model(**inputs, output_hidden_states=True)
    it.model.zero_grad()
    out.loss.backward()
    graph, real = ours.graph_of(it.cfg), np.asarray(batch.segments) > 0

    @jax.jit
    def run(params):
        model = merge(graph, params)
        o = model(batch)
        states = ours.decoder_states(model.decoder, model.embed(batch).x, batch)
        return model.inputs["image"](batch.media["image"]).tokens, states, o.hidden, o.hidden @ o.unembed

    features, states, hidden, logits = run(it.params)
    theirs = it.model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    n = theirs.shape[1]
    close(features.reshape(-1, n, features.shape[-1])[np.asarray(batch.media["image"].mask).reshape(-1)], theirs.detach())
    for k in range(it.cfg.decoder.depth):
        close(states[k][real], out.hidden_states[k].detach()[real])
    close(hidden[real], out.hidden_states[-1].detach()[real])
    close(logits[real], out.logits.detach()[real])
    p, q = (torch.log_softmax(torch.tensor(np.asarray(x))[real], -1) for x in (out.logits.detach(), logits))
    assert (p.exp() * (p - q)).sum(-1).abs().max() <= 1e-6
    loss = lambda params: NextToken().score(merge(graph, params)(batch), batch)["loss"].value
    value, gradients = jax.jit(jax.value_and_grad(loss))(it.params)
    close(value, out.loss.detach(), LOSS)
    check_gradients(it, it.cfg, gradients, least=50)
    # Packed equals unpacked: windows and spans end with the example.
    packed = it.batch([examples])
    one = jax.jit(lambda params: merge(graph, params)(packed).hidden)(it.params)
    close(np.asarray(one)[np.asarray(packed.segments) > 0], np.asarray(hidden)[real], 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_of_32_tokens(cases, torch, name):
    """Prompts of different lengths; cached equals transformers, and equals the whole row at once."""
    it = cases[name]
    prompt = jax.tree.map(jnp.asarray, prompt_batch(it.made.examples, seq_len=None, **it.common))
    graph, n = ours.graph_of(it.cfg), 32
    keys = jax.random.split(jax.random.key(0), 3)
    made = jax.jit(lambda params: generate(graph, params, prompt, Sampling(max_new_tokens=n), jnp.zeros(0, jnp.int32), keys))(it.params)
    pixels = [p for e in it.made.examples for p in call(it.made, e)["pixel_values"]]
    image = np.asarray(prompt.media["image"].slot) >= 0
    kinds = {"gemma3": image, "paligemma": np.zeros_like(image)}[name]
    inputs = {"input_ids": prompt.tokens, "attention_mask": prompt.segments, "token_type_ids": kinds.astype(int)}
    theirs = it.model.generate(**{k: torch.tensor(np.asarray(v)) for k, v in inputs.items()}, pixel_values=torch.tensor(np.stack(pixels)),
                               max_new_tokens=n, do_sample=False)
    np.testing.assert_array_equal(made, theirs[:, -n:])
    assert len(np.unique(np.asarray(made))) > 10

    s = prompt.tokens.shape[1]
    grow = lambda x, new: jnp.concatenate([x, jnp.broadcast_to(new, (3, n, *x.shape[2:])).astype(x.dtype)], axis=1)
    at = prompt.positions[:, -1:] + 1 + jnp.arange(n)[None, :, None]
    media = {"image": replace(prompt.media["image"], slot=grow(prompt.media["image"].slot, -1))}
    whole = replace(
        prompt, tokens=grow(prompt.tokens, made), targets=grow(prompt.targets, 0), weights=grow(prompt.weights, 0.0),
        segments=grow(prompt.segments, 1), positions=grow(prompt.positions, at), kinds=grow(prompt.kinds, 0),
        blocks=grow(prompt.blocks, s + jnp.arange(n)), media=media)
    o = jax.jit(lambda params: merge(graph, params)(whole))(it.params)
    np.testing.assert_array_equal(jnp.argmax(o.hidden @ o.unembed, -1)[:, s - 1 : -1], made)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(cases, torch, tmp_path, name):
    """Every layout of keys is read; what is written is what was read, and transformers opens it and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    it = cases[name]
    for layout, rename in LAYOUTS.items():
        got, back = load(rewritten(it.folder, tmp_path / layout, rename))
        assert got == it.cfg
        same(back, it.params)
    native = convert_folder(it.folder, tmp_path / "native")
    assert stored(convert_folder(native, tmp_path / "back", "hf")) == stored(it.folder)
    folder = export(it.params, it.cfg, tmp_path / "out", tokenizer=it.tokenizer, seq_len=512)
    assert stored(folder) == stored(it.folder)
    assert describe(folder)[0].model_type == name and describe(folder)[1] == it.cfg
    model = reopened(torch, AutoModelForImageTextToText, folder, attn_implementation="eager")
    assert type(model) is type(it.model)
    inputs = it.theirs(torch, it.made.examples, 180)
    inputs.pop("labels", None)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, it.model(**inputs).logits)
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    again = it.theirs(torch, it.made.examples, 180)
    made, it.made = it.made, replace(it.made, processor=processor)
    assert all(torch.equal(again[k], v) for k, v in it.theirs(torch, it.made.examples, 180).items())
    it.made = made


@pytest.mark.parametrize(
    ("name", "where", "change", "match"),
    [
        ("paligemma", "text_config", {"model_type": "gemma2"}, "paligemma with the language model gemma2 is not supported"),
        ("paligemma", "vision_config", {"model_type": "clip_vision_model"}, "paligemma with the tower clip_vision_model is not"),
        ("gemma3", "text_config", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ("gemma3", "", {"mm_tokens_per_image": 9}, "8x8 patches do not divide into 3x3 tokens"),
        ("gemma3", "text_config", {"layer_types": ["sliding_attention"] * 9 + ["full_attention"] * 3, "num_hidden_layers": 12},
         "12 layers repeat after 12"),
    ],
)
def test_what_is_not_supported_is_refused(cases, tmp_path, name, where, change, match):
    config = lambda c: c | ({where: c[where] | change} if where else change)
    with pytest.raises(ConfigError, match=match):
        load(rewritten(cases[name].folder, tmp_path / "x", config=config))
