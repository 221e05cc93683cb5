"""Records of a source in one conversation: questions after examples of their kind (arXiv:2005.14165), captions after captions.

A model that reads several images in a row learns from the earlier ones what is wanted of the last.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.types import Example, Part, Turn


class Shots:
    """Each record behind `shots` others of its source, drawn by its number and `seed`; all answers are trained as they were.

    Identity, kind and accepted answers are those of the last one, so that an evaluation asks with examples what it asked without.
    """

    def __init__(self, source, shots: int, seed: int = 0):
        if not 0 <= shots < len(source):
            raise ConfigError(f"shots={shots} others for each of {len(source)} records; write a number between 0 and {len(source) - 1}")
        self.source, self.shots, self.seed = source, shots, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        others = rng.choice(len(self) - 1, self.shots, replace=False)
        return joined([self.source[i] for i in [*(int(k) + (k >= index) for k in others), index]])


def joined(examples: Sequence[Example]) -> Example:
    """One conversation of several, with the identity of the last."""
    turns, media = [], []
    for example in examples:
        move = lambda part, by=len(media): part if part.kind == "text" else replace(part, media=part.media + by)
        said = [turn for turn in _talk(example) if turn.role != "system" or not turns]
        turns += [replace(turn, parts=tuple(map(move, turn.parts))) for turn in said]
        media += example.media
    return replace(examples[-1], turns=tuple(turns), media=tuple(media), captions=())


def _talk(example: Example) -> tuple[Turn, ...]:
    """The turns; of a pair its media, and then its first caption."""
    if example.turns:
        return example.turns
    shown = Turn(role="user", parts=tuple(Part(kind=blob.kind, media=i) for i, blob in enumerate(example.media)))
    return (*((shown,) if example.media else ()), *(Turn(role="assistant", parts=(Part(text=text),)) for text in example.captions[:1]))
