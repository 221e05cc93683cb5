"""Who sees whom: two integers for each position, turned into a mask, or handed to a kernel as they are.

Query i sees key j when they are of the same segment and `order[j] <= order[i]`.  Counting up gives
causal attention, one number for a whole span makes it bidirectional inside, and segments keep packed
examples apart.  Segment 0 is padding: nobody sees it, and what it sees does not matter.

A window lets a query see the last so many places of the row only, of its own span too; what comes after it in the
span it sees all of (Gemma 3).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from mllm_jax.types import Batch

DATA = ["segments", "order", "key_segments", "key_order", "start"]


@partial(jax.tree_util.register_dataclass, data_fields=DATA, meta_fields=["causal"])
@dataclass(frozen=True, kw_only=True)
class Visibility:
    segments: jax.Array                 # i32[b s]   of the queries
    order: jax.Array                    # i32[b s]
    key_segments: jax.Array             # i32[b t]
    key_order: jax.Array                # i32[b t]
    start: jax.Array | int = 0          # i32[]: place of the first query among the keys
    causal: bool = False                # order is known to count up; says what a kernel costs, not what it does

    def mask(self, window: int | None = None) -> jax.Array:
        """bool[b s t]."""
        same = self.segments[:, :, None] == self.key_segments[:, None, :]
        order, key_order = self.order[:, :, None], self.key_order[:, None, :]
        seen = same & (self.key_segments[:, None, :] > 0) & (key_order <= order)
        if window is None:
            return seen
        s, t = order.shape[1], key_order.shape[2]
        return seen & ((self.start + jnp.arange(s))[:, None] - jnp.arange(t) < window)


def of_batch(batch: Batch, *, causal: bool = True) -> Visibility:
    """What the positions of a batch see of one another; not causal: all of their own segment."""
    counts = causal and batch.blocks is None
    if counts:
        order = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    else:
        order = batch.blocks if causal else jnp.zeros_like(batch.tokens)
    return Visibility(segments=batch.segments, order=order, key_segments=batch.segments, key_order=order, causal=counts)
