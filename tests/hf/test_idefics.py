"""Idefics from documents of pictures and words to tokens, gradients and files, each against transformers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.data.batch import prompt_batch
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.generate import Sampling, generate
from mllm_jax.hf.convert import convert_folder
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.family import CannotExpress
from mllm_jax.hf.load import load
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.param import merge
from mllm_jax.objectives import NextToken
from mllm_jax.types import Batch, Part, Turn
from tests.hf import ours
from tests.hf.test_convert import stored
from tests.hf.test_export import reopened
from tests.hf.test_gemma import Case
from tests.hf.test_load import rewritten, same
from tests.hf.test_parity import LOSS, check_gradients, check_pixels, close

NAMES = ("resampled", "plain")


class Documents(Case):
    def theirs(self, torch, examples: list, length: int, **options) -> dict:
        """What the processor makes of each, in rows of this length, padded at the end."""
        rows = [self.made.call(e, **options) for e in examples]
        most = max(row["pixel_values"].shape[1] for row in rows)
        sizes = {"input_ids": length, "attention_mask": length, "image_attention_mask": (length, most), "pixel_values": (most, 3, 32, 32)}

        def grown(x, to):
            x = np.asarray(x)[0]
            return np.pad(x, [(0, n - m) for n, m in zip((to,) if isinstance(to, int) else to, x.shape)])

        return {k: torch.tensor(np.stack([grown(row[k], to) for row in rows])) for k, to in sizes.items()}


@pytest.fixture(scope="module")
def cases(torch, tmp_path_factory):
    from tests.hf import tiny_idefics

    out = {}
    for name in NAMES:
        made = tiny_idefics.make(name, tmp_path_factory.mktemp("tokenizer"))
        folder = tiny_idefics.save(made, tmp_path_factory.mktemp("idefics") / name)
        cfg, params = load(folder)
        out[name] = Documents(name, made, folder, cfg, params, load_tokenizer(str(folder)))
    return out


def test_pixels_ids_and_what_sees_what_are_those_of_the_processor(cases, torch):
    """Text before the first image, neighbours, an image alone, and none."""
    it = cases["resampled"]
    examples = it.made.examples
    batch = it.batch([[e] for e in examples])
    inputs = it.theirs(torch, examples, batch.tokens.shape[1])
    np.testing.assert_array_equal(batch.tokens, inputs["input_ids"])
    np.testing.assert_array_equal(batch.segments, inputs["attention_mask"])
    media, mask = batch.media["image"], inputs["image_attention_mask"].numpy()
    real = np.asarray(batch.segments) > 0
    np.testing.assert_array_equal(np.asarray(media.slot)[real], np.where(mask.any(-1), mask.argmax(-1), -1)[real])
    assert set(np.asarray(media.slot)[0][real[0]]) == {-1, 0, 1, 2} and not media.mask[2].any()
    there = np.asarray(media.mask).reshape(-1)
    pixels = inputs["pixel_values"].flatten(0, 1)[torch.tensor(there)]
    check_pixels(media.values.reshape(-1, *media.values.shape[2:])[there], pixels, it.cfg.inputs["image"].encoder)
    # A document is trained whole, its end too; no image is predicted.
    image = it.tokenizer.convert_tokens_to_ids("<image>")
    np.testing.assert_array_equal(batch.weights[0] > 0, real[0] & (batch.targets[0] != image) & (batch.tokens[0] != it.tokenizer.eos_token_id))


def test_the_words_of_a_conversation_are_those_of_the_instructed_model(cases):
    words = cases["plain"].tokenizer
    text = lambda role, *parts: Turn(role=role, parts=tuple(Part(text=p) if p else Part(kind="image", media=0) for p in parts))
    turns = [text("user", "What is in this image? ", ""), text("assistant", "Idefix."), text("user", "", "And who is that?")]
    template = Template("idefics_instruct", words)
    ids, _ = template.turns(turns, prompt=True)
    assert words.decode(ids) == (
        "<s>User: What is in this image?<fake_token_around_image><image><fake_token_around_image><end_of_utterance>\n"
        "Assistant: Idefix.<end_of_utterance>\n"
        "User:<fake_token_around_image><image><fake_token_around_image>And who is that?<end_of_utterance>\nAssistant:")
    ids, weights = template.turns(turns[:2])
    assert words.decode(ids[weights > 0]) == " Idefix.<end_of_utterance>"
    assert template.stops == (words.eos_token_id, words.convert_tokens_to_ids("<end_of_utterance>"))


@pytest.mark.parametrize("name", NAMES)
def test_states_logits_loss_and_gradients(cases, torch, name):
    it = cases[name]
    examples = it.made.examples
    batch = it.batch([[e] for e in examples])
    inputs = it.theirs(torch, examples, batch.tokens.shape[1])
    out = it.model(**inputs, output_hidden_states=True)
    # Its own loss takes the logits of added tokens for those of the next position.
    labels = torch.tensor(np.where(np.asarray(batch.weights) > 0, batch.targets, -100)).long()
    theirs_loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    it.model.zero_grad()
    theirs_loss.backward()
    graph, real = ours.graph_of(it.cfg), np.asarray(batch.segments) > 0

    @jax.jit
    def run(params):
        model = merge(graph, params)
        o, enter = model(batch), model.embed(batch)
        return enter, ours.decoder_states(model.decoder, enter.x, batch, enter.memory), o.hidden, o.hidden @ o.unembed

    enter, states, hidden, logits = run(it.params)
    there = np.asarray(batch.media["image"].mask)
    seen = out.image_hidden_states.detach()
    close(enter.memory.tokens.reshape(seen.shape)[there], seen[torch.tensor(there)])
    assert enter.memory.tokens.shape[1] == 3 * (5 if name == "resampled" else 17)
    for k in range(1, it.cfg.decoder.depth):        # theirs are taken behind the gated layers
        close(states[k][real], out.hidden_states[k].detach()[real])
    close(hidden[real], out.hidden_states[-1].detach()[real])
    close(logits[real], out.logits.detach()[real])
    p, q = (torch.log_softmax(torch.tensor(np.asarray(x))[real], -1) for x in (out.logits.detach(), logits))
    assert (p.exp() * (p - q)).sum(-1).abs().max() <= 1e-6
    loss = lambda params: NextToken().score(merge(graph, params)(batch), batch)["loss"].value
    value, gradients = jax.jit(jax.value_and_grad(loss))(it.params)
    close(value, theirs_loss.detach(), LOSS)
    check_gradients(it, it.cfg, gradients, least=50)
    # A batch of text alone needs no media; packed equals unpacked.
    only = jax.tree.map(lambda x: x[2:], replace(batch, media={}))
    close(np.asarray(jax.jit(lambda params: merge(graph, params)(only).hidden)(it.params))[real[2:]], np.asarray(hidden)[2][real[2]], 2e-5)
    packed = it.batch([examples])
    one = jax.jit(lambda params: merge(graph, params)(packed).hidden)(it.params)
    close(np.asarray(one)[np.asarray(packed.segments) > 0], np.asarray(hidden)[real], 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_of_32_tokens(cases, torch, name):
    """Prompts of different lengths; cached equals transformers, and equals the whole row at once."""
    it = cases[name]
    examples = [replace(e, turns=(replace(e.turns[0], role="user"),)) for e in it.made.examples]
    prompt = jax.tree.map(jnp.asarray, prompt_batch(examples, seq_len=None, **it.common))
    graph, n = ours.graph_of(it.cfg), 32
    keys = jax.random.split(jax.random.key(0), 3)
    made = jax.jit(lambda params: generate(graph, params, prompt, Sampling(max_new_tokens=n), jnp.zeros(0, jnp.int32), keys))(it.params)
    rows = it.theirs(torch, examples, prompt.tokens.shape[1])
    lengths = rows["attention_mask"].sum(1)
    left = {k: torch.stack([x.roll(-int(m), 0) for x, m in zip(v, lengths)]) if k != "pixel_values" else v for k, v in rows.items()}
    np.testing.assert_array_equal(prompt.tokens, left["input_ids"])
    theirs = it.model.generate(**left, max_new_tokens=n, do_sample=False)
    np.testing.assert_array_equal(made, theirs[:, -n:])
    assert len(np.unique(np.asarray(made))) > 10

    grow = lambda x, new: jnp.concatenate([x, jnp.broadcast_to(new, (3, n, *x.shape[2:])).astype(x.dtype)], axis=1)
    at = prompt.positions[:, -1:] + 1 + jnp.arange(n)[None, :, None]
    media = prompt.media["image"]
    whole = Batch(
        tokens=grow(prompt.tokens, made), targets=grow(prompt.targets, 0), weights=grow(prompt.weights, 0.0), segments=grow(prompt.segments, 1),
        positions=grow(prompt.positions, at), kinds=grow(prompt.kinds, 0), media={"image": replace(media, slot=grow(media.slot, media.slot[:, -1:]))})
    o = jax.jit(lambda params: merge(graph, params)(whole))(it.params)
    np.testing.assert_array_equal(jnp.argmax(o.hidden @ o.unembed, -1)[:, prompt.tokens.shape[1] - 1 : -1], made)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(cases, torch, tmp_path, name):
    """What is written is what was read, and transformers opens it and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    it = cases[name]
    native = convert_folder(it.folder, tmp_path / "native")
    assert stored(convert_folder(native, tmp_path / "back", "hf")) == stored(it.folder)
    same(load(native)[1], it.params)
    folder = export(it.params, it.cfg, tmp_path / "out", tokenizer=it.tokenizer, seq_len=256)
    assert stored(folder) == stored(it.folder)
    assert describe(folder)[0].model_type == "idefics" and describe(folder)[1] == it.cfg
    model = reopened(torch, AutoModelForImageTextToText, folder, attn_implementation="eager")
    assert type(model) is type(it.model)
    inputs = it.theirs(torch, it.made.examples, 80)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, it.model(**inputs).logits)
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    files = list(it.made.examples[1].media)
    from tests.hf.tiny_gemma import pictures

    again = processor(text=[*pictures(it.made.examples[1]), "a moon"], add_eos_token=True)
    assert len(files) == 1 and all(torch.equal(again[k], v) for k, v in it.made.call(it.made.examples[1]).items())


