"""Built-in scenes of real handwritten digits, with captions and questions: the data of the recipe first/digits.

The digits are the 1,797 images of the UCI set that scikit-learn ships (E. Alpaydin, C. Kaynak, 1998; 8x8
pixels, 17 greys).  Every fifth one is kept for the split "test", so that held-out scenes hold digits whose
very images were never seen in training.  A scene has one to four digits in the cells of a 2 x 2 grid,
each scaled, shifted and shaded by chance.  Scene i is a pure function of (split, seed, i).
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image

from mllm_jax.config import ConfigError
from mllm_jax.types import Blob, Example, Part, Turn

PLACES = ("northwest", "northeast", "southwest", "southeast")
KINDS = ("which", "count", "larger", "sum", "read")
SPLITS = ("train", "test")
CELL = 16


class Digits:
    """`count` scenes of 32x32 pixels; `scenes[i]` is a conversation about one of them.

    Args:
      split: "train" or "test".
      describe: it begins with a description, which is also the caption.
      questions: how many questions of different kinds follow; with one, the kinds follow one another.
      image: False for words alone: the description stands in the place of the image.
    """

    def __init__(
        self, split: str = "train", count: int = 100_000, *, describe: bool = False, questions: int = 1, image: bool = True,
        seed: int = 0,
    ):
        if split not in SPLITS:
            raise ConfigError(f"digits has no split {split!r}; it has: {', '.join(SPLITS)}")
        if not describe and not questions:
            raise ConfigError("digits needs describe=true or questions above 0; otherwise nothing is said")
        self.split, self.count, self.seed = split, count, seed
        self.describe, self.questions, self.image = describe, questions, image

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        rng = np.random.Generator(np.random.Philox(key=[self.seed * 2 + SPLITS.index(self.split), index]))
        # The first question decides what the scene must have, so that every kind can be asked about equally often.
        first = KINDS[index % len(KINDS)]
        cells = _cells(first, rng)
        pictures, labels = _images(self.split)
        chosen = rng.integers(len(labels), size=4)
        digits = {c: int(labels[chosen[c]]) for c in cells}
        caption = ", ".join(f"{PLACES[c]} {d}" for c, d in digits.items())
        said = [("describe", "Describe the scene.", caption)] if self.describe else []
        others = [k for k in KINDS if k != first and _possible(k, cells)]
        kinds = [first, *rng.permutation(others).tolist()][: self.questions]
        said += [(kind, *_ask(kind, digits, rng)) for kind in kinds]
        turns: list[Turn] = []
        for i, (_, question, answer) in enumerate(said):
            scene = Part(kind="image", media=0) if self.image else Part(text=f"{caption}. ")
            parts = (scene, Part(text=question)) if i == 0 else (Part(text=question),)
            turns += [Turn(role="user", parts=parts), Turn(role="assistant", parts=(Part(text=answer),))]
        picture = _draw({c: pictures[chosen[c]] for c in cells}, rng) if self.image else b""
        return Example(
            id=f"digits/{self.split}/{self.seed}/{index:06d}",
            turns=tuple(turns),
            media=(Blob(kind="image", data=picture),) if self.image else (),
            captions=(caption,),
            answers=(said[-1][2],),
            kind=said[-1][0],
            source=f"digits_{self.split}",
        )


def _cells(kind: str, rng: np.random.Generator) -> list[int]:
    while True:
        cells = sorted(rng.choice(4, size=rng.integers(1, 5), replace=False).tolist())
        if _possible(kind, cells):
            return cells


def _possible(kind: str, cells: list[int]) -> bool:
    if kind in ("larger", "sum"):
        return len(cells) >= 2
    return bool(_full_rows(cells)) if kind == "read" else True


def _full_rows(cells: list[int]) -> list[int]:
    return [r for r in (0, 1) if {2 * r, 2 * r + 1} <= set(cells)]


def _ask(kind: str, digits: dict[int, int], rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer) of this kind about the digits in these cells."""
    cells = list(digits)
    if kind == "which":
        cell = int(rng.choice(cells))
        return f"Which digit is in the {PLACES[cell]}?", str(digits[cell])
    if kind == "count":
        return "How many digits are there?", str(len(cells))
    if kind == "read":
        row = int(rng.choice(_full_rows(cells)))
        return f"Read the {('upper', 'lower')[row]} row from left to right.", f"{digits[2 * row]} {digits[2 * row + 1]}"
    a, b = sorted(rng.choice(cells, size=2, replace=False).tolist())
    pair = f"{PLACES[a]} and {PLACES[b]}"
    if kind == "larger":
        return f"Which is larger of {pair}?", str(max(digits[a], digits[b]))
    return f"What is the sum of {pair}?", str(digits[a] + digits[b])


def _draw(pictures: dict[int, np.ndarray], rng: np.random.Generator) -> bytes:
    """PNG of the scene: light digits on a dark ground."""
    ground = int(rng.integers(0, 50))
    scene = np.full((2 * CELL, 2 * CELL), ground, np.float32)
    for cell, picture in pictures.items():
        height, width = rng.integers(12, 16, 2)
        digit = Image.fromarray(np.uint8(picture * 15)).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        y, x = rng.integers(0, CELL - height + 1) + cell // 2 * CELL, rng.integers(0, CELL - width + 1) + cell % 2 * CELL
        ink = np.asarray(digit, np.float32) / 240 * rng.uniform(150, 255 - ground)
        scene[y : y + height, x : x + width] += ink
    out = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(scene, 0, 255))).save(out, "PNG", compress_level=1)
    return out.getvalue()


@lru_cache(maxsize=2)
def _images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(pictures f32[n 8 8] of values 0-16, labels i64[n]) of a split."""
    from sklearn.datasets import load_digits  # here: it takes a second, and only this recipe needs it

    found = load_digits()
    held_out = np.arange(len(found.target)) % 5 == 4
    mine = held_out if split == "test" else ~held_out
    return found.images[mine].astype(np.float32), found.target[mine]
