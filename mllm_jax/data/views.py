"""Views of one fixed size: encoded image -> patches, on the host.

    Square(size=336, crop=True)     shortest edge to 336, then the centre: CLIP
    Square(size=384)                squashed to 384x384, the aspect ratio is lost: SigLIP
    Pad(size=336)                   padded to a square with CLIP's mean colour, then resized: LLaVA-1.5

`exact` pixels equal the PIL image processors of `transformers` (`CLIPImageProcessorPil`,
`SiglipImageProcessorPil`, `LlavaImageProcessorPil(do_pad=True)`) bit for bit before normalization; the others
are two to four times cheaper, one to three levels of 255 away on average, and for training. Pixels stay u8; the
encoder normalizes on the device.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image

from mllm_jax.config import ConfigError, config, nearest
from mllm_jax.data.images import MAX_PIXELS, image_size, load_image
from mllm_jax.data.record import read_blob
from mllm_jax.types import Blob, Cut

RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip
HEADER = 1 << 18                        # bytes of a file in which its header is looked for
Change = Callable[[np.ndarray], np.ndarray]


class View:
    """How encoded media become patches; what the views of one size, `size` pixels, share.

    `look` plans from the header what a call will give from the bytes: `tiles` times the patches of `grid`.  With
    `packed` each medium has a grid of its own (Media, "Packed layout").
    """

    size: int
    resample: str
    packed = False

    def __post_init__(self):
        if self.resample not in RESAMPLE:
            close = nearest(self.resample, RESAMPLE)
            raise ConfigError(f"resample={self.resample!r} is not a filter; nearest: {close}")

    def look(self, blob: Blob, patch: int) -> Cut:
        """The plan of an encoded image, from its header; raises BadExample as `image_size`."""
        return self.plan(*image_size(read_blob(blob, HEADER)), patch)

    def plan(self, height: int, width: int, patch: int) -> Cut:
        """How an image of this size will be cut; here all are the same."""
        return Cut(size=(height, width), grid=(1, self.size // patch, self.size // patch))

    def room(self, patch: int) -> int:
        """The most that one medium takes of a row: tiles, or patches where the layout is packed."""
        return 1

    def __call__(
        self, data: bytes, patch: int, *, exact: bool, change: Change | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(values u8[n patch*patch*3], coords i32[n 3]) of an encoded image, tile after tile; see `cut` for the order."""
        return cut(self.pixels(data, exact=exact, change=change), patch)

    def pixels(self, data: bytes, *, exact: bool, change: Change | None = None) -> np.ndarray:
        """u8[size size 3]; `change` (an augmentation) is applied to the whole image, before it is brought to size.

        Raises:
          BadExample: the bytes are not a usable image; see `decode_image`.
        """
        image, size = load_image(data, fit=None if exact or change else self.scaled)
        if change:
            image = Image.fromarray(change(np.asarray(image)))
            size = image.height, image.width
        return self.exactly(image) if exact else self.quickly(image, *size)

    def scaled(self, height: float, width: float) -> tuple[int, int]:
        """(height, width) to which a whole image is resized, before cropping or padding."""
        raise NotImplementedError

    def exactly(self, image: Image.Image) -> np.ndarray:
        """u8[size size 3] of an image, by the published operations in their order."""
        raise NotImplementedError

    def quickly(self, image: Image.Image, height: float, width: float) -> np.ndarray:
        """The same view of an image whose picture is the first `height` rows and `width` columns, at less cost."""
        raise NotImplementedError


@config
class Square(View):
    size: int
    crop: bool = False                  # True: shortest edge to `size`, then the centre; False: squashed
    resample: str = "bicubic"           # or "bilinear"

    def tiny(self, size: int) -> "Square":
        return replace(self, size=size)

    def scaled(self, height: float, width: float) -> tuple[int, int]:
        if not self.crop:
            return self.size, self.size
        short = min(height, width)      # the long side rounds down, as in transformers and torchvision
        return int(self.size * height / short), int(self.size * width / short)

    def exactly(self, image: Image.Image) -> np.ndarray:
        tall, wide = self.scaled(image.height, image.width)
        if tall * wide > MAX_PIXELS:    # a hair of 8 x 100000 pixels: what would be cropped does not fit in memory
            return self.quickly(image, image.height, image.width)
        left, top = (wide - self.size) // 2, (tall - self.size) // 2
        image = image.resize((wide, tall), RESAMPLE[self.resample])
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def quickly(self, image: Image.Image, height: float, width: float) -> np.ndarray:
        # The same samples, without those that would be cropped.
        tall, wide = self.scaled(height, width)
        left, top = (wide - self.size) // 2, (tall - self.size) // 2
        x, y = width / wide, height / tall
        box = left * x, top * y, (left + self.size) * x, (top + self.size) * y
        return np.asarray(shrink(image, self.size, self.size, box, self.resample))


