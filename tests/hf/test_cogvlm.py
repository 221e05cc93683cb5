"""CogVLM from pictures and words to tokens, gradients and files, against its restatement in torch."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.batch import collate, decode_items, prompt_batch
from mllm_jax.data.pack import one_row, row_spec
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.encoders.vit import CLIP_MEAN, CLIP_STD
from mllm_jax.generate import Sampling, generate
from mllm_jax.hf.convert import convert_folder
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.load import load, load_subtree
from mllm_jax.nn.param import merge
from mllm_jax.objectives import NextToken
from mllm_jax.types import Blob, Example, Part, Turn
from tests.golden.official import read
from tests.hf import ours
from tests.hf.test_convert import stored
from tests.hf.test_load import rewritten, same, wanted
from tests.hf.test_parity import LOSS, check_gradients, check_pixels, close


@dataclass
class Case:
    folder: Path
    model: Any                          # of torch
    cfg: Any
    params: dict
    graph: Any
    common: dict                        # template, tokenizer, towers
    examples: tuple[Example, ...]

    def theirs(self, torch, batch, rows: list[int]) -> tuple:
        """(ids, types of tokens, pixels) of these rows of a batch, as the reference wants them."""
        from PIL import Image

        types = (np.asarray(batch.media["image"].slot)[rows] >= 0).astype(int)
        squashed = lambda blob: Image.open(io.BytesIO(blob.data)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        pictures = [(np.asarray(squashed(b), np.float32) / 255 - CLIP_MEAN) / CLIP_STD for r in rows for b in self.examples[r].media]
        pixels = torch.tensor(np.stack(pictures).transpose(0, 3, 1, 2)).float() if pictures else torch.zeros(0)
        return torch.tensor(np.asarray(batch.tokens)[rows]).long(), torch.tensor(types), pixels


@pytest.fixture(scope="module")
def case(torch, tmp_path_factory):
    from tests.hf import cogvlm_torch, tiny

    folder = tmp_path_factory.mktemp("cogvlm") / "hf"
    model = cogvlm_torch.save(folder)
    cfg, params = load(folder)
    files = tiny.images(3)
    blob = lambda i: Blob(kind="image", data=files[i])
    text = lambda role, *parts: Turn(role=role, parts=tuple(Part(text=p) if isinstance(p, str) else Part(kind="image", media=p) for p in parts))
    examples = (
        Example(id="two", turns=(text("user", 0, "what and ", 1, "how?"), text("assistant", "so.")), media=(blob(0), blob(1))),
        Example(id="one", turns=(text("user", 0, "where?"), text("assistant", "there, on the mat.")), media=(blob(2),)),
        Example(id="none", turns=(text("user", "who?"), text("assistant", "me"))),
    )
    common = {"template": "base", "tokenizer": load_tokenizer("bytes"), "towers": cfg.inputs}
    return Case(folder, model, cfg, params, ours.graph_of(cfg), common, examples)


@pytest.fixture(scope="module")
def batch(case):
    sequences = [encode(e, **case.common) for e in case.examples]
    spec = row_spec(max(map(len, sequences)) + 2, {"image": 2}, case.cfg.inputs, 0)
    rows = [one_row(s, spec) for s in sequences]
    return jax.tree.map(jnp.asarray, collate(rows, [decode_items(row.media, case.cfg.inputs, exact=True) for row in rows], spec))


def test_the_reference_is_the_published_code(torch):
    """Names of all weights, logits, loss, gradients, positions and who reads them: tests/golden/make_cogvlm.py."""
    from tests.hf import cogvlm_torch

    io, weights, grads = read("cogvlm")
    small = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 24}
    eyes = {"hidden_size": 12, "intermediate_size": 18, "image_size": 16, "num_positions": 5}
    model = cogvlm_torch.CogVLM(cogvlm_torch.CONFIG | small | {"vision_config": cogvlm_torch.CONFIG["vision_config"] | eyes})
    model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
    given = {k: torch.tensor(v) for k, v in io.items()}
    logits = model(given["ids"], given["types"], given["images"])[1]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())
    loss.backward()
    close(logits.detach(), io["logits"], 1e-5)
    close(loss.detach(), io["loss"], 1e-5)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, grads[name], atol=1e-5 * np.abs(grads[name]).max() + 1e-7, err_msg=name)
    np.testing.assert_array_equal(cogvlm_torch.positions(given["types"]), io["positions"])
    np.testing.assert_array_equal(cogvlm_torch.expert(given["types"]), io["expert"])


def test_positions_and_experts_are_those_of_the_reference(case, torch, batch):
    from tests.hf import cogvlm_torch

    _, types, pixels = case.theirs(torch, batch, [0, 1, 2])
    real = np.asarray(batch.segments) > 0
    np.testing.assert_array_equal(np.asarray(batch.positions[..., 0])[real], cogvlm_torch.positions(types).numpy()[real])
    np.testing.assert_array_equal(np.asarray(batch.kinds) == 1, cogvlm_torch.expert(types))
    # <s>, the vector before, 16 patches at one place, the vector behind, text
    np.testing.assert_array_equal(batch.positions[1, :21, 0], [0, 1, *[2] * 16, 3, 4, 5])
    media = batch.media["image"]
    check_pixels(media.values.reshape(-1, *media.values.shape[2:])[np.asarray(media.mask).reshape(-1)], pixels, case.cfg.inputs["image"].encoder)


def test_states_logits_loss_and_gradients(case, torch, batch):
    """Rows with two images, one and none, of different shapes and lengths."""
    real = np.asarray(batch.segments) > 0
    states, logits = case.model(*case.theirs(torch, batch, [0, 1, 2]))
    weights = torch.tensor(np.asarray(batch.weights))
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.tensor(np.asarray(batch.targets)).long(), reduction="none")
    loss = (each * weights).sum() / weights.sum()
    case.model.zero_grad()
    loss.backward()

    @jax.jit
    def run(params):
        model = merge(case.graph, params)
        o, states = model(batch), ours.decoder_states(model.decoder, model.embed(batch).x, batch)
        return model.inputs["image"](batch.media["image"]).tokens, states, o.hidden @ o.unembed

    features, mine, got = run(case.params)
    two = case.model.model.vision(case.theirs(torch, batch, [0])[2]).detach()
    close(features[0], torch.cat([*two[:, 1:-1], two[0, [0, -1]]]))
    for a, b in zip(mine, states, strict=True):
        close(a[real], b.detach()[real])
    close(got[real], logits.detach()[real])
    p, q = (torch.log_softmax(torch.tensor(np.asarray(x))[real], -1) for x in (logits.detach(), got))
    assert (p.exp() * (p - q)).sum(-1).abs().max() <= 1e-6
    score = lambda params: NextToken().score(merge(case.graph, params)(batch), batch)["loss"].value
    value, gradients = jax.jit(jax.value_and_grad(score))(case.params)
    close(value, loss.detach(), LOSS)
    check_gradients(SimpleNamespace(folder=case.folder, model=case.model), case.cfg, gradients, least=60)


def test_greedy_answers_of_32_tokens(case, torch):
    """Prompts of different lengths in one batch; a step of the answer reads the weights of text alone."""
    prompt = jax.tree.map(jnp.asarray, prompt_batch(case.examples, seq_len=None, **case.common))
    keys = jax.random.split(jax.random.key(0), 3)
    made = jax.jit(lambda p: generate(case.graph, p, prompt, Sampling(max_new_tokens=32), jnp.zeros(0, jnp.int32), keys))(case.params)
    for r in range(3):
        ids, types, pixels = case.theirs(torch, prompt, [r])
        start = int((np.asarray(prompt.segments[r]) == 0).sum())
        with torch.no_grad():
            assert case.model.answer(ids[:, start:], types[:, start:], pixels, 32) == made[r].tolist()
    assert len(np.unique(np.asarray(made))) > 10


def test_there_and_back(case, tmp_path):
    native = convert_folder(case.folder, tmp_path / "native")
    back = stored(convert_folder(native, tmp_path / "back", "hf"))
    buffer = {k: v for k, v in stored(case.folder).items() if "inv_freq" not in k}
    assert back == buffer
    folder = export(case.params, case.cfg, tmp_path / "out", tokenizer=case.common["tokenizer"], seq_len=512)
    assert stored(folder) == buffer
    assert describe(folder)[0].model_type == "cogvlm" and describe(folder)[1] == case.cfg
    same(load(folder)[1], case.params)


def test_it_starts_from_a_language_model_whose_weights_are_those_of_text(case, saved, torch, tmp_path):
    """On text alone the model is that language model, to the last bit."""
    it = saved("llama")
    plain, weights = load(it.folder)
    grown = replace(plain, cycle=case.cfg.decoder.cycle)
    given = load_subtree(it.folder, grown, wanted(grown))
    assert {k for k in wanted(grown) if k not in given} == {k for k in wanted(grown) if "/expert/" in k}
    same(given, weights)
    batch = ours.batch(np.random.default_rng(0).integers(0, 90, (2, 12)), [12, 7])
    logits = lambda cfg, params: merge(g := ours.graph_of(cfg), params)(merge(g, params).embed(batch.tokens), batch)[0]
    rest = {k: jnp.full(v.shape, 7.0) for k, v in wanted(grown).items() if k not in given}
    np.testing.assert_array_equal(logits(grown, given | rest), logits(plain, weights))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_multi_query_heads": 2}, "CogVLM2, which is not supported"),
        ({"vision_config": {"num_positions": 257}}, "num_positions=257 for 4x4 patches and a class token; it must be 17"),
        ({"architectures": []}, "has no model_type"),
    ],
)
def test_what_is_not_supported_is_refused(case, tmp_path, change, match):
    new = lambda c: c | {k: c[k] | v if isinstance(v, dict) else v for k, v in change.items()}
    with pytest.raises(ConfigError, match=match):
        load(rewritten(case.folder, tmp_path / "x", config=new))
