"""Placeholders become what a layout says: slots, positions, who sees whom."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.errors import BadExample
from mllm_jax.data.layouts import AnyRes, Marked, Spans
from mllm_jax.data.pack import pack, row_spec
from mllm_jax.data.tiles import Tiles
from mllm_jax.data.tokenize import encode, encode_prompt
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import Pad, Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.tower import Also, TowerConfig
from mllm_jax.types import Blob, Example, Part, Turn

VIT = ViTConfig(width=8, heads=1, mlp=8, patch=8, grid=2, depth=1)
PLAIN = TowerConfig(view=Square(size=16), encoder=VIT, connector=MLPConfig())
TILED = replace(PLAIN, view=Tiles(size=16), layout=AnyRes())
TOKENIZER = load_tokenizer("bytes", tokens=("<img>", "</img>"))


def png(height: int, width: int) -> Blob:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, "PNG")
    return Blob(kind="image", data=out.getvalue())


def example(text: str, *media: Blob, answer: str = "yes", id: str = "e") -> Example:
    """A question in which "*" is the next medium."""
    parts, pieces = [], text.split("*")
    for i, piece in enumerate(pieces):
        parts += [Part(text=piece)] if piece else []
        parts += [Part(kind=media[i].kind, media=i)] if i < len(pieces) - 1 else []
    turns = (Turn(role="user", parts=tuple(parts)), Turn(role="assistant", parts=(Part(text=answer),)))
    return Example(id=id, turns=turns, media=media)


def go(example, tower, **more):
    towers = tower if isinstance(tower, dict) else {"image": tower}
    return encode(example, template="plain", tokenizer=TOKENIZER, towers=towers, **more)


def text(ids) -> str:
    return TOKENIZER.decode(ids)


def test_tiles_and_newlines_of_two_images():
    s = go(example("a*b*c", png(16, 32), png(32, 16)), TILED)
    slots = s.slots["image"]
    assert text(s.tokens[slots == -1]) == "<s>abc\nyes</s>"
    # Overview and 1 x 2 tiles of 2 x 2 tokens, then the same for 2 x 1 tiles, behind the twelve of the first.
    first = [0, 1, 2, 3, 4, 5, 8, 9, -2, 6, 7, 10, 11, -2]
    second = [12, 13, 14, 15, 16, 17, -2, 18, 19, -2, 20, 21, -2, 22, 23, -2]
    assert slots[slots != -1].tolist() == first + second
    assert [(i.cut.tiles, i.room, i.num_tokens) for i in s.items] == [(3, 3, 12), (3, 3, 12)]
    assert (s.kinds == 1).tolist() == (slots != -1).tolist() and not s.weights[s.kinds[1:].nonzero()[0]].any()


def test_packed_rows_put_marks_behind_all_tokens():
    towers = {"image": TILED}
    spec = row_spec(96, {"image": 8}, towers, 0)
    assert spec.media["image"].tokens == 32
    both = [go(example("*?", png(16, 32), id=id), TILED) for id in "ab"]
    (row,) = pack(both, spec)
    n = len(both[0])
    alone = both[0].slots["image"]
    for k in (0, 1):
        expected = np.where(alone >= 0, alone + 12 * k, np.where(alone == -2, 32, -1))
        np.testing.assert_array_equal(row.slots["image"][k * n : (k + 1) * n], expected)
    assert [p.index for p in row.media] == [0, 3]
    with pytest.raises(BadExample, match="3 image tiles for a row of 2"):
        row_spec(96, {"image": 2}, towers, 0).check(both[0])
    assert row_spec(96, {}, towers, 0).media["image"].items == 5


def test_text_of_a_layout_is_tokenized_with_special_tokens_and_not_trained():
    tower = replace(PLAIN, layout=Spans(before="<img>", after="</img>"))
    s = go(example("a*b", png(8, 8)), tower)
    assert text(s.tokens) == "<s>a<img>" + "<image>" * 4 + "</img>b\nyes</s>"
    assert len(s.tokens) == 3 + 4 + 7 and s.kinds.tolist() == [0] * 3 + [1] * 4 + [0] * 7
    with pytest.raises(BadExample, match="would cut a medium"):
        go(example("a*b", png(8, 8)), tower, max_len=7, overlong="truncate")


def test_several_images_may_be_seen_otherwise():
    tower = replace(TILED, also={"images": Also(view=Pad(size=16))})
    one, two = go(example("*", png(16, 32)), tower), go(example("**", png(16, 32), png(32, 16)), tower)
    assert [i.cut.tiles for i in one.items] == [3] and [i.cut.tiles for i in two.items] == [1, 1]
    assert two.slots["image"].tolist()[1:11] == [0, 1, 2, 3, -2, 4, 5, 6, 7, -2]


def test_tokens_of_an_image_share_a_position_where_the_tower_says_so():
    s = go(example("*x", png(8, 8)), replace(PLAIN, place="one", layout=Marked()))
    # CogVLM: begin 0, the mark before the image, the image, the mark behind it, text.
    assert s.positions[:, 0].tolist() == [0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9]
    assert s.slots["image"].tolist() == [-1, -2, 0, 1, 2, 3, -3] + [-1] * 6
    assert s.kinds.tolist() == [0, 1, 1, 1, 1, 1, 0] + [0] * 6
    assert go(example("*x", png(8, 8)), PLAIN).positions[:, 0].tolist() == list(range(11))


def test_positions_on_a_grid_are_those_of_qwen2_vl():
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl").Qwen2VLModel
    from types import SimpleNamespace

    class Free(ViTConfig):
        """An encoder of any grid."""

        def num_tokens(self, grid):
            return grid

    class AnySize(Square):
        def plan(self, height, width, patch):
            return replace(super().plan(height, width, patch), grid=(1, height // patch, width // patch))

    tower = TowerConfig(view=AnySize(size=16), encoder=Free(**vars(VIT)), connector=MLPConfig(), place="grid")
    s = go(example("ab*c**d", png(24, 40), png(40, 16), png(16, 16)), tower)
    grids = [item.cut.grid for item in s.items]
    assert grids == [(1, 3, 5), (1, 5, 2), (1, 2, 2)]
    # Two images side by side are one group to transformers, so the last one is left out of what it is shown.
    end = int(np.flatnonzero(s.kinds == 1)[sum(math.prod(g) for g in grids[:2])])
    fake = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=1)))
    fake.get_vision_position_ids = lambda *a, **k: model.get_vision_position_ids(fake, *a, **k)
    theirs, _ = model.get_rope_index(
        fake, torch.tensor(s.tokens[None, :end]), mm_token_type_ids=torch.tensor(s.kinds[None, :end]), image_grid_thw=torch.tensor(grids[:2]))
    np.testing.assert_array_equal(s.positions[:end], theirs[:, 0].T.numpy())
    # The rule goes on: the third begins behind the largest position of the second, and so does the text.
    assert s.positions[end].tolist() == [s.positions[:end].max() + 1] * 3
    assert (s.positions[end + 4] == s.positions[end : end + 4].max() + 1).all()


def test_marks_have_no_place_in_a_grid():
    with pytest.raises(ConfigError, match="a layout with marks has no grid of positions"):
        go(example("*", png(8, 8)), replace(TILED, place="grid"))


def test_blocks_say_who_sees_whom():
    data = example("a**b", png(8, 8), png(8, 8))
    assert go(data, PLAIN).blocks is None
    item = go(data, replace(PLAIN, sees="item"))
    assert item.blocks.tolist() == [0, 1, 2, 2, 2, 2, 6, 6, 6, 6, *range(10, 16)]
    prefix = go(data, replace(PLAIN, sees="prefix"))
    # The new line at 11 predicts the first token of the answer, and is the last that is seen whole.
    assert text(prefix.targets[11:12]) == "y"
    assert prefix.blocks.tolist() == [0] * 12 + [12, 13, 14, 15]
    prompt = encode_prompt(data, template="plain", tokenizer=TOKENIZER, towers={"image": replace(PLAIN, sees="prefix")})
    assert len(prompt) == 12 and not prompt.blocks.any()
    assert go(example("a"), replace(PLAIN, sees="prefix")).blocks.tolist() == [0, 0, 0, 3, 4, 5, 6]


def test_every_row_has_blocks_or_none():
    towers = {"image": replace(PLAIN, sees="item")}
    assert row_spec(32, {}, towers, 0).blocks and not row_spec(32, {}, {"image": PLAIN}, 0).blocks
    (row,) = pack([go(example("hi"), towers)], row_spec(32, {}, towers, 0))
    assert row.blocks.tolist() == list(range(32))


def test_a_tower_whose_parts_do_not_agree_says_so():
    for change, words in (
        ({"sees": "all"}, "sees='all' of a tower is not one of: causal, item, prefix"),
        ({"place": "line"}, "place='line' of a tower is not one of: row, grid, one"),
        ({"also": {"images": Also(view=Square(size=24))}}, "the view cuts 3x3"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(PLAIN, **change).check()