@config
class Pad(View):
    size: int
    fill: tuple[int, int, int] = (122, 116, 104)    # CLIP's mean colour, int(mean * 255)
    resample: str = "bicubic"

    def tiny(self, size: int) -> "Pad":
        return replace(self, size=size)

    def scaled(self, height: float, width: float) -> tuple[int, int]:
        long = max(height, width)
        return max(1, round(self.size * height / long)), max(1, round(self.size * width / long))

    def exactly(self, image: Image.Image) -> np.ndarray:
        side = max(image.size)
        if side * side > MAX_PIXELS:    # a hair of 8 x 100000 pixels: its square does not fit in memory
            return self.quickly(image, image.height, image.width)
        canvas = Image.new("RGB", (side, side), self.fill)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return np.asarray(canvas.resize((self.size, self.size), RESAMPLE[self.resample]))

    def quickly(self, image: Image.Image, height: float, width: float) -> np.ndarray:
        # Padding first mixes a row of the border with the fill; here whole rows of the image are sampled
        # at the same places, and the padding is not filtered.
        side = max(height, width)
        scale = self.size / side
        (left, right), (top, bottom) = (_whole((side - v) / 2 * scale, (side + v) / 2 * scale) for v in (width, height))
        x, y = (side - width) / 2, (side - height) / 2
        box = left / scale - x, top / scale - y, right / scale - x, bottom / scale - y
        canvas = Image.new("RGB", (self.size, self.size), self.fill)
        canvas.paste(shrink(image, bottom - top, right - left, box, self.resample), (left, top))
        return np.asarray(canvas)


def _whole(begin: float, end: float) -> tuple[int, int]:
    """The whole pixels between two places, at least one."""
    first = math.ceil(begin - 1e-6)
    return (first, last) if (last := math.floor(end + 1e-6)) > first else (math.floor(begin), math.floor(begin) + 1)


def shrink(image: Image.Image, height: int, width: int, box: tuple[float, ...], resample: str) -> Image.Image:
    """The part `box` of an image as height x width; enlarged by the named filter, shrunk by one at half its cost.

    Hamming's filter is antialiased like the exact ones, and on average one level of 255 away from bicubic.
    """
    left, top, right, bottom = (min(max(v, 0.0), most) for v, most in zip(box, image.size * 2, strict=True))
    smaller = right - left >= width and bottom - top >= height
    filter = Image.Resampling.HAMMING if smaller else RESAMPLE[resample]
    return image.resize((width, height), filter, box=(left, top, right, bottom), reducing_gap=2.0)


def cut(image: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """(values u8[n patch*patch*3], coords i32[n 3]) of u8[h w 3] or tiles u8[tile h w 3], tile after tile.

    Patches are counted row by row inside their tile, values as (row, column, channel).  What does not fill a patch at
    the bottom and at the right is left out, as a convolution without padding does: SigLIP so400m cuts 384 pixels into
    27 patches of 14.  Raises ConfigError if not even one patch fits.
    """
    height, width = image.shape[-3:-1]
    rows, columns = height // patch, width // patch
    if not rows or not columns:
        raise ConfigError(f"a view of {height}x{width} pixels holds no patch of {patch}x{patch}")
    values = image[..., : rows * patch, : columns * patch, :].reshape(-1, rows, patch, columns, patch, 3)
    tiles = len(values)
    values = values.transpose(0, 1, 3, 2, 4, 5).reshape(tiles * rows * columns, patch * patch * 3)
    coords = np.zeros((rows * columns, 3), np.int32)
    coords[:, 1], coords[:, 2] = np.divmod(np.arange(rows * columns, dtype=np.int32), columns)
    return values, np.tile(coords, (tiles, 1))


def join(values: np.ndarray, coords: np.ndarray, patch: int) -> np.ndarray:
    """u8[rows*patch columns*patch 3]: the image whose patches u8[p u] are these, in any order, for previews.

    Of patches that span several moments the first one is shown.
    """
    rows, columns = coords[:, 1].max() + 1, coords[:, 2].max() + 1
    image = np.zeros((rows, patch, columns, patch, 3), values.dtype)
    image[coords[:, 1], :, coords[:, 2]] = values[:, : patch * patch * 3].reshape(-1, patch, patch, 3)
    return image.reshape(rows * patch, columns * patch, 3)
