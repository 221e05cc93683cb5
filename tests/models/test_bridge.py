"""BLIP-2's first stage: the three losses of the official code, and whom it takes for false pairs."""

from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import sharding
from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.qformer import QFormerConfig, Words
from mllm_jax.data.views import Square
from mllm_jax.encoders import vit
from mllm_jax.evaluation.metrics import retrieval
from mllm_jax.hf import blip2
from mllm_jax.hf.family import Family, Part, linear, norm, row
from mllm_jax.models import bridge
from mllm_jax.models.bridge import BridgeConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.param import merge, split
from mllm_jax.objectives import InfoNCE, Matching, NextToken
from mllm_jax.sharding import Layout
from mllm_jax.train.feed import to_device
from mllm_jax.train.state import Blueprint, TrainState
from mllm_jax.train.step import corrupt, make_step
from mllm_jax.types import Batch
from tests.golden import official
from tests.synthetic import batch_for, randomized

CLOSE = 2e-5        # float32 sums in another order
OBJECTIVES = {"itc": InfoNCE(smoothing=0.1, candidates_learn=False), "itm": Matching(), "lm": NextToken(smoothing=0.1)}


def config(**former) -> BridgeConfig:
    connector = QFormerConfig(**former)
    encoder = replace(vit.EVA_G14_224.tiny(), width=12, depth=1)
    return BridgeConfig(inputs={"image": TowerConfig(view=Square(size=32), encoder=encoder, connector=connector, route="pool")}, dim=8)


TINY = config(tokens=17, queries=3, width=16, depth=2, heads=2, mlp=24, words=Words(vocab=41, positions=16, length=16))


def theirs(name: str) -> str:
    """Names of LAVIS as those of transformers."""
    for old, new in (("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm"), ("Qformer.bert.embeddings.", "embeddings."),
                     ("Qformer.bert.", "qformer."), ("attention.self.", "attention.attention."), ("vision_proj.", "vision_projection."),
                     ("text_proj.", "text_projection.")):
        name = name.replace(old, new)
    return name


# What transformers does not keep of the first stage.
REST = (*linear("Qformer.cls.predictions.transform.dense", "caption/dense", "f d -> d f"),
        *norm("Qformer.cls.predictions.transform.LayerNorm", "caption/norm"),
        row("Qformer.cls.predictions.bias", "caption/bias"), row("temp", "temperature"))
LAVIS = replace(blip2.RETRIEVAL, parts=(*blip2.RETRIEVAL.parts, Part(theirs="", ours="", rows=REST, of=lambda c: c)))


def ours(group: dict, cfg: BridgeConfig, family: Family = LAVIS) -> dict[str, np.ndarray]:
    """Our parameters from theirs, without the tower, which the fixture has none of."""
    group = {theirs(k): v for k, v in group.items()}
    links = [link for link in family.links(cfg) if "/encoder/" not in link.ours]
    assert {link.theirs for link in links} == group.keys()
    out: dict = {}
    for link in links:
        x = link.to_ours(group[link.theirs])
        out.setdefault(link.ours, []).append((link.layer or 0, x))
    shapes = {link.ours: link.layer for link in links}
    return {k: np.stack([x for _, x in sorted(v, key=lambda e: e[0])]) if shapes[k] is not None else v[0][1] for k, v in out.items()}


def test_losses_and_gradients_are_those_of_the_official_code(monkeypatch):
    io, weights, grads = official.read("blip2")
    # The fixture takes the likeliest false pair.
    monkeypatch.setattr(bridge, "draw", lambda logits, *_: jnp.argmax(logits, axis=1))
    graph, fresh = split(TINY.build(rngs=nnx.Rngs(0)))
    own = ours(weights, TINY)
    params = {k: own.get(k, v) for k, v in fresh.items()}
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in fresh.items()}
    tokens, mask = io["tokens"], io["mask"]
    s = tokens.shape[1]
    batch = Batch(
        tokens=tokens, targets=np.roll(tokens, -1, axis=1), weights=np.roll(mask, -1, axis=1) * (np.arange(s) < s - 1).astype(np.float32),
        segments=mask.astype(np.int32), positions=np.repeat((np.arange(s) * mask)[..., None], 3, -1), kinds=np.zeros_like(tokens),
        draws=np.zeros(len(tokens), np.uint32))

    def run(params, memory):
        out = merge(graph, params).read(memory, batch)
        losses = {name: o.score(out, batch)["loss"].value for name, o in OBJECTIVES.items()}
        return sum(losses.values()), losses

    (dp, dm), losses = jax.jit(jax.grad(run, (0, 1), has_aux=True))(params, io["memory"])
    for name in OBJECTIVES:
        assert float(losses[name]) == pytest.approx(float(io[name]), abs=CLOSE), name
    np.testing.assert_allclose(dm, io["dmemory"], atol=CLOSE)
    want = ours(grads, TINY)
    assert sum(np.abs(g).max() > 1e-2 for g in want.values()) > 20
    for path, g in want.items():
        np.testing.assert_allclose(dp[path], g, atol=CLOSE * max(1, np.abs(g).max()), err_msg=path)


def test_false_pairs_are_drawn_as_often_as_they_are_alike():
    logits = jnp.array([[-jnp.inf, 1.0, 0.0, -1.0], [0.5, -jnp.inf, 0.5, 2.0]])
    n = 4000
    bits = jax.random.bits(jax.random.key(3), (n, 2))
    drawn = np.asarray(jax.jit(jax.vmap(lambda b: bridge.draw(logits, b, 0)))(bits))
    other = np.asarray(jax.jit(jax.vmap(lambda b: bridge.draw(logits, b, 1)))(bits))
    for row_ in (0, 1):
        often = np.bincount(drawn[:, row_], minlength=4) / n
        p = np.asarray(jax.nn.softmax(logits[row_]))
        # Four standard deviations of a share of n.
        assert (np.abs(often - p) <= 4 * np.sqrt(p * (1 - p) / n)).all(), (often, p)
    # Images and texts are drawn apart from one another.
    together = np.mean(drawn[:, 0] == other[:, 0])
    assert abs(together - float(jnp.sum(jax.nn.softmax(logits[0]) ** 2))) < 4 * 0.5 / np.sqrt(n)


