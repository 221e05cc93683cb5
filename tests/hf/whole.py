"""A multimodal family from pictures and words to tokens, gradients and files: what is compared with transformers.

Rows with no image, one, and two of different shapes go through the processor of transformers on one side and through our
template, view, layout and packing on the other.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mllm_jax.data.batch import collate, decode_items, prompt_batch
from mllm_jax.data.pack import one_row, pack, row_spec
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.generate import Sampling, generate
from mllm_jax.hf.convert import convert_folder
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.load import load
from mllm_jax.nn.param import merge
from mllm_jax.objectives import NextToken
from mllm_jax.types import Batch, Blob, Example
from tests.hf import ours
from tests.hf.test_convert import stored
from tests.hf.test_export import reopened
from tests.hf.test_load import rewritten, same
from tests.hf.test_parity import LOSS, check_gradients, check_pixels, close
from tests.hf.tiny_gemma import pictures

NEW = 32                                # tokens of an answer


@dataclass
class Case:
    """A tiny random model of transformers, written to a folder and read by us."""

    model: Any
    processor: Any
    template: str                       # ours
    examples: tuple[Example, ...]
    folder: Path
    renames: dict[str, Callable[[str], str]] = field(default_factory=dict)  # other layouts of keys

    def __post_init__(self):
        self.model.save_pretrained(self.folder)
        self.processor.save_pretrained(self.folder)
        (self.cfg, self.params), self.tokenizer = load(self.folder), load_tokenizer(str(self.folder))
        self.graph = ours.graph_of(self.cfg)

    @property
    def common(self) -> dict:
        return {"template": self.template, "tokenizer": self.tokenizer, "towers": self.cfg.inputs}

    def batch(self, rows: list[list[Example]]) -> Batch:
        """Rows of these examples, padded at the end."""
        sequences = [[encode(e, **self.common) for e in row] for row in rows]
        length = max(sum(map(len, row)) for row in sequences) + 5
        items = max(sum(item.room for s in row for item in s.items) for row in sequences)
        spec = row_spec(length, {"image": items}, self.cfg.inputs, self.tokenizer.pad_token_id)
        placed = [next(pack(row, spec)) if len(row) > 1 else one_row(row[0], spec) for row in sequences]
        decoded = [decode_items(row.media, self.cfg.inputs, exact=True) for row in placed]
        return jax.tree.map(jnp.asarray, collate(placed, decoded, spec))

    def ids(self, batch: Batch) -> np.ndarray:
        """The tokens of a batch as transformers would write them."""
        return np.asarray(batch.tokens)

    def texts(self, prompt: bool) -> list[str]:
        """What the template writes for each example, or for what comes before its answer."""
        jinja = Template(self.template, self.tokenizer).jinja
        content = lambda turn: [{"type": p.kind, "text": p.text} if p.kind == "text" else {"type": p.kind} for p in turn.parts]
        return [
            self.tokenizer.apply_chat_template(
                [{"role": t.role, "content": content(t)} for t in (e.turns[:-1] if prompt else e.turns)],
                chat_template=jinja, tokenize=False, add_generation_prompt=prompt)
            for e in self.examples]  # fmt: skip

    def theirs(self, length: int, *, prompt: bool = False) -> dict:
        """What the processor makes of the examples, in rows of this length; prompts end together."""
        return dict(self.processor(
            text=self.texts(prompt), images=[p for e in self.examples for p in pictures(e)], add_special_tokens=False, return_tensors="pt",
            padding="max_length", max_length=length, padding_side="left" if prompt else "right"))


class FilmCase(Case):
    """Of a family that takes videos, whose processor wants torchvision for them: made by `without_films`."""

    def theirs(self, length: int, *, prompt: bool = False) -> dict:
        """As above; it must know which images belong together."""
        examples = self.examples
        self.processor.video_processor = self.films
        return dict(self.processor(
            text=self.texts(prompt), images=[pictures(e) for e in examples],
            videos=[decoded(b) for e in examples for b in e.media if b.kind == "video"], add_special_tokens=False, return_tensors="pt",
            padding="max_length", max_length=length, padding_side="left" if prompt else "right"))

    def films(self, videos: list[np.ndarray], **_) -> dict:
        """In the place of the video processor (tests/data/test_video.py compares with what it makes)."""
        size = self.cfg.inputs["image"].view.size
        return {"pixel_values_videos": film(videos, lambda frame: frame.resize((size, size), Image.Resampling.BICUBIC))}


def film(videos: list[np.ndarray], resize: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """f32[video frame 3 h w] between -1 and 1 of videos u8[frame h w 3]."""
    frames = np.stack([[np.asarray(resize(Image.fromarray(frame))) for frame in video] for video in videos])
    return ((frames / 255 - 0.5) / 0.5).astype(np.float32).transpose(0, 1, 4, 2, 3)


def without_films(kind: type) -> type:
    """A processor class whose reader of videos is put there later, and not saved."""
    def save(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None, "save_pretrained": save})


def decoded(blob: Blob) -> np.ndarray:
    """u8[frame h w 3], all of a video."""
    with av.open(io.BytesIO(blob.data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def finished(model: Any) -> Any:
    """A model of transformers ready to be compared: random everywhere, and in no hurry to end an answer."""
    from tests.hf.tiny import randomize

    randomize(model)
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        model.get_input_embeddings().weight.data.mul_(0.05)     # otherwise every token would call for itself
    model.generation_config.eos_token_id = None                 # answers of equal length
    model.set_attn_implementation("eager")
    return model.eval().float()


def tiles_of(inputs: dict):
    """f32[tile 3 h w]: the pixels without what fills up."""
    pixels = inputs["pixel_values"].reshape(-1, *inputs["pixel_values"].shape[-3:])
    return pixels[(pixels != 0).flatten(1).any(1)]


def check_inputs(it: Case, least: int = 4) -> None:
    """The same ids and the same pixels, tile by tile, of which there must be so many."""
    batch = it.batch([[e] for e in it.examples])
    inputs = it.theirs(batch.tokens.shape[1])
    np.testing.assert_array_equal(batch.segments, inputs["attention_mask"])
    np.testing.assert_array_equal(np.where(batch.segments, it.ids(batch), 0), np.where(batch.segments, inputs["input_ids"], 0))
    media = batch.media["image"]
    values = media.values.reshape(-1, *media.values.shape[2:])[np.asarray(media.mask).reshape(-1)]
    assert len(values) >= least, "no image of several tiles"
    check_pixels(values, tiles_of(inputs), it.cfg.inputs["image"].encoder)


def check_outputs(it: Case, torch: Any, least: int = 50) -> None:
    """What enters each layer, logits, loss, the gradient of every tensor; and packed rows like rows alone."""
    batch = it.batch([[e] for e in it.examples])
    inputs = it.theirs(batch.tokens.shape[1])
    real, labels = np.asarray(batch.segments) > 0, np.full(batch.tokens.shape, -100)
    labels[:, 1:] = np.where(batch.weights > 0, batch.targets, -100)[:, :-1]
    out = it.model(**inputs, labels=torch.tensor(labels), output_hidden_states=True)
    it.model.zero_grad()
    out.loss.backward()

    @jax.jit
    def run(params):
        model = merge(it.graph, params)
        o = model(batch)
        return ours.decoder_states(model.decoder, model.embed(batch).x, batch), o.hidden, o.hidden @ o.unembed

    states, hidden, logits = run(it.params)
    for k in range(it.cfg.decoder.depth):
        close(states[k][real], out.hidden_states[k].detach()[real])
    close(hidden[real], out.hidden_states[-1].detach()[real])
    close(logits[real], out.logits.detach()[real])
    p, q = (torch.log_softmax(torch.tensor(np.asarray(x))[torch.tensor(real)], -1) for x in (out.logits.detach(), logits))
    assert (p.exp() * (p - q)).sum(-1).abs().max() <= 1e-6
    loss = lambda params: NextToken().score(merge(it.graph, params)(batch), batch)["loss"].value
    value, gradients = jax.jit(jax.value_and_grad(loss))(it.params)
    close(value, out.loss.detach(), LOSS)
    check_gradients(it, it.cfg, gradients, least)
    packed = it.batch([list(it.examples)])
    alone = jax.jit(lambda params: merge(it.graph, params)(packed).hidden)(it.params)
    close(np.asarray(alone)[np.asarray(packed.segments) > 0], np.asarray(hidden)[real], 2e-5)       # sums over longer rows


def check_greedy(it: Case) -> None:
    """Answers of 32 tokens from prompts of different lengths."""
    prompt = jax.tree.map(jnp.asarray, prompt_batch(it.examples, seq_len=None, **it.common))
    keys = jax.random.split(jax.random.key(0), len(it.examples))
    made = jax.jit(lambda params: generate(it.graph, params, prompt, Sampling(max_new_tokens=NEW), jnp.zeros(0, jnp.int32), keys))(it.params)
    inputs = it.theirs(prompt.tokens.shape[1], prompt=True)
    np.testing.assert_array_equal(prompt.segments, inputs["attention_mask"])
    theirs = it.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    np.testing.assert_array_equal(made, theirs[:, -NEW:])
    assert len(np.unique(np.asarray(made))) > 10


def auto_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, use_fast=False)


def check_round_trip(it: Case, torch: Any, tmp_path: Path, opened: Callable[[Path], Any] = auto_processor) -> None:
    """Every layout of keys is read; what is written is what was read, and transformers opens it and its processor."""
    from transformers import AutoModelForImageTextToText

    for layout, rename in it.renames.items():
        got, back = load(rewritten(it.folder, tmp_path / layout, rename))
        assert got == it.cfg
        same(back, it.params)
    native = convert_folder(it.folder, tmp_path / "native")
    assert stored(convert_folder(native, tmp_path / "back", "hf")) == stored(it.folder)
    family, _ = describe(it.folder)
    assert {family.in_memory(link.theirs) for link in family.links(it.cfg)} == dict(it.model.named_parameters()).keys()
    folder = export(it.params, it.cfg, tmp_path / "out", tokenizer=it.tokenizer, seq_len=512, family=family.model_type)
    assert stored(folder) == stored(it.folder)
    assert describe(folder) == (family, it.cfg)
    model = reopened(torch, AutoModelForImageTextToText, folder, attn_implementation="eager")
    assert type(model) is type(it.model)
    inputs = it.theirs(400)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, it.model(**inputs).logits)
    processor = opened(folder)
    assert type(processor) is type(it.processor)
    it = replace(it, processor=processor, folder=tmp_path / "again")
    again = it.theirs(400)
    assert all(torch.equal(again[k], v) for k, v in inputs.items())
