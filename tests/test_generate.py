"""Generation: cached equals uncached, rows are independent, and the filters are those of transformers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.batch import prompt_batch
from mllm_jax.data.sources.shapes import Shapes
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import Square
from mllm_jax.decoders.transformer import LLAMA
from mllm_jax.encoders.vit import CLIP_L14_336
from mllm_jax.generate import (
    Generator,
    Sampling,
    batch_rows,
    bucket,
    filtered,
    generate,
    host_rows,
    id_hash,
    row_keys,
    schedule,
)
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.param import merge, split
from mllm_jax.sharding import Layout
from mllm_jax.types import Batch, Part, Turn

CFG = MLLMConfig(
    inputs={
        "image": TowerConfig(view=Square(size=336), encoder=replace(CLIP_L14_336, layer=-2), connector=MLPConfig())
    },
    decoder=replace(LLAMA, kv_heads=2),
).tiny()
TOKENIZER = load_tokenizer("bytes")


def _spread(params: dict, seed: int = 1) -> dict:
    """Weights large enough that logits differ by more than rounding, and answers by more than luck."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(v + rng.normal(0, 0.15, v.shape).astype(np.float32)) for k, v in params.items()}


@pytest.fixture(scope="module")
def model():
    graph, params = split(CFG.build(rngs=nnx.Rngs(0)))
    return graph, _spread(params)


@pytest.fixture(scope="module")
def examples():
    """Seven prompts of different lengths, one without an image and one with two."""
    shapes = Shapes(count=7, size=32)
    out = [shapes[i] for i in range(7)]
    text = Turn(role="user", parts=(Part(text="no picture"),))
    two = Turn(
        role="user",
        parts=(Part(kind="image", media=0), Part(text=" and "), Part(kind="image", media=1), Part(text="?")),
    )
    out[2] = replace(out[2], turns=(text,), media=())
    out[4] = replace(out[4], turns=(two,), media=(*out[4].media, *out[5].media))
    return out


def prompts(examples, **kw) -> Batch:
    return prompt_batch(examples, template="plain", tokenizer=TOKENIZER, towers=CFG.inputs, **kw)


def one_by_one(graph, params, batch: Batch, n: int) -> np.ndarray:
    """Greedy tokens with the whole row computed anew for each; no cache, rows padded at the right."""
    out = []
    for r in range(batch.tokens.shape[0]):
        row = jax.tree.map(lambda x: x[r : r + 1], batch)
        for _ in range(n):
            hidden = merge(graph, params)(row)
            token = np.asarray(hidden.hidden[:, -1] @ hidden.unembed).argmax(-1)
            out.append(int(token[0]))
            grow = lambda x, value: np.concatenate([x, np.full((1, 1, *x.shape[2:]), value, x.dtype)], 1)
            row = replace(
                row,
                tokens=grow(row.tokens, token[0]),
                targets=grow(row.targets, 0),
                weights=grow(row.weights, 0),
                kinds=grow(row.kinds, 0),
                segments=grow(row.segments, row.segments[0, -1]),
                positions=grow(row.positions, row.positions[0, -1, 0] + 1),
                media={m: replace(x, slot=grow(x.slot, -1)) for m, x in row.media.items()},
            )
    return np.array(out).reshape(-1, n)


def run(graph, batch, params, sampling, stops=(), keys=None):
    keys = jax.random.split(jax.random.key(0), batch.tokens.shape[0]) if keys is None else keys
    f = jax.jit(lambda p, b, k: generate(graph, p, b, sampling, jnp.asarray(stops, jnp.int32), k))
    return np.asarray(f(params, batch, keys))


def test_cached_tokens_are_those_of_the_whole_row_computed_anew(model, examples):
    graph, params = model
    batch = prompts([examples[i] for i in (0, 2, 4)], seq_len=112)
    got = run(graph, batch, params, Sampling(max_new_tokens=5))
    want = one_by_one(graph, params, batch, 5)
    np.testing.assert_array_equal(got, want)
    assert len({tuple(r) for r in want.tolist()}) == 3  # the rows do differ, so the comparison says something


def test_a_stop_token_ends_its_row_and_no_other(model, examples):
    graph, params = model
    batch = prompts([examples[i] for i in (0, 2, 4)], seq_len=112)
    free = run(graph, batch, params, Sampling(max_new_tokens=6))
    stop = [int(free[0, 2]), int(free[2, 4])]
    got = run(graph, batch, params, Sampling(max_new_tokens=6), stop)
    for r in range(3):
        hits = np.flatnonzero(np.isin(free[r], stop))
        end = hits[0] + 1 if len(hits) else 6
        np.testing.assert_array_equal(got[r, :end], free[r, :end])
        assert (got[r, end:] == 0).all()
    assert (got[0, 3:] == 0).all()


