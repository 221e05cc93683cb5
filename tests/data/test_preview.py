"""The page shows what is in the batch."""

import base64
import io
import re

import numpy as np
from PIL import Image

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.loader import Loader
from mllm_jax.data.preview import preview
from mllm_jax.data.sources.shapes import Shapes
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.recipe import Data

VIT = ViTConfig(width=8, heads=1, mlp=8, patch=16, grid=4, depth=1)
SPLICED = {"image": TowerConfig(view=Square(size=64), encoder=VIT, connector=MLPConfig())}
POOLED = {"image": TowerConfig(view=Square(size=64), encoder=VIT, route="pool")}
TOKENIZER = load_tokenizer("bytes")


def page(template: str, towers: dict) -> tuple[str, object]:
    data = Data(sources={"shapes": 1.0}, batch_size=2, seq_len=160, items={"image": 3}, template=template)
    with iter(Loader(data, towers, TOKENIZER, rows=2, exact=True)) as batches:
        rows = next(batches)
    return preview(rows, TOKENIZER, towers, title="<a stage>"), rows


def images(text: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_the_page_shows_every_image_and_marks_the_answers():
    text, rows = page("plain", SPLICED)
    source = {example.id: example for example in (Shapes()[i] for i in range(4096))}
    shown = [source[id] for ids in rows.info.ids for id in ids]
    marked = re.sub(r"<span[^>]*>|</span>", "", "".join(re.findall(r"<mark>(.*?)</mark>", text)[1:]))
    assert marked == "".join(f"{e.answers[0]}&lt;/s&gt;" for e in shown)
    pictures = images(text)
    assert len(pictures) == len(shown)
    for picture, example in zip(pictures, shown, strict=True):
        original = np.asarray(Image.open(io.BytesIO(example.media[0].data)).convert("RGB"))
        np.testing.assert_array_equal(picture, original)
    assert "16 tokens at 1-16, slots 0-15" in text and "slots 16-31" in text


def test_the_page_stands_alone_and_escapes_what_it_shows():
    text, _ = page("plain", SPLICED)
    assert "&lt;a stage&gt;" in text and "<a stage>" not in text
    assert "http" not in text and "<script" not in text


def test_pairs_show_their_image_beside_the_row():
    text, _ = page("siglip", POOLED)
    assert len(images(text)) == 2 and text.count("beside the row") == 2
    assert re.search(r"&lt;pad&gt; x \d+", text)
