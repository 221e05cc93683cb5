"""One loss over several numbers of media tokens at once (Matryoshka Multimodal Models, M3, arXiv:2405.17430, eq. 2).

Each row is read once with each of the token sets that connectors/pool.py's NestedConfig makes, and the loss is the
mean over the sets.  A row is laid out for the first and largest set.  In the copy for a smaller one its tokens stand
at the last places of the medium, the other places are holes that nobody sees, and positions count past the holes: the
copy is, number by number, the row that would have been laid out for that set.
"""

from dataclasses import replace
from math import isqrt

import jax
import jax.numpy as jnp

from mllm_jax.config import config
from mllm_jax.objectives.tokens import NextToken
from mllm_jax.types import Batch


@config
class EveryScale(NextToken):
    """NextToken, averaged over nested sets of the tokens of one modality.

    Raises KeyError if the batch has no such modality, ValueError if its items have no square grid.
    """

    windows: tuple[int, ...]            # those of the connector, the largest set first
    modality: str = "image"

    def corrupt(self, batch: Batch, rng: jax.Array) -> Batch:
        """A copy of every row for each window, side by side so that a device keeps its rows."""
        if self.modality not in batch.media:
            raise KeyError(f"EveryScale reads {self.modality!r}; the batch has media of {sorted(batch.media)}")
        items, patches = batch.media[self.modality].values.shape[1:3]
        grid = isqrt(patches)
        if grid**2 != patches or batch.media[self.modality].item is not None:
            raise ValueError(f"EveryScale needs {self.modality} items of a square grid; they have {patches} patches")
        sizes = [max(1, grid // window) ** 2 for window in self.windows]
        offsets = [items * sum(sizes[:k]) for k in range(len(sizes))]
        copies = [at_scale(batch, self.modality, sizes[0], size, offset) for size, offset in zip(sizes, offsets)]
        return jax.tree.map(lambda *rows: jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:]), *copies)


def at_scale(batch: Batch, modality: str, full: int, size: int, offset: int) -> Batch:
    """Rows whose items have `full` tokens each -> the rows with `size`, which begin at slot `offset` of the features."""
    media = batch.media[modality]
    item, token = media.slot // full, media.slot % full - (full - size)
    hole = (media.slot >= 0) & (token < 0)
    slot = jnp.where((media.slot < 0) | hole, -1, offset + item * size + token)
    before = jnp.cumsum(hole, axis=1) - hole
    first = jnp.diff(batch.segments, axis=1, prepend=-1) != 0
    # Holes in the segments before do not count: the number never falls, so its largest value at a start is the last one.
    before = before - jax.lax.cummax(jnp.where(first, before, 0), axis=1)
    return replace(
        batch, segments=jnp.where(hole, 0, batch.segments), weights=jnp.where(hole, 0.0, batch.weights),
        positions=batch.positions - before[..., None], media={**batch.media, modality: replace(media, slot=slot)})
