"""Built-in scenes of coloured shapes: PNG images with captions and a question, drawn when asked for.

They stand in for any data set where nothing may be downloaded: `--tiny` recipes and tests train on them. A
scene is one to three shapes in different cells of a 3 x 3 grid; the caption names all of them with their
places, so that nearly every caption fits one image only, and the question cannot be answered without
looking. Scene i is a pure function of (seed, i).
"""

import io

import numpy as np
from PIL import Image, ImageDraw

from mllm_jax.types import Blob, Example, Part, Turn

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 180),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")


class Shapes:
    """`count` scenes of `size` x `size` pixels; `scenes[i]` is an Example with one image, captions and one question."""

    def __init__(self, count: int = 4096, size: int = 64, seed: int = 0):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        cells = sorted(rng.choice(9, size=rng.choice([1, 2, 3], p=[0.15, 0.5, 0.35]), replace=False).tolist())
        # Different shapes, so that "what colour is the circle" has one answer.
        shapes = rng.permutation(SHAPES)[: len(cells)].tolist()
        colours = rng.choice(list(COLOURS), size=len(cells)).tolist()
        kind, question, answer = _question(cells, shapes, colours, rng)
        things = [f"{colour} {shape}" for colour, shape in zip(colours, shapes)]
        places = [f"{thing} {PLACES[cell]}" for thing, cell in zip(things, cells)]
        return Example(
            id=f"shapes/{self.seed}/{index:05d}",
            turns=(
                Turn(role="user", parts=(Part(kind="image", media=0), Part(text=f"\n{question}"))),
                Turn(role="assistant", parts=(Part(text=answer),)),
            ),
            media=(Blob(kind="image", data=self._draw(cells, shapes, colours, rng)),),
            captions=(", ".join(places), f"a drawing of {', '.join(things)}"),
            answers=(answer,),
            kind=kind,
            source="shapes",
        )

    def _draw(self, cells: list[int], shapes: list[str], colours: list[str], rng: np.random.Generator) -> bytes:
        image = Image.new("RGB", (self.size, self.size), tuple(rng.integers(225, 256, 3).tolist()))
        pen = ImageDraw.Draw(image)
        cell_size = self.size / 3
        for cell, shape, colour in zip(cells, shapes, colours):
            x, y = (cell % 3 + 0.5) * cell_size, (cell // 3 + 0.5) * cell_size
            x, y = (v + rng.uniform(-0.08, 0.08) * cell_size for v in (x, y))
            _draw_shape(pen, shape, x, y, rng.uniform(0.3, 0.42) * cell_size, COLOURS[colour])
        out = io.BytesIO()
        image.save(out, "PNG", compress_level=1)
        return out.getvalue()


def _question(
    cells: list[int], shapes: list[str], colours: list[str], rng: np.random.Generator
) -> tuple[str, str, str]:
    """(kind, question, answer) about one of the shapes, or about their number."""
    i = rng.integers(len(shapes))
    return (
        ("colour", f"What colour is the {shapes[i]}?", colours[i]),
        ("shape", f"Which shape is at the {PLACES[cells[i]]}?", shapes[i]),
        ("place", f"Where is the {shapes[i]}?", PLACES[cells[i]]),
        ("count", "How many shapes are there?", str(len(shapes))),
    )[rng.integers(4)]


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    match shape:
        case "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        case "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
        case "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
        case "cross":
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