def test_the_files_of_the_hub_are_read(cases, tmp_path):
    """Of 2023: position ids and frequencies are stored, and the head of a tied model too; the processor says `image_size`."""
    it = cases["plain"]
    frequencies = [f"model.{layer}.rotary_emb.inv_freq" for layer in ("layers.0.self_attn", "gated_cross_attn_layers.0.cross_attn")]
    extra = {"model.vision_model.embeddings.position_ids": np.arange(17)[None], **dict.fromkeys(frequencies, np.ones(4, np.float32))}
    tied = {"lm_head.weight": "model.embed_tokens.weight", "lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight"}
    old = rewritten(it.folder, tmp_path / "old", change=lambda t: t | extra | {new: t[name] for new, name in tied.items()})
    (old / "processor_config.json").unlink()
    (old / "preprocessor_config.json").write_text('{"image_num_channels": 3, "image_processor_type": "IdeficsImageProcessor", "image_size": 32}')
    cfg, params = load(old)
    assert cfg == it.cfg
    same(params, it.params)


def test_parts_are_read_alone(cases):
    it = cases["resampled"]
    for part, of in (("inputs/image/encoder", it.cfg.inputs["image"].encoder), ("decoder", it.cfg.decoder)):
        cfg, params = load(it.folder, part=part)
        assert cfg == of
        same(params, {k.removeprefix(part + "/"): v for k, v in it.params.items() if k.startswith(part + "/")})


def test_what_is_not_supported_is_refused(cases, tmp_path):
    it = cases["resampled"]
    with pytest.raises(ConfigError, match="cross_layer_interval=3 does not divide num_hidden_layers=4"):
        load(rewritten(it.folder, tmp_path / "x", config=lambda c: c | {"cross_layer_interval": 3}))
    tower: TowerConfig = it.cfg.inputs["image"]
    gelu = replace(it.cfg, inputs={"image": replace(tower, connector=replace(tower.connector, activation="gelu"))})
    with pytest.raises(CannotExpress, match="'idefics' cannot express inputs.image.connector.activation='gelu'"):
        export(it.params, gelu, tmp_path / "y", image_token=260)
