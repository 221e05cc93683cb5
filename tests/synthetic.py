"""Random models and batches: what every objective and recipe is tested on without any data."""

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from mllm_jax.config import load
from mllm_jax.types import KINDS, Batch, Media


def llava() -> Any:
    """A tiny MLLM with grouped queries, a learned table of positions and a hidden state before the last."""
    model = load("projector/llava_15").tiny().model
    return replace(model, decoder=replace(model.decoder, kv_heads=2, qk_norm=True))


def clip() -> Any:
    return load("contrastive/clip").tiny().model


def siglip() -> Any:
    return load("contrastive/siglip").tiny().model


def batch_for(model: Any, rows: int = 8, seq_len: int = 48, items: int = 2, seed: int = 0) -> Batch:
    """Rows of two packed examples, each an image and then text, of which a part is trained; numpy.

    A model without a decoder gets rows of one text of random length, and one image beside each.
    """
    rng = np.random.default_rng(seed)
    pairs = not hasattr(model, "decoder")
    vocab = (model.text if pairs else model.decoder).vocab
    tokens = rng.integers(3, vocab, (rows, seq_len + 1))
    lengths = rng.integers(seq_len // 2, seq_len, rows)
    place = np.arange(seq_len)[None]
    if pairs:
        items, segments = 1, np.where(place < lengths[:, None], 1, 0)
        starts = np.zeros((rows, seq_len), int)
    else:
        half = seq_len // 2
        segments = np.where(place < half, 1, 2) * (place < lengths[:, None] + seq_len // 4)
        starts = np.where(place < half, 0, half) + np.zeros((rows, 1), int)
    inside = place - starts
    positions = np.repeat((inside * (segments > 0))[..., None], 3, axis=-1)
    kinds, media = np.zeros((rows, seq_len), int), {}
    for modality, tower in model.inputs.items():
        grid = tower.view.plan(64, 64, tower.patch).grid
        p, n = prod(grid), prod(tower.num_tokens(grid))
        slot = np.full((rows, seq_len), -1)
        if n and not pairs:
            end = n + len(tower.marks)              # which stand behind the tokens of the first tile of each
            assert seq_len // 2 > end + 2, "an image must fit into half a row"
            here = (inside >= 1) & (inside <= end) & (segments > 0)
            token = np.where(inside <= n, inside - 1 + n * (segments - 1), items * n + inside - 1 - n)
            slot = np.where(here, token, -1)
            kinds = np.where(here, KINDS[modality], kinds)
        taps = mix = None
        if n and any(way.layout and way.layout.taps for way in tower.kinds.values()):
            here, of = slot[..., None] >= 0, items * n + len(tower.marks)
            taps = np.where(here, (slot[..., None] + np.arange(4)) % of, 0).astype(np.int32)
            mix = np.where(here, rng.dirichlet(np.ones(4), slot.shape), 0).astype(np.float32)
        text = rng.integers(3, tower.words.vocab, (rows, items, tower.words.length)) if tower.words else None
        values, coords = rng.integers(0, 256, (rows, items, p, tower.encoder.patch_dim)), np.zeros((rows, items, p, 3), np.int32)
        mask, item = np.ones((rows, items), bool), None
        if tower.view.packed:
            _, rows_, columns = grid
            at = tower.view.cut(np.zeros((1, rows_ * tower.patch, columns * tower.patch, 3), np.uint8), tower.patch)[1]
            values, coords = values.reshape(rows, items * p, -1), np.tile(at, (rows, items, 1))
            item = np.tile(np.repeat(np.arange(1, items + 1), p), (rows, 1)).astype(np.int32)
            mask = item > 0
        media[modality] = Media(
            text=None if text is None else np.where(rng.random(text.shape) < 0.8, text, -1).astype(np.int32),
            values=values.astype(np.uint8), coords=coords, mask=mask, item=item, slot=slot.astype(np.int32), taps=taps, mix=mix)
    trained = (rng.random((rows, seq_len)) < 0.4) & (kinds == 0) & (segments > 0)
    weights = trained * rng.uniform(0.5, 1, trained.shape)
    as_int = lambda x: np.asarray(x, np.int32)
    return Batch(
        tokens=as_int(tokens[:, :-1]), targets=as_int(tokens[:, 1:]), weights=weights.astype(np.float32),
        segments=as_int(segments), positions=as_int(positions), kinds=as_int(kinds), media=media)


def randomized(params: dict, seed: int = 0, std: float = 0.1) -> dict:
    """Every leaf moved by noise, norms and biases too, so that swapped ones do not pass unnoticed."""
    rng = np.random.default_rng(seed)
    return {k: v + std * rng.standard_normal(v.shape).astype(np.float32) for k, v in sorted(params.items())}
