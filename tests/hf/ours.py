"""Our side of a comparison: batches, and all that a model computes on the way."""

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.nn import stack
from mllm_jax.nn.param import abstract, merge, split
from mllm_jax.types import Batch, Media


def graph_of(cfg):
    return split(abstract(cfg))[0]


def batch(tokens: np.ndarray, lengths: list[int], media: Media | None = None) -> Batch:
    """Rows padded at the end; every position predicts the next one of its row."""
    tokens = jnp.asarray(tokens, jnp.int32)
    b, s = tokens.shape
    at = jnp.broadcast_to(jnp.arange(s), (b, s))
    real = at < jnp.asarray(lengths)[:, None]
    return Batch(
        tokens=tokens, targets=jnp.roll(tokens, -1, axis=1), weights=(at < jnp.asarray(lengths)[:, None] - 1).astype(jnp.float32),
        segments=real.astype(jnp.int32), positions=jnp.stack([at] * 3, -1), kinds=jnp.zeros((b, s), jnp.int32),
        media={} if media is None else {"image": media})


def media(rows: list[list[bytes]], view, patch: int, slot: np.ndarray) -> Media:
    """Images of each row, cut exactly."""
    most = max(map(len, rows))
    blank = np.zeros((((view.size // patch) ** 2), patch * patch * 3), np.uint8)
    cut = [[view(f, patch, exact=True)[0] for f in row] + [blank] * (most - len(row)) for row in rows]
    values = np.stack([np.stack(row) for row in cut])
    coords = np.zeros((*values.shape[:3], 3), np.int32)
    mask = np.array([[i < len(row) for i in range(most)] for row in rows])
    return Media(values=jnp.asarray(values), coords=jnp.asarray(coords), mask=jnp.asarray(mask), slot=jnp.asarray(slot, jnp.int32))


def decoder_states(decoder, x, b: Batch, memory=None, deep=None) -> list[jax.Array]:
    """What enters the first layer, and what leaves each: before levels `deep` are added, and before the norm."""
    cfg, scene, rotations = decoder.cfg, decoder.scene(b, memory), decoder.rotations(b.positions)
    x = decoder.locate(x, b.positions)

    def step(carry, layer, i, j):
        x, states = carry
        x = layer(x, scene, rotations[j])[0]
        more = 0 if deep is None else jnp.where(i < len(deep), deep[jnp.minimum(i, len(deep) - 1)], 0)
        return (x + more, states.at[i + 1].set(x)), None

    empty = jnp.zeros((cfg.depth + 1, *x.shape)).at[0].set(x)
    return list(stack.run(decoder.blocks, step, (x, empty), depth=cfg.depth)[0][1])


__all__ = ["batch", "decoder_states", "graph_of", "media", "merge"]