def test_a_row_without_a_prompt_generates_nothing(model, examples):
    graph, params = model
    batch = prompts(examples[:1], seq_len=112, rows=2)
    got = run(graph, batch, params, Sampling(max_new_tokens=3))
    assert (got[1] == 0).all()
    np.testing.assert_array_equal(
        got[:1], run(graph, prompts(examples[:1], seq_len=112), params, Sampling(max_new_tokens=3))
    )


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=6), Sampling(temperature=1.0, top_p=0.9, top_k=50, max_new_tokens=6)]
)
def test_a_batch_answers_as_each_example_alone_and_as_eight_devices(model, examples, sampling):
    _, params = model
    make = lambda n, **kw: Generator(
        CFG, params, TOKENIZER, mesh=Layout().make_mesh(jax.devices()[:n]), template="plain", **kw
    )
    together = make(1, rows=4)(examples, sampling, seed=3)
    alone = make(1, rows=1)
    assert together == [alone([e], sampling, seed=3)[0] for e in examples]
    assert len(set(together)) > 4
    if sampling.temperature:
        assert together[:2] != alone(examples[:2], sampling, seed=4)
    if sampling.temperature and len(jax.devices()) >= 8:
        layout = Layout(mesh={"fsdp": 2, "tensor": 2, "context": 2})
        sharded = Generator(
            CFG, {k: np.asarray(v) for k, v in params.items()}, TOKENIZER, layout=layout, template="plain", rows=8
        )
        assert together == sharded(examples, sampling, seed=3)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=0.9, top_k=20, top_p=0.6),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1.0, top_k=1000),
    ],
)
def test_filters_are_those_of_transformers(sampling):
    torch = pytest.importorskip("torch")
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(0, 3, (32, 100)).astype(np.float32)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        theirs.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        theirs.append(TopPLogitsWarper(sampling.top_p))
    want = theirs(None, torch.from_numpy(logits.copy())).numpy()
    got = np.asarray(filtered(jnp.asarray(logits), sampling))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    # One rounding of a division apart.
    np.testing.assert_allclose(got[~np.isinf(got)], want[~np.isinf(want)], rtol=1e-6)


def test_draws_follow_the_filtered_distribution():
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 1.5, 12).astype(np.float32))
    sampling = Sampling(temperature=0.8, top_k=8, top_p=0.9)
    n = 20_000
    from mllm_jax.generate import sample

    drawn = sample(jnp.broadcast_to(logits, (n, 12)), sampling, jax.random.split(jax.random.key(0), n))
    share = np.bincount(np.asarray(drawn), minlength=12) / n
    p = np.asarray(jax.nn.softmax(filtered(logits[None], sampling)[0]))
    assert (share[p == 0] == 0).all() and (p == 0).sum() >= 4
    # Five standard deviations of a share of n draws.
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


def test_keys_come_from_the_id_and_the_seed():
    ids = ["a", "b", "a"]
    keys = jax.random.key_data(row_keys(jnp.uint32(1), jnp.stack([id_hash(i) for i in ids])))
    assert (keys[0] == keys[2]).all() and not (keys[0] == keys[1]).all()


def test_buckets_grow_by_a_third_or_a_half():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 96, 97, 200)] == [16, 16, 24, 24, 32, 48, 96, 128, 256]
    assert [bucket(n, 1) for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 3, 4, 6, 8]


def test_a_schedule_has_every_index_once_and_pads_with_the_first():
    shapes = [(16,), (32,), (16,), (16,), (32,)]
    batches = schedule(shapes, 2)
    assert batches == [((16,), [0, 2]), ((16,), [3]), ((32,), [1, 4])]
    mesh = Layout().make_mesh(jax.devices()[:1])
    assert host_rows([3], 2, mesh) == [(3, True), (3, False)]
    assert batch_rows(5, Layout().make_mesh(jax.devices())) % len(jax.devices()) == 0


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"max_new_tokens": 0}])
def test_sampling_refuses(bad):
    with pytest.raises(ConfigError, match=str(next(iter(bad.values())))):
        Sampling(**bad)


@pytest.mark.parametrize("name", ["llama", "llava-clip-llama", "llava-siglip-qwen2"])
def test_greedy_tokens_are_those_of_transformers(name, torch, tmp_path):
    """Ragged prompts, padded at the left, with an image each at different places."""
    from mllm_jax.hf.load import load
    from mllm_jax.types import Media
    from tests.hf import tiny

    theirs, processor = tiny.save(name, tmp_path)
    cfg, params = load(tmp_path)
    if name == "llama":
        cfg, params = MLLMConfig(inputs={}, decoder=cfg), {f"decoder/{k}": v for k, v in params.items()}
    rng, n_image = np.random.default_rng(0), 16 if cfg.inputs else 0
    lengths, starts, s = [30, 25, 21], [8, 0, 5], 30
    tokens, segments = np.zeros((3, s), np.int32), np.zeros((3, s), np.int32)
    slot, positions = np.full((3, s), -1, np.int32), np.zeros((3, s, 3), np.int32)
    for r, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        own = rng.integers(3, 90, length)
        own[start : start + n_image] = tiny.IMAGE_TOKEN
        at = np.arange(s - length, s)
        tokens[r, at], segments[r, at], positions[r, at] = own, 1, np.arange(length)[:, None]
        slot[r, at[start : start + n_image]] = np.arange(n_image)
    media, pixels = {}, {}
    if n_image:
        tower, files = cfg.inputs["image"], tiny.images(3)
        values, coords = (
            np.stack(x)[:, None] for x in zip(*(tower.view(f, tower.patch, exact=True) for f in files), strict=True)
        )
        media = {"image": Media(values=values, coords=coords, mask=np.ones((3, 1), bool), slot=slot)}
        pixels = {"pixel_values": tiny.pixel_values(processor, files)}
    zero = np.zeros((3, s), np.int32)
    batch = Batch(
        tokens=tokens,
        targets=zero,
        weights=zero.astype(np.float32),
        segments=segments,
        positions=positions,
        kinds=zero,
        media=media,
    )
    graph = split(jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))[0]
    got = run(graph, batch, params, Sampling(max_new_tokens=12))
    with torch.no_grad():
        want = theirs.generate(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(segments).long(),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
            **pixels,
        )
    np.testing.assert_array_equal(got, want[:, s:].numpy())
    assert len({tuple(r) for r in got.tolist()}) == 3
