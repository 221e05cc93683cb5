"""Example -> Sequence: ids, targets, weights, and where the media tokens stand.

    tokens    <s>  Q    <image> <image> <image> ?    A    .    </s>
    targets   Q    <image> ...  ...     ?       A    .    </s> <pad>
    weights   0    0    0       0       0       1    1    1    0        a weight belongs to the token predicted
    slot      -1   -1   0       1       2       -1   -1   -1   -1

The template writes one placeholder for a medium; only here does it become as many positions as the connector
gives tokens (route "splice"), one position (route "memory", read by cross-attention), or none (route "pool",
contrastive pairs).  Media are not decoded; their headers are read, so that a missing or broken file is found
before it is packed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.data.errors import BadExample
from mllm_jax.data.images import image_size
from mllm_jax.data.record import read_blob
from mllm_jax.data.templates import Template, encode_pair
from mllm_jax.data.tokenizer import placeholder
from mllm_jax.types import KINDS, Blob, Example, Item, Part, Sequence, Turn

_HEADER = 1 << 18                       # bytes of a file in which its header is looked for


def encode(
    example: Example,
    *,
    template: str | Template,
    tokenizer: Any,
    towers: Mapping[str, Any],
    overlong: str = "raise",
    max_len: int | None = None,
    rng: np.random.Generator | None = None,
) -> Sequence:
    """The tokens of one example, with targets shifted by one; positions count from 0, attention is causal.

    Args:
      towers: modality -> what enters the model that way: `.view`, `.patch`, `.route`, `.num_tokens(grid)`.
      overlong: of more than `max_len` positions: "truncate" cuts text at the end; else it is a bad example.
      rng: chooses one of several captions; None takes the first.

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
            used = range(len(example.media))
        else:
            turns = _turns(example, template, rng)
            _check(turns)
            ids, weights = template.turns(turns)
            used = [part.media for turn in turns for part in turn.parts if part.kind != "text"]
        sequence = _sequence(example, ids, weights, used, tokenizer, towers, pairs=template.pairs)
        sequence = _fit(sequence, max_len, overlong)
        if not sequence.weights.any():
            detail = f"none of {len(sequence)} tokens has a weight under the template {template.name!r}"
            raise BadExample("", "no_trained", detail)
        return sequence
    except BadExample as error:
        raise error.of(example.id) from error.__cause__


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
        ids, weights = template.turns(turns, prompt=True)
        used = [part.media for turn in turns for part in turn.parts if part.kind != "text"]
        return _fit(_sequence(example, ids, weights, used, tokenizer, towers, pairs=False), max_len, "raise")
    except BadExample as error:
        raise error.of(example.id) from error.__cause__


def _sequence(
    example: Example, ids: np.ndarray, weights: np.ndarray, used: Iterable[int], tokenizer: Any,
    towers: Mapping[str, Any], *, pairs: bool,
) -> Sequence:  # fmt: skip
    items = tuple(_item(example.media[i], towers) for i in used)
    length = len(ids)
    repeat, kinds, memory = np.ones(length, np.int64), np.zeros(length, np.int32), np.zeros(length, np.int32)
    for modality in {} if pairs else {item.modality: None for item in items}:
        token, id = placeholder(tokenizer, modality)
        here, own = np.flatnonzero(ids == id), [item for item in items if item.modality == modality]
        if len(here) != len(own):
            raise BadExample("", "placeholders", f"the template left {len(here)} of {token} for {len(own)} {modality}s")
        route = towers[modality].route
        if route == "memory":           # the text after the placeholder reads this item
            memory[here] = 1
        else:
            repeat[here] = [item.num_tokens for item in own]
            kinds[here] = KINDS[modality]
    tokens, kinds, weights, memory = (np.repeat(x, repeat) for x in (ids, kinds, weights, memory))
    slot = np.cumsum(memory, dtype=np.int32) - 1
    for kind in set(kinds.tolist()) - {0}:
        slot[kinds == kind] = np.arange(np.sum(kinds == kind))
    slot = slot if memory.any() else np.where(kinds > 0, slot, -1)
    trained = np.where(kinds > 0, 0.0, weights)
    return Sequence(
        id=example.id,
        source=example.source,
        tokens=tokens.astype(np.int32),
        targets=np.append(tokens[1:], tokenizer.pad_token_id).astype(np.int32),
        weights=np.append(trained[1:], 0.0).astype(np.float32),
        kinds=kinds,
        positions=np.repeat(np.arange(len(tokens), dtype=np.int32)[:, None], 3, axis=1),
        blocks=None,
        slot=slot.astype(np.int32),
        items=items,
    )


def _item(blob: Blob, towers: Mapping[str, Any]) -> Item:
    if blob.kind not in towers:
        takes = ", ".join(towers) or "text only"
        raise ConfigError(f"the data has {blob.kind}s and the model takes {takes}; choose another source")
    tower = towers[blob.kind]
    height, width = image_size(read_blob(blob, _HEADER))
    grid = tower.view.grid(height, width, tower.patch)
    return Item(modality=blob.kind, blob=blob, grid=grid, num_tokens=prod(tower.num_tokens(grid)))


def _fit(sequence: Sequence, max_len: int | None, overlong: str) -> Sequence:
    if max_len is None or len(sequence) <= max_len:
        return sequence
    media = np.flatnonzero(sequence.kinds > 0)
    if overlong != "truncate":
        detail = f"{len(sequence)} positions, {len(media)} of them media, for a row of {max_len}"
        raise BadExample("", "overlong", detail)
    if len(media) and media[-1] >= max_len:
        detail = f"{len(sequence)} positions for a row of {max_len}, and cutting there would cut a medium"
        raise BadExample("", "overlong", detail)
    arrays = {f: getattr(sequence, f)[:max_len] for f in ("tokens", "targets", "weights", "kinds", "positions", "slot")}
    return replace(sequence, **arrays)


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
