"""Attention over long rows: block by block with a running softmax (arXiv:2112.05682), without the scores of a whole row.

Blocks of keys that no query of a block sees are left out while the program runs, so that rows packed with many images
or documents cost what their parts cost, rounded up to blocks.  A block is left out where no row of the batch needs it.
The backward pass computes the scores again.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.nn.visibility import Visibility

LONG = 2048                             # rows of more positions are read in blocks: their scores would be 16 MiB for each head
BLOCK = 256                             # positions; larger ones leave out less, smaller ones make smaller products
NEVER = -1e30                           # finite, so that differences of two are no NaN


def attend_blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, *, scale: float, window: int | None = None, block: int = BLOCK,
) -> jax.Array:
    """f[b s h k], f[b t g k], f[b t g k] -> f[b s h k]; a query that sees nothing gives 0."""
    s, groups = q.shape[1], k.shape[2]
    fill = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))
    queries = [rearrange(fill(x), "b (n c) ... -> n b c ...", c=block) for x in (q * scale, visibility.segments, visibility.order)]
    keys = [rearrange(fill(x), "b (n c) ... -> n b c ...", c=block) for x in (k, v, visibility.key_segments, visibility.key_order)]
    queries[0] = rearrange(queries[0], "n b c (g r) k -> n b g r c k", g=groups)
    first, last = visibility.start + block * jnp.arange(len(queries[1])), block * jnp.arange(len(keys[2]))
    wanted = needed(*queries[1:], *keys[2:], first, last, window)

    def rows(one: tuple) -> jax.Array:
        q, segments, order, start, wanted = one

        def step(carry: tuple, key: tuple) -> tuple:
            k, v, key_segments, key_order, at, want = key
            sees = Visibility(segments=segments, order=order, key_segments=key_segments, key_order=key_order, start=start - at)
            join = jax.checkpoint(lambda carry: _join(carry, q, k, v, sees.mask(window)[:, None, None]))
            return jax.lax.cond(want, join, lambda carry: carry, carry), None

        empty = jnp.zeros(q.shape[:-1], jnp.float32)
        start_with = (empty + NEVER, empty, jnp.zeros(q.shape, jnp.float32))
        (_, total, out), _ = jax.lax.scan(step, start_with, (*keys, last, wanted))
        return (out / jnp.where(total == 0, 1, total)[..., None]).astype(v.dtype)

    # Checkpointed twice: the backward pass holds the running sums of one block of queries, and the scores of one pair.
    out = jax.lax.map(jax.checkpoint(rows), (*queries, first, wanted))
    return rearrange(out, "n b g r c k -> b (n c) (g r) k")[:, :s]


def _join(carry: tuple, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple:
    """(largest score, sum of weights, weighted sum of values) so far, with one more block of keys."""
    largest, total, out = carry
    scores = jnp.einsum("bgrsk,btgk->bgrst", q, k, preferred_element_type=jnp.float32)
    # The result does not depend on what is subtracted, so no gradient goes through it.
    new = jax.lax.stop_gradient(jnp.maximum(largest, jnp.max(jnp.where(mask, scores, NEVER), axis=-1)))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores, NEVER) - new[..., None]), 0)
    old = jnp.exp(largest - new)
    seen = jnp.einsum("bgrst,btgk->bgrsk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return new, total * old + jnp.sum(weights, axis=-1), out * old[..., None] + seen


def needed(
    segments: jax.Array, order: jax.Array, key_segments: jax.Array, key_order: jax.Array, first: jax.Array, last: jax.Array,
    window: int | None,
) -> jax.Array:
    """bool[n m]: whether a query of block n may see a key of block m, from the smallest and largest numbers in each.

    i32[n b c] of queries, i32[m b c] of keys, and the place of the first position of each block.  True more often than
    need be where segments do not follow one another in a row.
    """
    block, many = order.shape[-1], jnp.iinfo(jnp.int32).max
    low, high = (jnp.min(jnp.where(segments > 0, segments, many), -1), jnp.max(segments, -1))
    key_low, key_high = (jnp.min(jnp.where(key_segments > 0, key_segments, many), -1), jnp.max(key_segments, -1))
    overlap = (low[:, None] <= key_high[None]) & (key_low[None] <= high[:, None]) & (high > 0)[:, None] & (key_high > 0)[None]
    sees = overlap & (jnp.min(key_order, -1)[None] <= jnp.max(order, -1)[:, None])
    near = True if window is None else (first[:, None] - (last + block - 1) < window)[..., None]
    return jnp.any(sees & near, axis=-1)
