"""The tokenizer that a recipe names, with every token that its models and templates need."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mllm_jax.data.errors import BadExample
from mllm_jax.data.formats import TOKENS
from mllm_jax.data.sources import open_source
from mllm_jax.data.tokenizer import PLACEHOLDERS, load_tokenizer

TEXTS = 4_000                           # examples of each source whose text a "bpe:SIZE" tokenizer is trained on


def recipe_tokenizer(recipe: Any, root: Path | None = None) -> Any:
    """The tokenizer of a recipe.Recipe; "bpe:SIZE" is trained on the recipe's own sources.

    Raises:
      ConfigError: the tokenizer or a source cannot be loaded.
    """
    stages = recipe.stages.values()
    towers = {name: tower for stage in stages for name, tower in (stage.model or recipe.model).inputs.items()}
    ways = [(kind or name, way) for name, tower in towers.items() for kind, way in tower.kinds.items()]
    media = sorted({way.layout and way.layout.token or kind for kind, way in ways} & set(PLACEHOLDERS))
    tokens = {token for stage in stages for token in TOKENS.get(stage.data.template, ())}
    layouts = [way.layout for _, way in ways if way.layout is not None]
    tokens = sorted(tokens.union(*(layout.specials for layout in layouts)))
    names = dict.fromkeys(name for stage in stages for name in stage.data.sources)
    return load_tokenizer(recipe.tokenizer, texts(names, root), media=media, tokens=tokens)


def stage_tokenizer(model: Any, tokenizer: Any) -> Any:
    """What a stage's model reads: `tokenizer`, that of its recipe, unless its configuration names its own."""
    own = getattr(model, "tokenizer", None)
    return tokenizer if own is None else load_tokenizer(own, media=())


def texts(names: Iterable[str], root: Path | None = None, limit: int = TEXTS) -> Iterator[str]:
    """What the first `limit` examples of each source say; records that cannot be read are left out."""
    for name in names:
        source = open_source(name, root)
        for i in range(min(limit, len(source))):
            try:
                example = source[i]
            except BadExample:
                continue
            yield from example.captions
            yield from (part.text for turn in example.turns for part in turn.parts if part.text)
