"""What a stage trains for.  An objective is two pure functions and a weight.

    corrupt(batch, rng) -> batch            hides or noises what is to be predicted; often the identity
    score(outputs, batch) -> {name: Mean}   "loss" is minimized, the others are logged
"""

from mllm_jax.objectives.auxiliary import Auxiliary
from mllm_jax.objectives.contrastive import InfoNCE, Matching, Sigmoid
from mllm_jax.objectives.nested import EveryScale
from mllm_jax.objectives.tokens import NextToken

__all__ = ["Auxiliary", "EveryScale", "InfoNCE", "Matching", "NextToken", "Sigmoid"]
