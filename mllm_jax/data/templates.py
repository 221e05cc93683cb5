"""Chat formats: turns -> token ids, and the weight of each in the loss.

A format is a Jinja string, ours and a tokenizer's own alike, so that ours can be exported as the
`chat_template` of a Hugging Face folder and both go through one path:

    turns -> messages -> rendered text, with the spans of the assistant -> ids, with the offsets -> weights

Whatever the assistant says is trained, with the token that ends its turn; the rest is not; `Turn.weight`
overrides.  The spans come from `{% generation %}` where the template has it, otherwise from the difference of
prefixes of the conversation, otherwise from marks around the text; where none of these works it is an error,
because a mask that is silently zero trains nothing.  Text is tokenized whole and never in pieces whose lengths
are added, for tokens merge across the seams.

What a user typed is text: `</s>` or `<image>` in a question becomes letters, not a special token.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer

from mllm_jax.config import ConfigError, nearest
from mllm_jax.data.errors import BadExample
from mllm_jax.data.formats import AROUND, MEDIUM, STOPS, TEMPLATES
from mllm_jax.data.tokenizer import PLACEHOLDERS, placeholder
from mllm_jax.types import Part, Turn

PAIRS = ("clip", "siglip")              # texts of contrastive pairs; see `encode_pair`

# Unicode noncharacters, which no text holds, mark places in the rendered text. They are gone before tokenizing.
_OPEN, _CLOSE, _MARK, _END_MARK, _LITERAL, _END_LITERAL = (chr(0xFDD0 + i) for i in range(6))
_NONCHARACTERS = {code: "\ufffd" for code in range(0xFDD0, 0xFDF0)}

Span = tuple[int, int, float]           # first character, after the last, weight


class Stand(NamedTuple):
    """What stands for a medium in the text: its placeholder as the template writes it, or another one, with text around it."""

    kind: str                           # of the medium
    token: str                          # whose placeholder it gets: "image" for a video whose frames are images to the tokenizer
    lead: str = ""
    tail: str = ""


class Template:
    """A chat format with the tokenizer that it is for; `turns` gives ids and weights.

    `name` is a key of TEMPLATES, or "tokenizer" for the tokenizer's own.  It pickles, and threads may share it.

    Raises:
      ConfigError: no such template, or the tokenizer has none of its own.
    """

    def __init__(self, name: str, tokenizer: Any):
        if name == "tokenizer" and not tokenizer.chat_template:
            raise ConfigError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; name one of: {', '.join(TEMPLATES)}")
        if name != "tokenizer" and name not in TEMPLATES and name not in PAIRS:
            known = [*TEMPLATES, *PAIRS, "tokenizer"]
            raise ConfigError(f"no template is called {name!r}; nearest: {nearest(name, known)}")
        self.name, self.tokenizer = name, tokenizer
        self.jinja = TEMPLATES.get(name, tokenizer.chat_template if name == "tokenizer" else "")
        for modality in PLACEHOLDERS:   # a tokenizer that came with another placeholder, such as <|image_pad|>
            if name in TEMPLATES and (own := getattr(tokenizer, f"{modality}_token", None)):
                self.jinja = self.jinja.replace(MEDIUM, f"({own!r} if part.type == {modality!r} else {MEDIUM})")
        self.values = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self.generation = re.search(r"\{%-?\s*generation\s*-?%\}", self.jinja) is not None
        # Others that were added, such as <loc0001>, are words.
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special = _either(special) if special else None
        self.reserved = _either(special | set(PLACEHOLDERS.values()))
        self.typed = name in TEMPLATES or (name == "tokenizer" and self._takes_parts())

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_both"}

    @property
    def pairs(self) -> bool:
        return self.name in PAIRS

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        ids = self._backends[0].encode(STOPS.get(self.name, ""), add_special_tokens=False).ids
        return tuple(dict.fromkeys([self.tokenizer.eos_token_id, *(ids if len(ids) == 1 else [])]))

    def piece(self, text: str) -> np.ndarray:
        """Ids i32[n] of a text of a layout, in which special tokens are known; the name of one token is that token."""
        known = self._backends[0]
        id = known.token_to_id(text)
        return np.array(known.encode(text, add_special_tokens=False).ids if id is None else [id], np.int32)

    def merges(self, text: str) -> tuple[bool, bool]:
        """Whether a tokenizer may join the beginning of a text with what stands before it, and its end with what follows."""
        spans = [match.span() for match in self.special.finditer(text)] if self.special else []
        return not spans or spans[0][0] > 0, not spans or spans[-1][1] < len(text)

    def turns(self, turns: Iterable[Turn], *, prompt: bool = False, media: Sequence[Stand] = ()) -> tuple[np.ndarray, np.ndarray]:
        """(ids i32[s], weights f32[s]) of a conversation; a medium is one placeholder token.

        With `prompt`, what the assistant is to continue follows, and nothing is trained; nor is the text around `media`, which
        are given in their order where there is any.

        Raises:
          BadExample: the template refuses the order of the roles.
          ConfigError: the template gives no spans for what the assistant says.
        """
        turns = list(turns)
        text, generated = self._render(turns, prompt)
        spans = [] if prompt else self._spans(turns, text, generated)
        if any(stand != Stand(stand.kind, stand.kind) for stand in media):
            text, spans = self._around(text, spans, media)
        ids, offsets, at = [], [], 0
        # Odd pieces are what a user typed that looks like a special token.
        for i, piece in enumerate(re.split(f"{_LITERAL}(.*?){_END_LITERAL}", text, flags=re.DOTALL)):
            at += i > 0                 # the mark that was split away
            encoding = self._backends[i % 2].encode(piece, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(at + a, at + b) for a, b in encoding.offsets]
            at += len(piece)
        start, end = np.array(offsets, np.int64).reshape(-1, 2).T
        weights = np.zeros(len(ids), np.float32)
        for first, last, weight in reversed(spans):     # a token across a border belongs to the earlier span
            weights[(start < last) & (end > first)] = weight
        return np.array(ids, np.int32), weights

    def _around(self, text: str, spans: list[Span], media: Sequence[Stand]) -> tuple[str, list[Span]]:
        """The text with what stands around its placeholders, and the spans there; what was put there has no weight."""
        written = {stand.kind: self._written(stand.kind) for stand in media}
        waiting = {token: [stand for stand in media if written[stand.kind] == token] for token in written.values()}
        out, at, moved, silent = [], 0, [], []
        for match in re.finditer(f"(?<!{_LITERAL})({_either(waiting).pattern})", text):
            if not waiting[match[0]]:
                break                   # more than there are media: the count is checked where they are put in
            stand = waiting[match[0]].pop(0)
            token = placeholder(self.tokenizer, stand.token)[0]
            start = match.start() + sum(more for _, more in moved)
            silent += [(start, start + len(stand.lead) + len(token) + len(stand.tail), 0.0)]
            moved.append((match.end(), len(stand.lead) + len(token) + len(stand.tail) - len(match[0])))
            out += [text[at : match.start()], stand.lead, token, stand.tail]
            at = match.end()
        shift = lambda place: place + sum(more for end, more in moved if end <= place)
        return "".join([*out, text[at:]]), [*silent, *((shift(start), shift(end), weight) for start, end, weight in spans)]

    def _spans(self, turns: list[Turn], text: str, generated: list[Span]) -> list[Span]:
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if self.generation:
            if len(generated) != len(answers):
                raise ConfigError(
                    f"the template {self.name!r} marks {len(generated)} spans for {len(answers)} assistant turns; "
                    "put {% generation %} around each of them"
                )
            found = dict(zip(answers, generated, strict=True))
        else:
            found = self._prefixes(turns, answers, text) or self._marked(turns, answers, text)
        others = [i for i, turn in enumerate(turns) if turn.weight is not None and turn.role != "assistant"]
        found |= self._marked(turns, others, text) if others else {}
        default = {i: 1.0 for i in answers}
        weight = {i: default.get(i, 0.0) if turns[i].weight is None else turns[i].weight for i in found}
        return [(start, end, float(weight[i])) for i, (start, end, *_) in found.items()]

    def _prefixes(self, turns: list[Turn], answers: list[int], text: str) -> dict[int, tuple[int, int]]:
        """What turn i adds to the turns before it and a prompt.

        Nothing if the template rewrites history, or if that does not begin with what the turn says: it
        ignores the wish for a prompt then, and the name of the role would be trained.
        """
        found = {}
        for i in answers:
            try:
                before, after = self._render(turns[:i], True)[0], self._render(turns[: i + 1], False)[0]
            except (BadExample, ConfigError):
                return {}
            said = self._content(turns[i].parts, False)
            said = said if isinstance(said, str) else next((p["text"] for p in said if p["type"] == "text"), "")
            if not (after.startswith(before) and text.startswith(after) and after[len(before) :].lstrip().startswith(said.strip())):
                return {}
            # The new line after the end token belongs to the format, and is not for the model to learn.
            found[i] = len(before), max(len(before), len(after.rstrip()))
        return found

    def _marked(self, turns: list[Turn], which: list[int], text: str) -> dict[int, tuple[int, int]]:
        """The text of these turns as it stands in the conversation, with an end token right behind it."""
        found = {}
        for i in which:
            marked = self._render(turns, False, mark=i)[0]
            start, end = marked.find(_MARK), marked.find(_END_MARK) - 1
            if start < 0 or end < start or marked.replace(_MARK, "").replace(_END_MARK, "") != text:
                raise ConfigError(
                    f"the template {self.name!r} does not show what turn {i} ({turns[i].role}) became; "
                    "put {% generation %} around what the assistant says"
                )
            stop = self.special.match(text, end) if self.special and turns[i].role == "assistant" else None
            found[i] = start, stop.end() if stop else end
        return found

    def _render(self, turns: list[Turn], prompt: bool, mark: int = -1) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans inside `{% generation %}`; literals stay marked."""
        messages = [{"role": t.role, "content": self._content(t.parts, i == mark)} for i, t in enumerate(turns)]
        try:
            raw = _compile(self.jinja).render(messages=messages, add_generation_prompt=prompt, **self.values)
        except jinja2.TemplateError as error:
            if type(error) is jinja2.TemplateError:     # raise_exception, in the template: it dislikes the roles
                raise BadExample("", "roles", f"the template {self.name!r} says: {error}") from error
            raise ConfigError(f"the template {self.name!r} fails: {error}") from error
        for token, wider in AROUND.items():
            if token in raw:
                raw = re.sub(f"(?<!{_LITERAL}){token}", lambda _: wider.format(image=placeholder(self.tokenizer, "image")[0]), raw)
        pieces, spans, at, start = [], [], 0, 0
        for piece in re.split(f"({_OPEN}|{_CLOSE})", raw):
            if piece == _OPEN:
                start = at
            elif piece == _CLOSE:
                spans.append((start, at, 1.0))
            else:
                pieces.append(piece)
                at += len(piece)
        return "".join(pieces), spans

    def _content(self, parts: tuple[Part, ...], mark: bool) -> str | list[dict[str, str]]:
        content = []
        for part in parts:
            if part.kind == "text":
                text = part.text.translate(_NONCHARACTERS)
                text = self.reserved.sub(lambda match: f"{_LITERAL}{match[0]}{_END_LITERAL}", text)
                content.append({"type": "text", "text": text})
            else:
                content.append({"type": part.kind, "text": self._written(part.kind)})
        if mark and content:            # inside the outer blanks, which many templates trim
            first, last = content[0], content[-1]
            lead = len(first["text"]) - len(first["text"].lstrip()) if first["type"] == "text" else None
            if lead is None or last["type"] != "text":
                raise ConfigError("a turn that begins or ends with a medium cannot have a weight of its own; move the medium inside")
            first["text"] = first["text"][:lead] + _MARK + first["text"][lead:]
            trail = len(last["text"].rstrip())
            last["text"] = last["text"][:trail] + _END_MARK + last["text"][trail:]
        if not self.typed or all(part["type"] == "text" for part in content):
            return "".join(part["text"] for part in content)
        return [part if part["type"] == "text" else {"type": part["type"]} for part in content]

    def _written(self, kind: str) -> str:
        """The placeholder of a medium in rendered text; a token, unless the medium stands behind that of another kind."""
        return getattr(self.tokenizer, f"{kind}_token", None) or PLACEHOLDERS[kind]

    def _takes_parts(self) -> bool:
        """Whether a tokenizer's own template reads lists of typed parts: it is shown one."""
        content = [{"type": "image"}, {"type": "text", "text": "probe"}]
        try:
            raw = _compile(self.jinja).render(messages=[{"role": "user", "content": content}], **self.values)
        except (jinja2.TemplateError, TypeError):
            return False
        return "probe" in raw and "'probe'" not in raw and '"probe"' not in raw

    @property
    def _backends(self) -> tuple[Tokenizer, Tokenizer]:
        """Two tokenizers: one that knows special tokens, one to which they are text."""
        if "_both" not in self.__dict__:
            literal = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
            literal.encode_special_tokens = True
            known = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
            for backend in (literal, known):
                backend.no_padding()
                backend.no_truncation()
            self._both = (known, literal)
        return self._both


