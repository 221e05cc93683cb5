"""Packed equals unpacked: rows that hold several examples give the loss and the gradient of those examples alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mllm_jax import sharding
from mllm_jax.config import load
from mllm_jax.data.batch import collate, decode_items
from mllm_jax.data.pack import Row, RowSpec, one_row, pack, row_spec
from mllm_jax.data.sources.shapes import Shapes
from mllm_jax.data.tokenize import encode
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.nn.param import merge
from mllm_jax.objectives import NextToken
from mllm_jax.sharding import Layout
from mllm_jax.train.state import Blueprint
from mllm_jax.types import Batch, Blob, Example, Part, Turn
from tests.data.test_video import clip
from tests.synthetic import randomized

EXAMPLES = 10
ROOMS = {                               # recipe -> positions and image tiles of a row
    "experts/mm1": (448, 15),           # tiles through convolutions
    "experts/cogvlm": (192, 3),         # kinds, marks, and patches that share a position
    "projector/honeybee": (192, 3),     # convolutions over the patches of an item
    "projector/llava_15": (192, 3),
    "projector/mobilevlm": (192, 3),
    "projector/paligemma": (192, 3),    # prefixes
    "projector/gemma3": (192, 3),       # spans and windows
    "projector/internvl": (448, 15),    # and videos
    "projector/idefics3": (448, 15),    # tiles among text
    "resolution/llava_next": (448, 15),
    "resolution/llava_onevision": (448, 15),        # and videos
    "experts/moe_llava": (192, 3),
    "resampler/flamingo": (192, 3),     # read beside the row
    "resampler/instructblip": (192, 3),             # and the text of each turn
    "resampler/qwen_vl": (192, 3),      # queries
    "resolution/m3": (192, 3),          # several sets of tokens of an item
}


def examples() -> list[Example]:
    """Scenes with one image, every third with two, every fourth with none."""
    scenes = Shapes(size=40)
    out = []
    for i in range(EXAMPLES):
        first, second = scenes[2 * i], scenes[2 * i + 1]
        if i % 4 == 3:
            turns = (Turn(role="user", parts=(Part(text=first.captions[1]),)), Turn(role="assistant", parts=(Part(text="Yes."),)))
            out.append(replace(first, turns=turns, media=()))
        elif i % 3 == 2:
            more = (Part(kind="image", media=1), Part(text=second.captions[0]))
            turns = (*first.turns, Turn(role="user", parts=more), Turn(role="assistant", parts=(Part(text="A second scene"),)))
            out.append(replace(first, turns=turns, media=(*first.media, Blob(kind="image", data=second.media[0].data))))
        else:
            out.append(first)
    return out


def filmed(example: Example) -> Example:
    """The same with a video in the place of its first image."""
    film = lambda part: replace(part, kind="video") if part.media == 0 else part
    turns = tuple(replace(turn, parts=tuple(map(film, turn.parts))) for turn in example.turns)
    return replace(example, turns=turns, media=(Blob(kind="video", data=clip(total=35)), *example.media[1:]))


@pytest.fixture(scope="module", params=ROOMS)
def batches(request) -> tuple[object, Batch, Batch, list[Row]]:
    """(model, packed batch, one example per row, packed rows)."""
    recipe, (seq, items) = load(request.param).tiny(), ROOMS[request.param]
    model = replace(recipe.model, decoder=replace(recipe.model.decoder, kv_heads=2))
    named = [token for way in model.inputs["image"].kinds.values() if way.layout for token in way.layout.specials]
    tokenizer = load_tokenizer("bytes", media=("image", "video"), tokens=named)
    films = "video" in model.inputs["image"].also
    spec = row_spec(seq, {"image": items}, model.inputs, tokenizer.pad_token_id)
    sequences = [encode(e, template="plain", tokenizer=tokenizer, towers=model.inputs, max_len=seq)
                 for e in (filmed(e) if films and i % 4 == 1 else e for i, e in enumerate(examples()))]
    packed = list(pack(sequences, spec))
    return model, batch_of(packed, spec, model), batch_of([one_row(s, spec) for s in sequences], spec, model), packed


def batch_of(rows: list[Row], spec: RowSpec, model: object) -> Batch:
    return collate(rows, [decode_items(row.media, model.inputs, exact=True) for row in rows], spec)


def test_the_packed_rows_are_really_packed(batches: tuple):
    _, packed, alone, rows = batches
    assert len(rows) <= EXAMPLES // 2 and max(len(row.entries) for row in rows) >= 3
    assert any(len(row.media) >= 3 for row in rows)
    assert packed.weights.sum() == alone.weights.sum() > 0 and alone.tokens.shape[0] == EXAMPLES


def test_packing_changes_neither_loss_nor_gradient(batches: tuple):
    model, packed, alone, _ = batches
    layout = Layout(mesh={"data": 1})
    with sharding.use(layout, mesh := layout.make_mesh(jax.devices()[:1])):
        blueprint = Blueprint(model, layout, mesh)
        params = randomized(blueprint.init(0))
        loss = lambda p, b: NextToken().score(merge(blueprint.graph, p)(b), b)["loss"].value
        run = jax.jit(jax.value_and_grad(loss))
        got, got_grads = run(params, packed)
        want, want_grads = run(params, alone)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    towers = [k for k in want_grads if k.startswith("inputs/image/encoder/")]
    assert len(towers) > 5
    largest = max(float(np.abs(w).max()) for w in want_grads.values())
    for name, w in want_grads.items():
        g, w = np.asarray(got_grads[name], np.float64).ravel(), np.asarray(w, np.float64).ravel()
        # What nothing reads, the last norm of the tower and the end of text that is left behind; and biases of keys, which a softmax
        # does not feel: rounding.
        keys = want_grads.get(name.removesuffix("bias") + "kernel") if name.endswith("k/bias") else None
        nothing = 1e-8 * largest if keys is None else 1e-5 * float(np.abs(keys).max())
        if np.abs(w).max() < nothing:
            assert np.abs(g).max() < nothing and (
                "/former/blocks/1/text_" in name or name.endswith(("encoder/norm/bias", "encoder/norm/scale", "k/bias"))), name
            continue
        assert g @ w / np.sqrt((g @ g) * (w @ w)) >= 0.99999, name
        assert np.linalg.norm(g) == pytest.approx(np.linalg.norm(w), rel=1e-4), name


def test_examples_of_a_row_do_not_see_one_another(batches: tuple):
    """Another image in the first example of a row changes nothing in the others."""
    model, packed, _, rows = batches
    layout = Layout(mesh={"data": 1})
    r = next(i for i, row in enumerate(rows) if row.media and row.media[0].segment == 1 and len(row.entries) > 1)
    media = packed.media["image"]
    values = media.values.copy()
    values[r, rows[r].media[0].index] = 255 - values[r, rows[r].media[0].index]
    other = replace(packed, media={"image": replace(media, values=values)})
    with sharding.use(layout, mesh := layout.make_mesh(jax.devices()[:1])):
        blueprint = Blueprint(model, layout, mesh)
        params = randomized(blueprint.init(0))
        run = jax.jit(lambda b: merge(blueprint.graph, params)(b).hidden)
        moved = np.abs(np.asarray(run(packed)) - np.asarray(run(other)))[r].max(axis=-1) > 0
    assert moved[packed.segments[r] == 1].any() and not moved[packed.segments[r] > 1].any()
