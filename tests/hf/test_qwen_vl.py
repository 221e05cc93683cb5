"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL from pictures, frames and words to tokens, gradients and files, against transformers."""

import io
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError
from mllm_jax.data.batch import collate, decode_items, prompt_batch
from mllm_jax.data.native import Native
from mllm_jax.data.pack import one_row, pack, row_spec
from mllm_jax.data.templates import chat_template
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.encoders.vit import normalize
from mllm_jax.generate import Sampling, generate
from mllm_jax.hf.convert import convert_folder
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.load import load
from mllm_jax.hf.qwen_vl import videos
from mllm_jax.nn.param import merge
from mllm_jax.objectives import NextToken
from mllm_jax.types import Batch, Blob, Cut, Example, Grid, Media, Part, Turn
from tests.hf import ours
from tests.hf.test_convert import stored
from tests.hf.test_export import reopened
from tests.hf.test_load import rewritten, same
from tests.hf.test_parity import LOSS, check_gradients, close

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FRAMES, RATE, SECONDS = (4, 48, 80), 4.0, (0.0, 0.25, 0.5, 0.75)      # a video: frames, height and width in pixels


class Film:
    """A view of videos that are at hand: the bytes are the frames."""

    packed = True

    def __init__(self, view: Any):
        self.view = view

    def look(self, blob: Blob, patch: int) -> Cut:
        t, h, w = FRAMES
        middles = tuple((a + b) / 2 for a, b in zip(SECONDS[::2], SECONDS[1::2]))
        return Cut(size=(h, w), grid=(t // 2, h // patch, w // patch), seconds=middles, every=2 / RATE)

    def room(self, patch: int) -> int:
        return 2 * FRAMES[1] // patch * FRAMES[2] // patch

    def __call__(self, data: bytes, patch: int, **_) -> tuple[np.ndarray, np.ndarray]:
        return self.view.cut(np.frombuffer(data, np.uint8).reshape(*FRAMES, 3), patch)


def talk(id: str, *parts: str, answer: str = "yes") -> Example:
    """A question of words, "#" for an image, "%" for the video; images have many shapes."""
    media, asked, sizes = [], [], ((70, 41), (33, 90), (50, 50), (16, 130))
    for part in parts:
        if part in "#%":
            rng = np.random.default_rng(len(media) + ord(id[0]))
            small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(small).resize(sizes[(len(media) + ord(id[0])) % 4], Image.Resampling.BILINEAR).save(file, "png")
            video = rng.integers(0, 256, (*FRAMES, 3), dtype=np.uint8).tobytes()
            asked.append(Part(kind="image" if part == "#" else "video", media=len(media)))
            media.append(Blob(kind="image", data=file.getvalue()) if part == "#" else Blob(kind="video", data=video))
        else:
            asked.append(Part(text=part))
    turns = Turn(role="user", parts=tuple(asked)), Turn(role="assistant", parts=(Part(text=answer),))
    return Example(id=id, turns=turns, media=tuple(media))


# One image; two of other shapes; none; a video between an image and words.
EXAMPLES = (talk("a", "#", "what is it?", answer="the moon"), talk("b", "and", "#", "or", "#"), talk("c", "who?", answer="me"),
            talk("d", "#", "%", "then?", answer="rain"))


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

    @cached_property
    def towers(self) -> dict:
        tower = self.cfg.inputs["image"]
        return {"image": replace(tower, also={"video": replace(tower.also["video"], view=Film(tower.view))})}

    @property
    def common(self) -> dict:
        return {"template": self.made.template, "tokenizer": self.tokenizer, "towers": self.towers}

    @cached_property
    def graph(self):
        return ours.graph_of(self.cfg)

    def batch(self, rows: list[list]) -> Batch:
        """Rows of these examples, padded at the end to what all of them take."""
        sequences = [[encode(e, **self.common) for e in row] for row in rows]
        length, patches = (sum(f(s) for row in sequences for s in row) + 8 for f in (len, lambda s: sum(item.room for item in s.items)))
        spec = row_spec(length, {"image": patches}, self.towers, self.tokenizer.pad_token_id)
        placed = [next(pack(row, spec)) if len(row) > 1 else one_row(row[0], spec) for row in sequences]
        decoded = [decode_items(row.media, self.towers, exact=True) for row in placed]
        return jax.tree.map(jnp.asarray, collate(placed, decoded, spec))

    def call(self, examples, *, prompt: bool = False) -> dict[str, np.ndarray]:
        """What the processor makes of the conversations, padded at the right, or at the left for prompts."""
        processor, words = self.made.processor, self.made.processor.tokenizer
        content = lambda turn: [{"type": p.kind, "text": p.text} if p.kind == "text" else {"type": p.kind} for p in turn.parts]
        texts = [words.apply_chat_template(
            [{"role": t.role, "content": content(t)} for t in (e.turns[:-1] if prompt else e.turns)], tokenize=False,
            chat_template=chat_template(self.made.template, self.tokenizer), add_generation_prompt=prompt) for e in examples]
        kinds = {kind: [b for e in examples for b in e.media if b.kind == kind] for kind in ("image", "video")}
        pictures = [Image.open(io.BytesIO(b.data)).convert("RGB") for b in kinds["image"]]
        films = [np.frombuffer(b.data, np.uint8).reshape(*FRAMES, 3) for b in kinds["video"]]
        processor.video_processor = self.films
        return processor(text=texts, images=pictures or None, videos=films or None, padding=True, return_tensors="np",
                         padding_side="left" if prompt else "right")

    def films(self, videos: list, **_) -> dict[str, Any]:
        """In the place of the video processor, which wants torchvision: the frames are of the right size already."""
        t, h, w = FRAMES
        encoder = self.cfg.inputs["image"].encoder
        p, grid = encoder.patch, (t // 2, h // encoder.patch, w // encoder.patch)
        values = [self.towers["image"].also["video"].view(v.tobytes(), p)[0] for v in videos]
        metadata = [SimpleNamespace(fps=RATE, sampled_fps=RATE, frames_indices=list(range(t)), total_num_frames=t) for _ in videos]
        pixels = theirs(normalize(np.concatenate(values), encoder.mean, encoder.std), p)
        return {"pixel_values_videos": pixels, "video_grid_thw": np.array([grid] * len(videos)), "video_metadata": metadata}


# The processor asks its reader of videos how many patches are one token.
Case.films.merge_size, Case.films.temporal_patch_size = 2, 2


def theirs(values: np.ndarray, p: int) -> np.ndarray:
    """f32[n u] of patches (time, row, column, channel) in the order (channel, time, row, column) of transformers."""
    return np.asarray(values).reshape(len(values), 2, p, p, 3).transpose(0, 4, 1, 2, 3).reshape(len(values), -1)


@pytest.fixture(scope="module")
def cases(torch, tmp_path_factory):
    from tests.hf import tiny_qwen

    out = {}
    for name in NAMES:
        made = tiny_qwen.MODELS[name]()
        folder = tiny_qwen.save(made, tmp_path_factory.mktemp("qwen") / name)
        cfg, params = load(folder)
        out[name] = Case(name, made, folder, cfg, params, load_tokenizer(str(folder)))
    return out


def tower_media(grids: tuple[Grid, ...], pixels: np.ndarray, p: int, view: Any, padding: int) -> Media:
    """One row of these patches of theirs, and then padding."""
    values = pixels.reshape(-1, 3, 2, p, p).transpose(0, 2, 3, 4, 1).reshape(len(pixels), -1)
    coords = np.concatenate([view.cut(np.zeros((2 * t, h * p, w * p, 3), np.uint8), p)[1] for t, h, w in grids])
    item = np.repeat(np.arange(1, len(grids) + 1), [int(np.prod(g)) for g in grids])
    row = lambda x: jnp.asarray(np.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)))[None]
    return Media(values=row(values), coords=row(coords), item=row(item), mask=row(item > 0), slot=jnp.zeros((1, 1), int))


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_on_grids_of_many_shapes(cases, torch, name):
    from tests.hf import tiny_qwen

    it = cases[name]
    pixels = tiny_qwen.patches()
    with torch.no_grad():
        want = it.model.model.visual(torch.tensor(pixels), grid_thw=torch.tensor(tiny_qwen.GRIDS), return_dict=True)
    media = tower_media(tiny_qwen.GRIDS, pixels, tiny_qwen.PATCH, it.cfg.inputs["image"].view, padding=40)

    @jax.jit
    def run(params):
        tower = merge(it.graph, params).inputs["image"]
        read = tower.encoder(media)
        return read, tower.connector(read)

    read, merged = run(it.params)
    n = len(pixels)
    if name != "qwen2_5_vl":            # which leaves its patches in the order of windows
        close(read.tokens[0, :n], want.last_hidden_state)
    close(merged.tokens[0, : n // 4], want.pooler_output, 1e-5)
    assert merged.mask[0].tolist() == [True] * (n // 4) + [False] * 10
    if name == "qwen3_vl":
        assert len(merged.deep) == 2
        for mine, other in zip(merged.deep, want.deepstack_features, strict=True):
            close(mine[0, : n // 4], other, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_ids_and_positions_are_those_of_the_processor(cases, torch, name):
    it = cases[name]
    batch = it.batch([[e] for e in EXAMPLES])
    inputs = it.call(EXAMPLES)
    s = inputs["input_ids"].shape[1]
    assert s <= batch.tokens.shape[1] and not batch.segments[:, s:].any()
    real = inputs["attention_mask"] > 0
    np.testing.assert_array_equal(batch.tokens[:, :s][real], inputs["input_ids"][real])
    np.testing.assert_array_equal(batch.segments[:, :s], inputs["attention_mask"])
    np.testing.assert_array_equal(batch.kinds[:, :s], inputs["mm_token_type_ids"])
    media, encoder = batch.media["image"], it.cfg.inputs["image"].encoder
    both = np.concatenate([inputs["pixel_values"], inputs["pixel_values_videos"]])
    mine = theirs(normalize(media.values[np.asarray(media.mask)], encoder.mean, encoder.std), encoder.patch)
    assert len(mine) == len(both) and np.abs(mine - both).max() < 1e-5      # the same pixels; one level is 1/255
    # A video of two steps, wider than long: with more steps than rows and columns transformers would count on too early after it.
    places, _ = it.model.model.get_rope_index(**{k: torch.tensor(inputs[k]) for k in RULES if k in inputs})
    np.testing.assert_array_equal(np.asarray(batch.positions)[:, :s][real], np.moveaxis(places.numpy(), 0, -1)[real])


RULES = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "second_per_grid_ts")


def feed(torch, inputs: dict[str, np.ndarray]) -> dict:
    names = (*RULES, "pixel_values", "pixel_values_videos")
    return {k: torch.tensor(np.asarray(inputs[k])) for k in names if k in inputs}


@pytest.mark.parametrize("name", NAMES)
def test_states_logits_loss_and_gradients(cases, torch, name):
    """Rows with an image, two, none, and an image with a video, of different shapes and lengths; then all in one row."""
    it = cases[name]
    batch, inputs = it.batch([[e] for e in EXAMPLES]), it.call(EXAMPLES)
    s = inputs["input_ids"].shape[1]
    real = np.asarray(batch.segments)[:, :s] > 0
    labels = np.full((len(EXAMPLES), s), -100)
    labels[:, 1:] = np.where(batch.weights > 0, batch.targets, -100)[:, : s - 1]
    out = it.model(**feed(torch, inputs), labels=torch.tensor(labels), output_hidden_states=True)
    it.model.zero_grad()
    out.loss.backward()

    def score(params, batch):
        model = merge(it.graph, params)
        enter, o = model.embed(batch), model(batch)
        states = ours.decoder_states(model.decoder, enter.x, batch, deep=enter.deep)
        return NextToken().score(o, batch)["loss"].value, (states, o.hidden, o.hidden @ o.unembed)

    run = jax.jit(jax.value_and_grad(score, has_aux=True))
    (value, (states, hidden, logits)), gradients = run(it.params, batch)
    for k in range(it.cfg.decoder.depth):
        close(np.asarray(states[k])[:, :s][real], out.hidden_states[k].detach()[real])
    close(np.asarray(hidden)[:, :s][real], out.hidden_states[-1].detach()[real])
    close(np.asarray(logits)[:, :s][real], out.logits.detach()[real])
    p, q = (torch.log_softmax(torch.tensor(np.asarray(x))[:, :s][real], -1) for x in (out.logits.detach(), logits))
    assert (p.exp() * (p - q)).sum(-1).abs().max() <= 1e-6
    close(value, out.loss.detach(), LOSS)
    check_gradients(it, it.cfg, gradients, least=60)
    # Packed equals unpacked, in the tower too; rows of zeros bring it to the same shape.
    packed = jax.tree.map(lambda x: jnp.pad(x, ((0, len(EXAMPLES) - 1),) + ((0, 0),) * (x.ndim - 1)), it.batch([list(EXAMPLES)]))
    (one, _), again = run(it.params, packed)
    assert float(one) == pytest.approx(float(value), rel=1e-6)
    for path, want in gradients.items():
        assert np.abs(again[path] - want).max() <= 1e-4 * np.abs(want).max() + 1e-7, path     # float32 sums in another order


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_of_32_tokens(cases, torch, name):
    """Prompts of different lengths at the right; positions go on after the largest of an image."""
    it, n = cases[name], 32
    prompt = jax.tree.map(jnp.asarray, prompt_batch(EXAMPLES, **it.common))
    keys = jax.random.split(jax.random.key(0), len(EXAMPLES))
    made = jax.jit(lambda params: generate(it.graph, params, prompt, Sampling(max_new_tokens=n), jnp.zeros(0, jnp.int32), keys))(it.params)
    theirs = it.model.generate(**feed(torch, it.call(EXAMPLES, prompt=True)), max_new_tokens=n, do_sample=False)
    np.testing.assert_array_equal(made, theirs[:, -n:])
    assert len(np.unique(np.asarray(made))) > 10


MEMORY = (("^visual[.]", "model.visual."), ("^model[.](?!visual)(?!language_model)", "model.language_model."))


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(cases, torch, tmp_path, name):
    """Keys as on the disk and as in memory; what is written is what was read, and transformers opens it."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    it = cases[name]
    got, back = load(rewritten(it.folder, tmp_path / "memory", renamed))
    assert got == it.cfg
    same(back, it.params)
    native = convert_folder(it.folder, tmp_path / "native")
    assert stored(convert_folder(native, tmp_path / "back", "hf")) == stored(it.folder)
    folder = export(it.params, it.cfg, tmp_path / "out", tokenizer=it.tokenizer, seq_len=512,
                    chat_template=chat_template(it.made.template, it.tokenizer))
    assert stored(folder) == stored(it.folder)
    assert describe(folder)[0].model_type == name and describe(folder)[1] == it.cfg
    model = reopened(torch, AutoModelForImageTextToText, folder, attn_implementation="eager")
    assert type(model) is type(it.model)
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(model.config, key) == getattr(it.model.config, key)
    inputs = feed(torch, it.call(EXAMPLES))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, it.model(**inputs).logits)
    again = AutoImageProcessor.from_pretrained(folder, backend="pil")
    picture = Image.open(io.BytesIO(EXAMPLES[0].media[0].data))
    both = [reader(picture, return_tensors="np")["pixel_values"] for reader in (again, it.made.processor.image_processor)]
    np.testing.assert_array_equal(*both)
    own = it.common | {"template": "tokenizer", "tokenizer": load_tokenizer(str(folder))}
    for example in EXAMPLES:            # the format that went with it
        np.testing.assert_array_equal(encode(example, **own).tokens, encode(example, **it.common).tokens)


def renamed(name: str) -> str:
    """As `named_parameters` has it."""
    import re

    for pattern, new in MEMORY:
        name = re.sub(pattern, new, name)
    return name


def test_frames_of_long_videos_are_small():
    """As `fetch_video` of qwen_vl_utils: all frames share 128,000 tokens less a tenth, two of them to a token."""
    most = lambda n: videos(Native(), 14)._view(n).max_pixels / 28**2
    assert (most(4), most(300), most(768)) == (768, 768, 300)


@pytest.mark.parametrize("name", NAMES)
def test_how_videos_are_read_is_written_and_read(cases, tmp_path, name):
    """Limits of each frame and of all; those of Qwen3-VL are of all, and a frame has its part of them."""
    it = cases[name]
    tower = it.cfg.inputs["image"]
    view = replace(tower.also["video"].view, frames=100, fps=1.0, least=6, budget=2 * 450 * 256)
    view = replace(view, view=replace(view.view, min_pixels=8 * 256, max_pixels=30 * 256))
    model = replace(it.cfg, inputs={"image": replace(tower, also={"video": replace(tower.also["video"], view=view)})})
    folder = export(it.params, model, tmp_path / "out", tokenizer=it.tokenizer, seq_len=512)
    assert describe(folder)[1] == model
    (folder / "processor_config.json").unlink()
    assert describe(folder)[1] == it.cfg
    blind = replace(it.cfg, inputs={"image": replace(tower, also={})})
    with pytest.raises(ConfigError, match=f"the family '{name}' reads videos too; give the tower also="):
        export(it.params, blind, tmp_path / "blind", tokenizer=it.tokenizer)
    hub = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "video_processor_type": "Qwen3VLVideoProcessor"}
    most = lambda n: videos(Native(), 16, hub)._view(n).max_pixels / 32**2
    assert (most(4), most(64), most(768)) == (768, 384, 32)


def test_the_first_files_are_flat(cases, tmp_path):
    """As published: the language model beside the tower, "mrope" among the rotations, limits beside the size."""
    it = cases["qwen2_vl"]

    def flat(c: dict) -> dict:
        text = c.pop("text_config")
        rope = text.pop("rope_parameters")
        old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
        return text | c | old | {"model_type": "qwen2_vl"}

    assert load(rewritten(it.folder, tmp_path / "flat", config=flat))[0] == it.cfg


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("qwen2_vl", {"in_chans": 1}, "a tower of in_channels=3 and rope_theta=10000.0 is not supported"),
        ("qwen2_vl", {"patch_size": 16}, "the image processor says patch_size=8 and the tower patch_size=16; they must be the same"),
        ("qwen3_vl", {"num_position_embeddings": 48}, "num_position_embeddings=48 must be a square"),
        ("qwen3_vl", {"deepstack_visual_indexes": [1, 0]}, r"deepstack_visual_indexes=\[1, 0\] must rise"),
    ],
)
def test_what_is_not_supported_is_refused(cases, tmp_path, name, change, match):
    config = lambda c: c | {"vision_config": c["vision_config"] | change}
    with pytest.raises(ConfigError, match=match):
        load(rewritten(cases[name].folder, tmp_path / "x", config=config))
