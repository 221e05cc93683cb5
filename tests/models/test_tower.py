"""A tower puts its marks behind the media tokens, and the row finds them there."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.layouts import AnyRes, Marked, Spans
from mllm_jax.data.tiles import Tiles
from mllm_jax.data.views import Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.mllm import splice
from mllm_jax.models.tower import Also, Tower, TowerConfig
from mllm_jax.nn.param import axes_of, merge, split
from mllm_jax.types import Features, Media

VIT = ViTConfig(width=8, heads=1, mlp=8, patch=8, grid=2, depth=1)
TILED = TowerConfig(view=Tiles(size=16), encoder=VIT, connector=MLPConfig(), layout=AnyRes())


def media(items: int = 3) -> Media:
    values = np.random.default_rng(0).integers(0, 256, (2, items, 4, 192)).astype(np.uint8)
    return Media(values=values, coords=np.zeros((2, items, 4, 3), np.int32), mask=np.array([[True] * items, [True] + [False] * (items - 1)]),
                 slot=np.full((2, 1), -1, np.int32))


def test_marks_stand_behind_all_tokens_and_learn():
    tower = Tower(TILED, 6, rngs=nnx.Rngs(0))
    graph, params = split(tower)
    assert params["marks/newline"].shape == (6,) and axes_of(tower)["marks/newline"] == ("embed",)
    graph_plain, plain = split(Tower(replace(TILED, layout=None), 6, rngs=nnx.Rngs(0)))
    assert params.keys() - plain.keys() == {"marks/newline"}
    features = tower(media())
    assert features.tokens.shape == (2, 13, 6) and features.mask.shape == (2, 13)
    np.testing.assert_array_equal(features.tokens[:, 12], np.broadcast_to(params["marks/newline"], (2, 6)))
    np.testing.assert_array_equal(features.tokens[:, :12], merge(graph_plain, {k: params[k] for k in plain})(media()).tokens)

    there = replace(media(), slot=jnp.array([[-1, 0, 12, 5], [12, -1, -1, 12]]))
    loss = lambda p: jnp.sum(splice(jnp.zeros((2, 4, 6)), merge(graph, p)(media()), there))
    np.testing.assert_allclose(jax.grad(loss)(params)["marks/newline"], 3.0)        # it stands at three places


def test_levels_of_the_encoder_have_no_marks():
    class Levels:
        """A connector that gives one deep level beside the tokens."""

        build = lambda self, d_in, d_out, *, rngs: lambda f: replace(f, deep=f.tokens[None])
        num_tokens = lambda self, grid: grid

    features = Tower(replace(TILED, connector=Levels()), 8, rngs=nnx.Rngs(0))(media())
    assert features.deep.shape == (1, 2, 13, 8) and not features.deep[:, :, 12].any()
    np.testing.assert_array_equal(features.deep[0, :, :12], features.tokens[:, :12])


def test_marks_of_all_layouts_are_numbered_together():
    tower = replace(TILED, also={"video": Also(view=Square(size=16), layout=Marked()), "images": Also(view=Square(size=16), layout=Spans())})
    assert tower.marks == ("newline", "boi", "eoi")
    assert tower.kinds["video"].view == Square(size=16) and tower.kinds["video"].place == "row" and tower.kinds[""].layout == AnyRes()
    assert tower.room == 5


def test_a_tower_is_small_where_its_encoder_is():
    tiny = replace(TILED, also={"images": Also(view=Square(size=99))}).tiny()
    assert tiny.view == Tiles(size=32) and tiny.also["images"].view == Square(size=32) and tiny.check() is tiny


def test_text_stays_where_nothing_stands_and_means_of_tokens_where_they_are_wanted():
    x, features = jnp.ones((1, 3, 1)), Features(tokens=jnp.array([[[4.0], [8.0]]]), mask=jnp.ones((1, 2), bool))
    there = replace(media(1), slot=jnp.array([[-1, 1, 0]]))
    assert splice(x, features, there)[..., 0].tolist() == [[1.0, 8.0, 4.0]]
    taps, mix = jnp.array([[[0] * 4, [1, 0, 0, 0], [0, 1, 0, 1]]]), jnp.array([[[1.0, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.25, 0.25, 0]]])
    assert splice(x, features, replace(there, taps=taps, mix=mix))[..., 0].tolist() == [[1.0, 8.0, 5.0]]
