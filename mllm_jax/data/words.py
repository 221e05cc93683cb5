"""What a tower reads beside each medium, in a vocabulary of its own (InstructBLIP, arXiv:2305.06500: BERT's).

It is the text of the turn in which the medium stands.  How it is tokenized is said by the `words` of the tower, a value
with `tokenizer`, `vocab` and `length` (connectors/qformer.py).
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mllm_jax.config import ConfigError
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.types import Turn


def said(turns: Iterable[Turn]) -> list[str]:
    """For each medium of these turns, in their order, the text of its turn."""
    return ["".join(p.text for p in turn.parts if p.kind == "text") for turn in turns for part in turn.parts if part.kind != "text"]


def tokens_of(text: str, words: Any) -> np.ndarray:
    """i32[n] with n <= words.length: begin token, text, end token; a text that is too long loses its beginning.

    Raises:
      ConfigError: the tokenizer cannot be loaded, or has more tokens than `words.vocab`.
    """
    backend, begin, end, vocab = _tokenizer(words.tokenizer)
    if vocab > words.vocab:
        raise ConfigError(f"the tokenizer {words.tokenizer!r} of the connector has {vocab} tokens and the connector room for {words.vocab}; "
                          "give its words that vocab")
    ids = backend.encode(text, add_special_tokens=False).ids
    return np.array([begin, *ids[max(0, len(ids) - words.length + 2) :], end], np.int32)


@lru_cache
def _tokenizer(name: str) -> tuple[Tokenizer, int, int, int]:
    """(one to which special tokens are text, id that begins, id that ends, size) of a tokenizer."""
    tokenizer = load_tokenizer(name, media=())
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    either = lambda special, other: other if special is None else special
    begin, end = either(tokenizer.cls_token_id, tokenizer.bos_token_id), either(tokenizer.sep_token_id, tokenizer.eos_token_id)
    return backend, begin, end, len(tokenizer)
