"""One raw record (a dict, as JSON, Parquet or TFDS give it) -> one Example.

What is understood, by the keys that are there:

    conversations: [{from: human|gpt|system, value}]        LLaVA, ShareGPT; with image(s), video(s), audio(s)
    messages:      [{role, content: str | [part, ...]}]     chat, OpenAI and Anthropic parts
    texts:         [{user, assistant}]                      The Cauldron, FineVision; all images come first
    question / answer(s), instruction / output, query / response     one question
    caption(s) / text                                       pairs of an image and its alternative texts
    chosen, rejected                                        preference: two continuations
    texts and images side by side, text_list and image_info     documents: see documents.py

Placeholders (`<image>`, `<video>`, `<audio>`) become Parts here, once, and must agree in number with the media;
nothing downstream looks for them in text again.  Text of typed parts is text, whatever it says.
"""

import base64
import binascii
import io
import json
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from mllm_jax.data.documents import document, is_document
from mllm_jax.data.errors import BadExample
from mllm_jax.types import Blob, Example, Part, Turn

MEDIA = ("image", "video", "audio")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_PLACEHOLDER = re.compile("(<image>|<video>|<audio>)")
_REPLIES = {"question": ("answer", "answers"), "query": ("response",), "instruction": ("output",)}
_CAPTIONS = ("caption", "captions", "text")
_READ = {"id", "conversations", "messages", "texts", "system", "prompt", "chosen", "rejected", "input", "kind"}
_READ |= {"text_list", "image_info", "similarity_matrix", *_CAPTIONS, *_REPLIES, *sum(_REPLIES.values(), ()), *MEDIA, *(f"{kind}s" for kind in MEDIA)}
EXTRA_BYTES = 4096


def parse(
    raw: Mapping[str, Any] | Example,
    *,
    id: str,
    source: str,
    root: Path | None = None,
    placement: str = "keep",
    placeholders: str = "strict",
    similarity: float = 0.0,
    most: int | None = None,
) -> Example:
    """The Example of a raw record; an Example passes as it is.

    `root` is the folder of relative media paths.  `placement="front"` moves the images of a turn before its
    text, as LLaVA-1.5 does.  `placeholders="prepend"` puts media without any placeholder at the start of the
    first user turn instead of refusing the record.  `similarity` and `most` choose images of a document, see
    `documents.document`.  Keys that are not read are kept in `extra`, up to 4 KB.

    Raises:
      BadExample: the record does not follow its convention; the reasons are those of `errors.REASONS`.
    """
    if isinstance(raw, Example):
        return raw
    if not isinstance(raw, Mapping):
        raise BadExample(id, "malformed", f"a record must be a dict; this is {type(raw).__name__} {str(raw)[:40]!r}")
    if is_document(raw):
        media = _Media(id, {}, root)
        turns = document(id, raw, lambda ref: Part(kind="image", media=media.add("image", ref)), similarity=similarity, most=most)
        return Example(id=id, turns=turns, media=tuple(media.blobs), source=source, extra=_extra(raw))
    media = _Media(id, raw, root)
    turns = _turns(id, raw, media, placeholders)
    if placement == "front":
        turns = tuple(_front(turn) for turn in turns)
    captions = _texts(next((raw[key] for key in _CAPTIONS if raw.get(key)), ()))
    if not turns and not captions:
        keys = ", ".join(sorted(map(str, raw))) or "none"
        raise BadExample(id, "no_text", f"no conversation, question or caption among its keys: {keys}")
    if turns:
        media.finish()
    answers = _texts(raw["answers"] if raw.get("answers") is not None else raw.get("answer") or ())
    return Example(
        id=id,
        turns=turns,
        media=tuple(media.blobs),
        captions=captions,
        answers=answers,
        chosen=_continuation(id, "chosen", raw.get("chosen"), media),
        rejected=_continuation(id, "rejected", raw.get("rejected"), media),
        kind=str(raw.get("kind") or ""),
        source=source,
        extra=_extra(raw),
    )


