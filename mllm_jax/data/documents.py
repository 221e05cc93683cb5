"""Web documents of text and images -> the one turn of an Example, which is as if the assistant had written it.

    OBELICS   {texts: [text | None, ...], images: [None | image, ...]}      at every place one of the two (arXiv:2306.16527)
    MMC4      {text_list: [sentence, ...], image_info: [{image_base64 | image_name, matched_text_index, matched_sim}, ...]}
              an image stands before the sentence that it matches best (arXiv:2304.06939, section 3)
"""

import base64
import binascii
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from mllm_jax.data.errors import BadExample
from mllm_jax.types import Part, Turn


def is_document(raw: Mapping[str, Any]) -> bool:
    paragraphs, images = raw.get("texts"), raw.get("images")
    lists = isinstance(paragraphs, (list, tuple)) and isinstance(images, (list, tuple)) and len(paragraphs) == len(images)
    return "text_list" in raw or bool(lists and all(isinstance(t, (str, type(None))) for t in paragraphs))


def document(
    id: str, raw: Mapping[str, Any], place: Callable[[Any], Part], *, similarity: float = 0.0, most: int | None = None,
) -> tuple[Turn, ...]:
    """The turn of a document.

    Args:
      place: gives the part of an image that is meant by bytes or a path.
      similarity: images of MMC4 that match their sentence less are left out.
      most: as are those behind so many.

    Raises:
      BadExample: an image matches a sentence that is not there, is not base64, or two stand in one place with a text.
    """
    pieces = _matched(id, raw, similarity) if "text_list" in raw else _side_by_side(id, raw)
    late = [i for i, piece in enumerate(pieces) if not isinstance(piece, str)][most:] if most is not None else []
    parts = [Part(text=x) if isinstance(x, str) else place(x[0]) for i, x in enumerate(pieces) if i not in late]
    # Sentences side by side are still sentences; what is between a text and an image is the template's to say.
    gap, out = " " if "text_list" in raw else "\n\n", parts[:1]
    for before, part in pairwise(parts):
        if before.kind == part.kind == "text":
            out[-1] = Part(text=out[-1].text + gap + part.text)
        else:
            out.append(part)
    if not out:
        raise BadExample(id, "no_text", "the document is empty")
    return (Turn(role="assistant", parts=tuple(out)),)


Piece = str | tuple[Any]                # a text, or what is meant by an image


def _side_by_side(id: str, raw: Mapping[str, Any]) -> list[Piece]:
    out: list[Piece] = []
    for i, (text, image) in enumerate(zip(raw["texts"], raw["images"], strict=True)):
        if text and image:
            raise BadExample(id, "malformed", f"place {i} of the document has a text and an image; one of the two is None")
        out += [text or (image,)] if text or image else []
    return out


def _matched(id: str, raw: Mapping[str, Any], similarity: float) -> list[Piece]:
    sentences, before = raw["text_list"], {}
    for info in raw.get("image_info") or ():
        at = info.get("matched_text_index")
        if not isinstance(at, int) or not 0 <= at < len(sentences):
            raise BadExample(id, "malformed", f"an image matches sentence {at} of {len(sentences)}")
        if info.get("matched_sim", 1.0) >= similarity:
            before.setdefault(at, []).append((_image(id, info),))
    return [piece for i, sentence in enumerate(sentences) for piece in (*before.get(i, ()), sentence)]


def _image(id: str, info: Mapping[str, Any]) -> Any:
    if not info.get("image_base64"):
        return info.get("image_name")
    try:
        return base64.b64decode(info["image_base64"], validate=True)
    except binascii.Error as error:
        raise BadExample(id, "decode", "the image_base64 of an image is not base64") from error
