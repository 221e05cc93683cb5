"""The protocol every objective satisfies."""

from typing import ClassVar, Protocol

import jax

from mllm_jax.types import Batch, Mean, Outputs


class Objective(Protocol):
    weight: float
    whole: ClassVar[bool]               # reads the embeds of the whole batch at once, not row by row

    def corrupt(self, batch: Batch, rng: jax.Array) -> Batch: ...
    def score(self, out: Outputs, batch: Batch) -> dict[str, Mean]: ...


class Uncorrupted:
    """For objectives that take the batch as it is."""

    def corrupt(self, batch: Batch, rng: jax.Array) -> Batch:
        return batch