class _Media:
    """The media of one record, handed out in the order of their placeholders."""

    def __init__(self, id: str, raw: Mapping, root: Path | None):
        self.id, self.root = id, root
        self.blobs: list[Blob] = []
        self.waiting: dict[str, list[int]] = {}         # kind -> indices that no placeholder has claimed yet
        self.listed: dict[str, int] = {}
        self.seen = dict.fromkeys(MEDIA, 0)
        for kind in MEDIA:
            value = raw.get(kind) if raw.get(kind) is not None else raw.get(f"{kind}s")
            # One path is one medium, not a list of its letters.
            refs = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
            self.waiting[kind] = [self.add(kind, ref) for ref in refs]
            self.listed[kind] = len(refs)

    def add(self, kind: str, ref: Any) -> int:
        self.blobs.append(blob(self.id, kind, ref, self.root))
        return len(self.blobs) - 1

    def claim(self, kind: str) -> Part:
        """The place of the next listed medium of this kind."""
        self.seen[kind] += 1
        return Part(kind=kind, media=self.waiting[kind].pop(0) if self.waiting[kind] else -1)

    def split(self, text: str) -> tuple[Part, ...]:
        """Text with placeholders as Parts.

        A record without videos may speak of the HTML tag `<video>`; that is text.  `<image>` is no such
        tag, and always stands for an image.
        """
        parts = []
        for piece in _PLACEHOLDER.split(text):
            kind = piece[1:-1]
            if _PLACEHOLDER.fullmatch(piece) and (kind == "image" or self.listed[kind]):
                parts.append(self.claim(kind))
            elif piece:
                parts.append(Part(text=piece))
        return _merge(parts)

    def prepended(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """Media that no placeholder claimed, at the start of the first user turn."""
        parts = tuple(self.claim(kind) for kind in MEDIA for _ in list(self.waiting[kind]))
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
        return tuple(
            Turn(role=turn.role, parts=parts + turn.parts, weight=turn.weight) if i == first else turn
            for i, turn in enumerate(turns)
        )

    def finish(self) -> None:
        for kind in MEDIA:
            if self.seen[kind] != self.listed[kind]:
                detail = f"{self.seen[kind]} placeholders <{kind}> for {self.listed[kind]} {kind}s"
                raise BadExample(self.id, "placeholders", detail)


def blob(id: str, kind: str, ref: Any, root: Path | None) -> Blob:
    """The encoded medium that a record means by a path, a data: URI, bytes, {bytes, path} or a decoded image."""
    if isinstance(ref, Mapping):
        ref = ref.get("bytes") or ref.get("path") or ref.get("url") or ref.get("data")
    if isinstance(ref, (bytes, bytearray)) and ref:
        return Blob(kind=kind, data=bytes(ref))
    if isinstance(ref, str) and ref.startswith("data:"):
        return Blob(kind=kind, data=_base64(id, ref.partition("base64,")[2]))
    if isinstance(ref, str) and re.match(r"https?://", ref):
        raise BadExample(id, "missing_file", f"{ref[:80]} is an address; download it and give the path")
    if isinstance(ref, (str, Path)) and str(ref):
        return Blob(kind=kind, path=str((root or Path()) / str(ref).removeprefix("file://")))
    if hasattr(ref, "save"):            # a decoded PIL image, as Hugging Face `datasets` gives it
        out = io.BytesIO()
        ref.save(out, "PNG")
        return Blob(kind=kind, data=out.getvalue())
    found = f"{str(ref)[:40]!r} ({type(ref).__name__})"
    raise BadExample(id, "malformed", f"{found} is no {kind}; write a path, bytes or a data: URI")


def _turns(id: str, raw: Mapping, media: _Media, placeholders: str) -> tuple[Turn, ...]:
    messages = _messages(id, raw)
    if messages is None:
        return ()
    turns = [_turn(id, message, media) for message in messages]
    if raw.get("system"):
        turns.insert(0, Turn(role="system", parts=(Part(text=str(raw["system"])),)))
    turns = _alternating(id, turns)
    no_placeholder = not any(media.seen.values())
    columns = raw.get("conversations") is None and raw.get("messages") is None
    # `texts` and question/answer columns have no placeholders by convention: their images come first.
    if no_placeholder and (columns or placeholders == "prepend"):
        turns = media.prepended(turns)
    return turns


def _messages(id: str, raw: Mapping) -> list[Mapping] | None:
    """The conversation as a list of messages, or None if the record has none."""
    for key in ("conversations", "messages", "prompt"):
        if (value := _maybe_json(raw.get(key))) is not None:
            if key == "prompt" and isinstance(value, str):
                return [{"role": "user", "content": value}]
            return _maps(id, key, value)
    if raw.get("texts") is not None and not _strings(raw["texts"]):
        pairs = _maps(id, "texts", raw["texts"])
        return [{"role": role, "content": pair.get(role)} for pair in pairs for role in ("user", "assistant")]
    for ask, replies in _REPLIES.items():
        if raw.get(ask) is not None:
            question = f"{raw[ask]}\n{raw['input']}" if raw.get("input") else str(raw[ask])
            answers = [answer for key in replies for answer in _texts(raw.get(key) or ())]
            return [{"role": "user", "content": question}, *({"role": "assistant", "content": a} for a in answers[:1])]
    return None


def _maps(id: str, key: str, value: Any) -> list[Mapping]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, Mapping) for m in value) or not value:
        raise BadExample(id, "malformed", f"{key} must be a list of maps, one a turn; found {str(value)[:60]!r}")
    return list(value)


def _strings(value: Any) -> bool:
    """OBELICS calls its paragraphs `texts` too."""
    return isinstance(value, (list, tuple)) and all(isinstance(v, (str, type(None))) for v in value)


