"""Example -> Sequence: ids, targets, weights, and where the media tokens stand.

    tokens    <s>  Q    <image> <image> <image> ?    A    .    </s>
    targets   Q    <image> ...  ...     ?       A    .    </s> <pad>
    weights   0    0    0       0       0       1    1    1    0        a weight belongs to the token predicted
    slots     -1   -1   0       1       2       -1   -1   -1   -1

The template writes one placeholder for a medium; only here (expand.py) does it become as many positions as the
connector gives tokens and the layout adds (route "splice"), one position (route "memory", read by cross-attention),
or none (route "pool", contrastive pairs).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError, nearest
from mllm_jax.data.errors import BadExample
from mllm_jax.data.expand import expand, plan
from mllm_jax.data.templates import Template, encode_pair
from mllm_jax.data.words import said
from mllm_jax.types import Example, Part, Sequence, Turn

REDUCTIONS = {"token": 0.0, "root": 0.5, "example": 1.0}        # an example of n tokens counts as n ** (1 - power) of them


def encode(
    example: Example,
    *,
    template: str | Template,
    tokenizer: Any,
    towers: Mapping[str, Any],
    overlong: str = "raise",
    max_len: int | None = None,
    max_trained: int | None = None,
    rng: np.random.Generator | None = None,
    reduction: str = "token",
) -> Sequence:
    """The tokens of one example, with targets shifted by one; positions count from 0.

    Args:
      towers: input of the model -> its models.tower.TowerConfig.
      overlong: of more than `max_len` positions, or with a weight on more than `max_trained`: "truncate" cuts text at the end; else it is
        a bad example (the second one where it is put into a row).
      rng: chooses one of several captions; None takes the first.
      reduction: how much the example counts in the loss: "token" as its tokens, "example" as any other (PaliGemma), "root" as the root
        of how many tokens it has (InternVL).

    Raises:
      BadExample: a fault of this example, with its id.
      ConfigError: a fault of all of them: a template without assistant spans, a modality without a tower.
    """
    template = template if isinstance(template, Template) else Template(template, tokenizer)
    try:
        if template.pairs:
            if max_len is None:
                raise ConfigError(f"the template {template.name!r} fills a row; pass max_len, its length")
            ids, weights = encode_pair(_caption(example, rng), template, max_len)
            entries = plan(example, range(len(example.media)), template, towers, [""] * len(example.media))
        else:
            turns = _turns(example, template, rng)
            _check(turns)
            entries = plan(example, _media(turns), template, towers, said(turns))
            ids, weights = template.turns(turns, media=[entry.stand for entry in entries])
        sequence = _fit(*expand(example, ids, weights, entries, template, towers), max_len, overlong, max_trained)
        if not sequence.weights.any():
            detail = f"none of {len(sequence)} tokens has a weight under the template {template.name!r}"
            raise BadExample("", "no_trained", detail)
        return sequence if reduction == "token" else replace(sequence, weights=sequence.weights * sequence.weights.sum() ** -power(reduction))
    except BadExample as error:
        raise error.of(example.id) from error.__cause__


def power(reduction: str) -> float:
    """By which power of its tokens an example is divided in the loss; a ConfigError if there is no such reduction."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"data.reduction={reduction!r} is none; nearest: {nearest(reduction, REDUCTIONS)}")
    return REDUCTIONS[reduction]


def encode_prompt(
    example: Example, *, template: str | Template, tokenizer: Any, towers: Mapping[str, Any], max_len: int | None = None
) -> Sequence:
    """The turns before the last answer and what the template writes before it; nothing is trained.

    Raises:
      BadExample: a fault of this example; a prompt of more than `max_len` positions is one.
    """
    template = template if isinstance(template, Template) else Template(template, tokenizer)
    if template.pairs:
        raise ConfigError(f"the template {template.name!r} is of pairs, which have no prompt; name a chat format")
    try:
        turns = _turns(example, template, None)
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        if not turns:
            raise BadExample("", "roles", "nothing comes before the first answer")
        entries = plan(example, _media(turns), template, towers, said(turns))
        ids, weights = template.turns(turns, prompt=True, media=[entry.stand for entry in entries])
        return _fit(*expand(example, ids, weights, entries, template, towers), max_len, "raise")
    except BadExample as error:
        raise error.of(example.id) from error.__cause__


def _fit(sequence: Sequence, end: int, max_len: int | None, overlong: str, max_trained: int | None = None) -> Sequence:
    """The sequence, cut behind the media, which end at `end`, if it is too long and may be."""
    if max_trained is not None and overlong == "truncate" and len(there := np.flatnonzero(sequence.weights)) > max_trained:
        max_len = min(len(sequence) if max_len is None else max_len, int(there[max_trained]))
    if max_len is None or len(sequence) <= max_len:
        return sequence
    if overlong != "truncate":
        media = int(np.count_nonzero(sequence.kinds))
        raise BadExample("", "overlong", f"{len(sequence)} positions, {media} of them media, for a row of {max_len}")
    if end > max_len:
        detail = f"{len(sequence)} positions for a row of {max_len}, and cutting there would cut a medium"
        raise BadExample("", "overlong", detail)
    names = ("tokens", "targets", "weights", "kinds", "positions", "blocks", "taps", "mix")
    arrays = {name: None if (x := getattr(sequence, name)) is None else x[:max_len] for name in names}
    return replace(sequence, **arrays, slots={name: slot[:max_len] for name, slot in sequence.slots.items()})


def _media(turns: Iterable[Turn]) -> list[int]:
    return [part.media for turn in turns for part in turn.parts if part.kind != "text"]


def _check(turns: Iterable[Turn]) -> None:
    """An empty answer would teach the model to end at once."""
    for i, turn in enumerate(turns):
        trained = turn.role == "assistant" and turn.weight != 0
        if trained and not any(part.kind != "text" or part.text.strip() for part in turn.parts):
            raise BadExample("", "empty_answer", f"turn {i}, of the assistant, has no text")


def _caption(example: Example, rng: np.random.Generator | None) -> str:
    captions = [caption for caption in example.captions if caption.strip()]
    if not captions:
        raise BadExample("", "no_text", f"none of {len(example.captions)} captions has text")
    return captions[0 if rng is None else rng.integers(len(captions))]


def _turns(example: Example, template: Template, rng: np.random.Generator | None) -> tuple[Turn, ...]:
    """The conversation; of a pair, or where captions are wanted and there, the media with a caption as the answer."""
    if example.turns and not (template.name == "caption" and example.captions):
        return example.turns
    media = tuple(Part(kind=blob.kind, media=i) for i, blob in enumerate(example.media))
    answer = Turn(role="assistant", parts=(Part(text=_caption(example, rng)),))
    return (Turn(role="user", parts=media), answer) if media else (answer,)
