"""Views that cut an image into several tiles of one size, beside an overview of the whole.

    Tiles(size=336, pinpoints=NEXT)          the best of a few rectangles, padded with black; overview first
    DynamicTiles(size=448, most=12)          the rectangle of the nearest aspect ratio; overview last
    SplitTiles(size=364, longest=1456)       as many tiles as the longer side needs; overview last
    OneTile(size=364, longest=1456)          of these the overview alone

`exact` pixels equal those of the PIL processors of `transformers` bit for bit before normalization
(`LlavaNextImageProcessorPil`, `LlavaOnevisionImageProcessorPil`, `GotOcr2ImageProcessorPil`, which InternVL uses,
`Idefics3ImageProcessorPil`, `SmolVLMImageProcessorPil`).  The arrangement follows from the size in the header, so that
rows can be laid out before anything is decoded.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image

from mllm_jax.config import config
from mllm_jax.data.images import image_size, load_image
from mllm_jax.data.views import RESAMPLE, Change, View, shrink
from mllm_jax.types import Cut

# (rows, columns) in the order of the published lists.  The code that came with LLaVA-NeXT reads the same numbers as
# (width, height), `transformers` as (height, width): the first of equals differs, for images that fit into one tile.
NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
NEXT_OFFICIAL = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
ONEVISION = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))

Resize = Callable[[int, int], Image.Image]          # (height, width) -> the whole image at that size


class _Mosaic(View):
    """A subclass says how many rows and columns, and draws the canvas that is cut into them."""

    def arrange(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of tiles for an image of this size."""
        raise NotImplementedError

    def draw(self, resize: Resize, size: tuple[int, int], rows: int, columns: int) -> tuple[Image.Image, Image.Image]:
        """(what is cut into rows x columns tiles, overview) of an image of this (height, width)."""
        raise NotImplementedError

    def pixels(self, data: bytes, *, exact: bool, change: Change | None = None) -> np.ndarray:
        """u8[tile size size 3], in the order of the tiles of `plan`."""
        size = image_size(data)
        cut = self.plan(*size, 1)
        rows, columns = max(1, cut.rows), max(1, cut.columns)
        target = lambda *_: (rows * self.size, columns * self.size)
        image, (height, width) = load_image(data, fit=None if exact or change else target)
        if change:
            image = Image.fromarray(change(np.asarray(image)))
            height, width = image.height, image.width
        slow = lambda h, w: image.resize((w, h), RESAMPLE[self.resample])
        fast = lambda h, w: shrink(image, h, w, (0, 0, width, height), self.resample)
        canvas, overview = self.draw(slow if exact else fast, size, rows, columns)
        s, whole = self.size, np.asarray(canvas)
        tiles = whole.reshape(rows, s, columns, s, 3).transpose(0, 2, 1, 3, 4).reshape(-1, s, s, 3)
        if cut.overview is None or cut.tiles == 1:
            return tiles
        parts = [np.asarray(overview)[None], tiles]
        return np.concatenate(parts if cut.overview == 0 else parts[::-1])