def _turn(id: str, message: Mapping, media: _Media) -> Turn:
    name = message.get("role", message.get("from"))
    if name not in ROLES:
        raise BadExample(id, "roles", f"{name!r} is no role; known: {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if isinstance(content, str):
        parts = media.split(content)
    elif isinstance(content, (list, tuple)):
        parts = _merge(_part(id, part, media) for part in content)
    else:
        raise BadExample(id, "malformed", f"a message of {name} has content {str(content)[:40]!r}; write text or parts")
    weight = message.get("weight", message.get("loss_scale"))
    if weight is None and message.get("loss") is not None:
        weight = float(message["loss"])
    return Turn(role=ROLES[name], parts=parts, weight=weight if weight is None else float(weight))


def _part(id: str, raw: Any, media: _Media) -> Part:
    """A typed part: {type: text, text}, {type: image}, {type: image, image: ref}, {type: image_url, image_url: {url}},
    {type: image, source: {type: base64, data}}, {type: input_audio, input_audio: {data}}."""
    if isinstance(raw, str):
        return Part(text=raw)
    sort = str(raw.get("type", "text")) if isinstance(raw, Mapping) else type(raw).__name__
    if sort in ("text", "input_text", "output_text"):
        return Part(text=str(raw.get("text") if raw.get("text") is not None else raw.get("value") or ""))
    kind = sort.removeprefix("input_").removesuffix("_url")
    if kind not in MEDIA:
        raise BadExample(id, "malformed", f"a part has type {sort!r}; known: text, {', '.join(MEDIA)}")
    keys = (sort, kind, f"{kind}_url", "url", "path", "value", "source")
    ref = next((raw[key] for key in keys if raw.get(key) is not None), None)
    if ref is None:
        return media.claim(kind)
    if isinstance(ref, Mapping) and isinstance(ref.get("data"), str):
        ref = _base64(id, ref["data"])
    return Part(kind=kind, media=media.add(kind, ref))


def _alternating(id: str, turns: list[Turn]) -> tuple[Turn, ...]:
    """The turns without a leading answer; the order of the roles is checked."""
    start = 1 if turns and turns[0].role == "system" else 0
    if len(turns) > start + 1 and turns[start].role == "assistant":
        del turns[start]                # LLaVA's data has some; its own code drops them
    roles = [turn.role for turn in turns]
    chat = roles[1:] if roles[:1] == ["system"] else roles
    ordered = chat[:1] == ["user"] and "system" not in chat
    if not ordered or any(a == b and a != "tool" for a, b in pairwise(chat)):
        raise BadExample(id, "roles", f"the turns are {', '.join(roles) or 'none'}")
    return tuple(turns)


def _front(turn: Turn) -> Turn:
    """The media first, then a line break and the text, stripped: `preprocess_multimodal` of LLaVA-1.5."""
    media = tuple(part for part in turn.parts if part.kind != "text")
    if not media:
        return turn
    text = "".join(part.text for part in turn.parts if part.kind == "text").strip()
    return Turn(role=turn.role, parts=media + ((Part(text=f"\n{text}"),) if text else ()), weight=turn.weight)


def _continuation(id: str, key: str, raw: Any, media: _Media) -> tuple[Turn, ...]:
    if raw is None:
        return ()
    if isinstance(raw, str):
        raw = {"role": "assistant", "content": raw}
    return tuple(_turn(id, message, media) for message in _maps(id, key, [raw] if isinstance(raw, Mapping) else raw))


def _merge(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Neighbouring texts as one, so that the same words make the same Parts however they were written."""
    out: list[Part] = []
    for part in parts:
        if part.kind == "text" and not part.text:
            continue
        if out and part.kind == out[-1].kind == "text":
            out[-1] = Part(text=out[-1].text + part.text)
        else:
            out.append(part)
    return tuple(out)


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, int, float)):
        return (str(value),)
    if not isinstance(value, (list, tuple)):
        return ()
    return tuple(str(v.get("text", v.get("answer"))) if isinstance(v, Mapping) else str(v) for v in value)


def _maybe_json(value: Any) -> Any:
    """Some Parquet files keep a conversation as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _base64(id: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise BadExample(id, "decode", f"{len(text)} letters that begin with {text[:12]!r} are not base64") from error


def _extra(raw: Mapping) -> dict[str, Any]:
    """Keys that are not read here and whose values are plain and short; the given id under "id"."""
    out = {key: value for key, value in raw.items() if key not in _READ and value is not None and _plain(value)}
    return out | ({"id": str(raw["id"])} if raw.get("id") is not None else {})


def _plain(value: Any) -> bool:
    if isinstance(value, (str, int, float)):
        return len(str(value)) <= EXTRA_BYTES
    flat = isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value)
    return flat and sum(len(str(v)) for v in value) <= EXTRA_BYTES
