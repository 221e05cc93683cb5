"""Samples of a run: questions with their pictures and what the model answered, small enough for a page."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mllm_jax.data.images import decode_image
from mllm_jax.data.record import read_blob
from mllm_jax.evaluation.tasks import answers_of, question_of
from mllm_jax.types import Blob, Example

SIDE = 256                              # pixels of the longer side at most


def write_samples(path: Path, examples: Sequence[Example], predictions: Sequence[str]) -> None:
    """A line for each example: id, kind, question, answers, prediction, and its images in one PNG as a data URI."""
    lines = []
    for e, prediction in zip(examples, predictions, strict=True):
        images = [blob for blob in e.media if blob.kind == "image"]
        lines.append(json.dumps({
            "id": e.id, "kind": e.kind, "question": question_of(e), "answers": list(answers_of(e)), "prediction": prediction,
            "image": _picture(images) if images else None}, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


def _picture(blobs: Sequence[Blob]) -> str:
    """Images side by side."""
    each = [Image.fromarray(decode_image(read_blob(blob))) for blob in blobs]
    for image in each:
        image.thumbnail((SIDE, SIDE))
    gap = 4 if len(each) > 1 else 0
    whole = Image.new("RGB", (sum(i.width + gap for i in each) - gap, max(i.height for i in each)), (255, 255, 255))
    left = 0
    for image in each:
        whole.paste(image, (left, (whole.height - image.height) // 2))
        left += image.width + gap
    out = io.BytesIO()
    whole.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
