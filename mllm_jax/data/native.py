"""The view of native resolution: every image keeps its aspect ratio and, within limits, its size (Qwen2-VL, 2.1).

Both sides become multiples of patch * merge pixels, and the image is cut for the packed layout (types.Media).  Patches
come square by square of merge x merge, because a square becomes one token; a patch is (time, row, column, channel) and
spans `steps` moments, of which an image repeats its one.  `exact` pixels equal those of `Qwen2VLImageProcessorPil` of
`transformers` bit for bit before normalization; there a patch is (channel, time, row, column), which conversion of the
first kernel makes up for.

Images of all sizes go through one compiled program: rows have room for a number of patches, and the packer fills it.
2,000 photographs of random size and shape in rows of 8,192 patches and 3,072 positions leave 3 % of the patches empty.
"""

import math
from dataclasses import replace

import numpy as np
from PIL import Image

from mllm_jax.config import config
from mllm_jax.data.errors import BadExample
from mllm_jax.data.images import image_size, load_image
from mllm_jax.data.views import RESAMPLE, Change, View, shrink
from mllm_jax.types import Cut

MOST_RATIO = 200                        # of the longer side to the shorter


@config
class Native(View):
    merge: int = 2                      # patches along the side of the square that becomes a token
    steps: int = 2                      # moments that a patch spans
    min_pixels: int = 56 * 56           # smaller images are enlarged to so many pixels, larger ones shrunk
    max_pixels: int = 28 * 28 * 1280
    resample: str = "bicubic"

    packed = True

    def tiny(self, size: int) -> "Native":
        return replace(self, min_pixels=size * size // 4, max_pixels=4 * size * size)

    def room(self, patch: int) -> int:
        side = patch * self.merge
        return max(self.max_pixels // side**2, 1) * self.merge**2

    def plan(self, height: int, width: int, patch: int) -> Cut:
        tall, wide = self.resized(height, width, patch)
        return Cut(size=(height, width), grid=(1, tall // patch, wide // patch))

    def resized(self, height: int, width: int, patch: int) -> tuple[int, int]:
        """(height, width) to which an image of this size is resized; rounds halves to even, as published.

        Raises:
          BadExample: one side is more than 200 times the other.
        """
        if max(height, width) > MOST_RATIO * min(height, width):
            raise BadExample("", "narrow", f"{width}x{height} pixels; the longer side may be {MOST_RATIO} times the shorter")
        side = patch * self.merge
        tall, wide = (round(n / side) * side for n in (height, width))
        if tall * wide > self.max_pixels:
            shrunk = math.sqrt(height * width / self.max_pixels)
            return tuple(max(side, math.floor(n / shrunk / side) * side) for n in (height, width))
        if tall * wide < self.min_pixels:
            grown = math.sqrt(self.min_pixels / (height * width))
            return tuple(math.ceil(n * grown / side) * side for n in (height, width))
        return tall, wide

    def __call__(self, data: bytes, patch: int, *, exact: bool, change: Change | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(values u8[n steps*patch*patch*3], coords i32[n 3]) of an encoded image."""
        target = self.resized(*image_size(data), patch)
        image, size = load_image(data, fit=None if exact or change else lambda *_: target)
        if change:
            image = Image.fromarray(change(np.asarray(image)))
            size = image.height, image.width
        return self.cut(self.bring(image, size, target, exact=exact)[None], patch)

    def bring(self, image: Image.Image, size: tuple[float, float], target: tuple[int, int], *, exact: bool) -> np.ndarray:
        """u8[h w 3] of this (height, width), of an image whose picture is its first `size` rows and columns."""
        tall, wide = target
        if exact:
            return np.asarray(image.resize((wide, tall), RESAMPLE[self.resample]))
        return np.asarray(shrink(image, tall, wide, (0, 0, size[1], size[0]), self.resample))

    def cut(self, frames: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
        """(values u8[n u], coords i32[n 3]) of frames u8[t h w 3]; the last is repeated until they fill a patch."""
        frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % self.steps, axis=0)])
        m, grid = self.merge, (len(frames) // self.steps, *(n // patch for n in frames.shape[1:3]))
        t, rows, columns = grid
        values = frames.reshape(t, self.steps, rows // m, m, patch, columns // m, m, patch, 3).transpose(0, 2, 5, 3, 6, 1, 4, 7, 8)
        at = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).astype(np.int32)
        coords = at.reshape(t, rows // m, m, columns // m, m, 3).transpose(0, 1, 3, 2, 4, 5)
        return values.reshape(math.prod(grid), -1), coords.reshape(math.prod(grid), 3)