def encode_pair(text: str, template: Template, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids i32[s], weights f32[s]) of one text of a contrastive pair.

    "clip": begin and end token, cut to `length`; what is left of the row is padding.  "siglip": lower case without
    punctuation, end token, filled to exactly `length` with padding that the model does see (arXiv:2303.15343).
    The text and its end have weight 1, for captioning objectives beside the contrastive one.
    """
    tokenizer = template.tokenizer
    begin = tokenizer.bos_token_id if template.name == "clip" else None
    if template.name == "siglip":
        text = " ".join(re.sub(r"[!-/:-@\[-`{-~]", "", text.lower()).split())
    ids = template._backends[1].encode(text, add_special_tokens=False).ids
    begin = [] if begin is None else [begin]
    ids = begin + ids[: length - len(begin) - 1] + [tokenizer.eos_token_id]
    weights = [0.0] * len(begin) + [1.0] * (len(ids) - len(begin))
    if template.name == "siglip":
        weights += [0.0] * (length - len(ids))
        ids += [tokenizer.pad_token_id] * (length - len(ids))
    return np.array(ids, np.int32), np.array(weights, np.float32)


def chat_template(name: str, tokenizer: Any) -> str:
    """The Jinja string to export as the tokenizer's `chat_template`; "" for pairs, which have none, and where a processor writes it."""
    return "" if name == "paligemma" else Template(name, tokenizer).jinja


def generation(name: str, tokenizer: Any) -> dict[str, int | list[int]]:
    """What generation_config.json says of the end of an answer, so that transformers stops where we do."""
    stops = list(Template(name, tokenizer).stops)
    return {"eos_token_id": stops if len(stops) > 1 else stops[0]}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` as marks in the text.

    `transformers` tracks positions in the compiled template instead, which threads cannot share.
    """

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = lambda text: jinja2.nodes.Output([jinja2.nodes.TemplateData(text)]).set_lineno(line)
        return [mark(_OPEN), *body, mark(_CLOSE)]


def _either(tokens: Iterable[str]) -> re.Pattern:
    """Any of these, the longest where several begin alike."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


@lru_cache(maxsize=32)
def _compile(text: str) -> jinja2.Template:
    """The template in the environment that `transformers` gives to chat templates."""

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    dump = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = dump
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda f: datetime.now().strftime(f)}
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"a chat template does not parse, line {error.lineno}: {error.message}") from error