@config
class Tiles(_Mosaic):
    """LLaVA-NeXT ("anyres"; LLaVA-VL/LLaVA-NeXT, llava/mm_utils.py) and LLaVA-OneVision (arXiv:2408.03326, 3.2).

    Of the pinpoints the one is taken that shows most of the image's own pixels, and wastes least.
    """

    size: int
    pinpoints: tuple[tuple[int, int], ...] = NEXT   # (rows, columns); of equally good ones the first
    resample: str = "bicubic"

    def tiny(self, size: int) -> "Tiles":
        return replace(self, size=size, pinpoints=tuple(p for p in self.pinpoints if math.prod(p) <= 4))

    def room(self, patch: int) -> int:
        return 1 + max(map(math.prod, self.pinpoints))

    def plan(self, height: int, width: int, patch: int) -> Cut:
        rows, columns = self.arrange(height, width)
        return replace(super().plan(height, width, patch), rows=rows, columns=columns, overview=0)

    def arrange(self, height: int, width: int) -> tuple[int, int]:
        def rank(pinpoint: tuple[int, int]) -> tuple[int, int]:
            tall, wide = (n * self.size for n in pinpoint)
            scale = min(wide / width, tall / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - tall * wide

        return max(self.pinpoints, key=rank)

    def draw(self, resize: Resize, size: tuple[int, int], rows: int, columns: int) -> tuple[Image.Image, Image.Image]:
        tall, wide = rows * self.size, columns * self.size
        down, across = tall / size[0], wide / size[1]
        if across < down:
            height, width = min(math.ceil(size[0] * across), tall), wide
        else:
            height, width = tall, min(math.ceil(size[1] * down), wide)
        canvas = Image.new("RGB", (wide, tall))
        canvas.paste(resize(height, width), ((wide - width) // 2, (tall - height) // 2))
        return canvas, resize(self.size, self.size)


@config
class DynamicTiles(_Mosaic):
    """InternVL (arXiv:2404.16821, 3.1; also NVILA): between `least` and `most` tiles, the image stretched to fill them."""

    size: int
    most: int = 12                      # tiles, without the overview; an image of one tile has none
    least: int = 1
    resample: str = "bicubic"

    def tiny(self, size: int) -> "DynamicTiles":
        return replace(self, size=size, most=min(self.most, 4), least=min(self.least, 4))

    def room(self, patch: int) -> int:
        return self.most + (self.most > 1)

    def plan(self, height: int, width: int, patch: int) -> Cut:
        rows, columns = self.arrange(height, width)
        overview = rows * columns if rows * columns > 1 else None
        return replace(super().plan(height, width, patch), rows=rows, columns=columns, overview=overview)

    def arrange(self, height: int, width: int) -> tuple[int, int]:
        ratio, area = width / height, height * width
        best, found = math.inf, (1, 1)
        for columns, rows in _rectangles(self.least, self.most):
            miss = abs(ratio - columns / rows)
            # Of equal ones the larger, as long as the image has pixels for half of it.
            if miss < best or (miss == best and area > 0.5 * self.size * self.size * rows * columns):
                best, found = miss, (rows, columns)
        return found

    def draw(self, resize: Resize, size: tuple[int, int], rows: int, columns: int) -> tuple[Image.Image, Image.Image]:
        return resize(rows * self.size, columns * self.size), resize(self.size, self.size)


@config
class SplitTiles(_Mosaic):
    """Idefics3 (arXiv:2408.12637) and SmolVLM: the longer side is brought to `longest`, then both to whole tiles.

    An image that fills one tile is its own overview.
    """

    size: int
    longest: int
    resample: str = "lanczos"

    def tiny(self, size: int) -> "SplitTiles":
        return replace(self, size=size, longest=2 * size)

    def room(self, patch: int) -> int:
        n = math.ceil(self.longest / self.size)
        return n * n + (n > 1)

    def plan(self, height: int, width: int, patch: int) -> Cut:
        rows, columns = self.arrange(height, width)
        if rows * columns == 1:
            rows = columns = 0
        return replace(super().plan(height, width, patch), rows=rows, columns=columns, overview=rows * columns)

    def arrange(self, height: int, width: int) -> tuple[int, int]:
        return tuple(math.ceil(n / self.size) for n in self._whole(*_fit(self.longest, height, width)))

    def draw(self, resize: Resize, size: tuple[int, int], rows: int, columns: int) -> tuple[Image.Image, Image.Image]:
        wide = lambda height, width: (width, height)
        first = _fit(self.longest, *size)
        filter = RESAMPLE[self.resample]
        canvas = resize(*first).resize(wide(*self._whole(*first)), filter)
        return canvas, canvas.resize((self.size, self.size), filter)

    def _whole(self, height: int, width: int) -> tuple[int, int]:
        """The sides rounded up to whole tiles; the ratio is taken after the longer one was."""
        ratio, up = width / height, lambda n: math.ceil(n / self.size) * self.size
        if width >= height:
            return up(int(up(width) / ratio)), up(width)
        return up(height), up(int(up(height) * ratio))


@config
class OneTile(View):
    """Idefics3 and SmolVLM without splitting, and frames of SmolVLM: the longer side is brought to `longest`, then both to `size`."""

    size: int
    longest: int
    resample: str = "lanczos"

    def tiny(self, size: int) -> "OneTile":
        return replace(self, size=size, longest=2 * size)

    def scaled(self, height: float, width: float) -> tuple[int, int]:
        return self.size, self.size

    def exactly(self, image: Image.Image) -> np.ndarray:
        tall, wide = _fit(self.longest, image.height, image.width)
        filter = RESAMPLE[self.resample]
        return np.asarray(image.resize((wide, tall), filter).resize((self.size, self.size), filter))

    def quickly(self, image: Image.Image, height: float, width: float) -> np.ndarray:
        return np.asarray(shrink(image, self.size, self.size, (0, 0, width, height), self.resample))


def _fit(longest: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) whose longer side is `longest`; the other one is even."""
    ratio = width / height
    if width >= height:
        other = int(longest / ratio)
        return max(other + other % 2, 1), longest
    other = int(longest * ratio)
    return longest, max(other + other % 2, 1)


@lru_cache(maxsize=16)
def _rectangles(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of at least and at most so many tiles, the smallest first."""
    every = ((i, j) for i in range(1, most + 1) for j in range(1, most + 1) if least <= i * j <= most)
    return tuple(sorted(every, key=lambda pair: pair[0] * pair[1]))