@pytest.fixture(scope="module")
def made():
    graph, params = split(TINY.build(rngs=nnx.Rngs(0)))
    params = {k: jnp.asarray(v) for k, v in randomized(params).items()}
    return graph, params, jax.jit(lambda params, batch: merge(graph, params)(batch))


def batch(rows: int = 4, seed: int = 0, **change) -> Batch:
    return replace(batch_for(TINY, rows=rows, seq_len=8, seed=seed), **change)


def test_rows_without_an_example_change_nothing(made):
    """Neither as false pairs nor as candidates; nor does what stands in the padding."""
    _, params, run = made
    full = corrupt(OBJECTIVES, batch(4), jax.random.key(0))
    empty = replace(full, segments=np.asarray(full.segments) * np.array([1, 1, 1, 0])[:, None],
                    weights=np.asarray(full.weights) * np.array([1, 1, 1, 0])[:, None])
    other = replace(empty, tokens=np.where(np.asarray(empty.segments) > 0, empty.tokens, 7))
    scores = [{k: o.score(run(params, b), b) for k, o in OBJECTIVES.items()} for b in (empty, other)]
    for name in OBJECTIVES:
        a, b = (s[name]["loss"] for s in scores)
        assert float(a.value) == pytest.approx(float(b.value), abs=1e-6) and float(a.count) == float(b.count)
    assert float(scores[0]["itm"]["loss"].count) == 9 and float(scores[0]["itc"]["loss"].count) == 3
    alone = replace(full, segments=np.asarray(full.segments) * np.array([1, 0, 0, 0])[:, None])
    assert run(params, alone).pairs.labels[0].tolist() == [1, -1, -1]       # nobody is left to be a false pair


def test_without_random_bits_only_the_true_pair_is_asked_for(made):
    _, params, run = made
    drawn, plain = run(params, corrupt(OBJECTIVES, batch(4), jax.random.key(0))), run(params, batch(4))
    assert plain.pairs.labels.tolist() == [[1]] * 4
    np.testing.assert_allclose(plain.pairs.logits[:, 0], drawn.pairs.logits[:, 0], atol=1e-6)


def test_an_image_and_a_text_alone_are_what_they_are_in_a_pair(made):
    graph, params, run = made
    rows = batch(4)
    image, text = jax.jit(lambda p: (merge(graph, p).embed_media("image", rows), merge(graph, p).embed_text(rows)))(params)
    embeds = run(params, rows).embeds
    np.testing.assert_allclose(image, embeds["image"], atol=CLOSE)
    np.testing.assert_allclose(text, embeds["text"], atol=CLOSE)
    # The nearest of the queries counts: a caption is found by any of them.
    found = retrieval(np.stack([np.eye(4)[[0, 1]], np.eye(4)[[2, 3]]]), np.eye(4)[[1, 2]], np.eye(2, dtype=bool))
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 1.0


def test_microbatches_change_neither_contrast_nor_captions(made):
    import optax

    graph, params, _ = made
    objectives = {k: OBJECTIVES[k] for k in ("itc", "lm")}
    rule = optax.sgd(1.0)
    state = TrainState(step=jnp.asarray(0), params=params, frozen={}, opt_state=rule.init(params), ema=None)
    steps = [jax.jit(make_step(graph, objectives, rule, microbatches=n)) for n in (1, 2)]
    (a, one), (b, two) = (step(state, batch(4), jax.random.key(0)) for step in steps)
    for name in ("itc/loss", "lm/loss"):
        assert float(one[name].value) == pytest.approx(float(two[name].value), rel=1e-5)
    for path in params:
        np.testing.assert_allclose(a.params[path], b.params[path], atol=1e-5, err_msg=path)


def test_a_bridge_needs_a_q_former_that_knows_words():
    image = TINY.inputs["image"]
    for connector in (replace(image.connector, words=None), MLPConfig(depth=1)):
        with pytest.raises(ConfigError, match=f"trains one Q-Former that knows words.*connected by {type(connector).__name__}"):
            replace(TINY, inputs={"image": replace(image, connector=connector)}).build(rngs=nnx.Rngs(0))


def test_false_pairs_come_from_other_devices(made):
    """A row of its own on each of four devices draws what it draws among four rows of one."""
    _, params, run = made
    rows = corrupt(OBJECTIVES, batch(4), jax.random.key(0))
    layout = Layout(mesh={"data": 2, "fsdp": 2})
    devices = layout.make_mesh(jax.devices()[:4])
    with sharding.use(layout, devices):
        blueprint = Blueprint(TINY, layout, devices)
        placed = {k: jax.device_put(v, blueprint.shapes[k].sharding) for k, v in params.items()}
        got = jax.jit(lambda params, rows: merge(blueprint.graph, params)(rows).pairs)(placed, to_device(jax.tree.map(np.asarray, rows), devices))
    want = run(params, rows).pairs
    np.testing.assert_allclose(got.logits, want.logits, atol=CLOSE)
    np.testing.assert_array_equal(got.labels, [[1, 0, 0]] * 4)
    assert len(np.unique(np.asarray(want.logits)[:, 1:, 0].round(4))) > 4
