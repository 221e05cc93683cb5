"""Tokenizers: made here ("bytes", "bpe:SIZE"), or read from a folder or the hub.

Every tokenizer is a fast one of `transformers`, so that it can be saved beside exported weights, and has a
padding, an end and, for each modality asked for, a placeholder token: `<image>` stands where the tokens of an
image will be.  Torch is not needed.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mllm_jax.config import ConfigError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}


def load_tokenizer(
    name: str, texts: Iterable[str] | None = None, *, media: Sequence[str] = ("image",), tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """The tokenizer of that name, with the placeholders of `media` and the special `tokens` of a template.

    Args:
      name: "bytes" (a token for each byte), "bpe:SIZE" (byte-level pairs merged on `texts`; digits stay single,
        a word includes the space before it), a folder, or "hf://name".
      texts: what "bpe:SIZE" is trained on; the same texts in any order give the same tokenizer.
      media: modalities of the model.
      tokens: more special tokens to have, added where missing (`formats.TOKENS[template]`).

    Raises:
      ConfigError: no such tokenizer, one without an end token, or "bpe:SIZE" without texts or too small.
    """
    # The end is not number 2, in which transformers sees an old CLIP that ends where the largest number is.
    special = [PAD, EOS, BOS, *(PLACEHOLDERS[m] for m in media), *tokens]
    if name == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        model = models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[])
        return _wrap(Tokenizer(model), special)
    if name.startswith("bpe:"):
        return _wrap(_train(name, texts, special), special)
    tokenizer = _read(name)
    for own, of_bert in (("bos_token", "cls_token"), ("eos_token", "sep_token")):
        if getattr(tokenizer, own) is None and getattr(tokenizer, of_bert, None) is not None:
            setattr(tokenizer, own, getattr(tokenizer, of_bert))
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer {name!r} has no end token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token is None:     # never trained and never seen, so any id will do and none need be added
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    known = tokenizer.get_vocab()
    if own := getattr(tokenizer, "context_image_token", None):  # InternVL's word for it
        tokenizer.image_token = own
    for m, name in PLACEHOLDERS.items():    # Qwen's say nowhere that they have such tokens; its processors know the names
        if not getattr(tokenizer, f"{m}_token", None) and name not in known and f"<|{m}_pad|>" in known:
            setattr(tokenizer, f"{m}_token", f"<|{m}_pad|>")
    wanted = [PLACEHOLDERS[m] for m in media if not getattr(tokenizer, f"{m}_token", None)] + list(tokens)
    missing = [AddedToken(t, special=True, normalized=False) for t in wanted if t not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def placeholder(tokenizer: PreTrainedTokenizerFast, modality: str) -> tuple[str, int]:
    """The token that stands for one medium of this modality, and its id.

    Raises:
      ConfigError: the tokenizer has none.
    """
    token = getattr(tokenizer, f"{modality}_token", None) or PLACEHOLDERS[modality]
    id = tokenizer.backend_tokenizer.token_to_id(token)
    if id is None:
        raise ConfigError(f"the tokenizer has no {token}; load it with media={(modality,)!r}")
    return token, id


def _wrap(backend: Tokenizer, special: list[str]) -> PreTrainedTokenizerFast:
    # The digits come first: splitting after ByteLevel would see its letters, not the text.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _train(name: str, texts: Iterable[str] | None, special: list[str]) -> Tokenizer:
    size = name.removeprefix("bpe:")
    if not re.fullmatch(r"\d+", size) or int(size) < 256 + len(special):
        raise ConfigError(f"{name!r} is not a tokenizer; write bpe:SIZE with SIZE at least {256 + len(special)}")
    if texts is None:
        raise ConfigError(f"{name!r} is trained on text and was given none; pass texts, or load the folder where it is")
    backend = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=int(size), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _read(name: str) -> PreTrainedTokenizerFast:
    # It brings torch with it, where that is installed: a second, and a program may need none.
    from transformers import AutoTokenizer

    path = name.removeprefix("hf://")
    if not name.startswith("hf://") and not Path(path).is_dir():
        raise ConfigError(f"{name!r} is not a tokenizer: write bytes, bpe:SIZE, hf://name, or a folder that exists")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer {name!r} has no tokenizer.json; save its fast version beside it")
    return tokenizer
