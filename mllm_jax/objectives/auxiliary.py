"""Losses that a model computes of itself on the way, such as the balance of its experts."""

from typing import ClassVar

from mllm_jax.config import config
from mllm_jax.objectives.base import Uncorrupted
from mllm_jax.types import Batch, Mean, Outputs


@config
class Auxiliary(Uncorrupted):
    """The loss `name` of the model's `aux`, for example "router/balance" of nn/moe.py: a mean over tokens and layers.

    Where a paper sums over layers, the weight here is its weight times the number of such layers.
    Raises KeyError if the model has no such loss.
    """

    name: str
    weight: float = 1.0
    whole: ClassVar[bool] = False

    def score(self, out: Outputs, batch: Batch) -> dict[str, Mean]:
        if self.name not in out.aux:
            raise KeyError(f"the model has no auxiliary loss {self.name!r}; it has {', '.join(sorted(out.aux)) or 'none'}")
        return {"loss": out.aux[self.name]}
