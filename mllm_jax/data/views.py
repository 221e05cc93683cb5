"""Views of one fixed size: encoded image -> patches, on the host.

    Square(size=336, crop=True)     shortest edge to 336, then the centre: CLIP
    Square(size=384)                squashed to 384x384, the aspect ratio is lost: SigLIP
    Pad(size=336)                   padded to a square with CLIP's mean colour, then resized: LLaVA-1.5

`exact` pixels equal the PIL image processors of `transformers` (`CLIPImageProcessorPil`,
`SiglipImageProcessorPil`, `LlavaImageProcessorPil(do_pad=True)`) bit for bit before normalization; the others
are a few times cheaper and for training. Pixels stay u8; the encoder normalizes on the device.
"""

from collections.abc import Callable

import numpy as np

from mllm_jax.config import ConfigError, config, nearest
from mllm_jax.data.images import RESAMPLE, decode_image, resize

Change = Callable[[np.ndarray], np.ndarray]


class View:
    """What the fixed-size views share; a subclass has `size` and says how an image is brought to it."""

    size: int
    resample: str

    def __post_init__(self):
        if self.resample not in RESAMPLE:
            close = nearest(self.resample, RESAMPLE)
            raise ConfigError(f"resample={self.resample!r} is not a filter; nearest: {close}")

    def grid(self, height: int, width: int, patch: int) -> tuple[int, int, int]:
        """(1, rows, columns) of patches that an image of this size is cut into; here the same for all."""
        return 1, self.size // patch, self.size // patch

    def __call__(
        self, data: bytes, patch: int, *, exact: bool, change: Change | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(values u8[p patch*patch*3], coords i32[p 3]) of an encoded image; see `cut` for the order."""
        return cut(self.pixels(data, exact=exact, change=change), patch)

    def pixels(self, data: bytes, *, exact: bool, change: Change | None = None) -> np.ndarray:
        """u8[size size 3]; `change` (an augmentation) is applied to the whole image, before it is brought to size.

        Raises:
          BadExample: the bytes are not a usable image; see `decode_image`.
        """
        image = decode_image(data, fit=None if exact or change else self.scaled)
        return self.place(change(image) if change else image, exact=exact)

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which a whole image is resized, before cropping or padding."""
        raise NotImplementedError

    def place(self, image: np.ndarray, *, exact: bool) -> np.ndarray:
        """u8[size size 3] of a decoded image u8[h w 3]."""
        raise NotImplementedError


@config
class Square(View):
    size: int
    crop: bool = False                  # True: shortest edge to `size`, then the centre; False: squashed
    resample: str = "bicubic"           # or "bilinear"

    def tiny(self) -> "Square":
        return Square(size=32, crop=self.crop, resample=self.resample)

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        if not self.crop:
            return self.size, self.size
        short = min(height, width)      # the long side rounds down, as in transformers and torchvision
        return self.size * height // short, self.size * width // short

    def place(self, image: np.ndarray, *, exact: bool) -> np.ndarray:
        height, width = image.shape[:2]
        if self.crop and not exact:     # the centre first: pixels that would be cropped are not resized
            image = centre(image, min(height, width))
            height, width = image.shape[:2]
        image = resize(image, *self.scaled(height, width), resample=self.resample, exact=exact)
        return centre(image, self.size)


@config
class Pad(View):
    size: int
    fill: tuple[int, int, int] = (122, 116, 104)    # CLIP's mean colour, int(mean * 255)
    resample: str = "bicubic"

    def tiny(self) -> "Pad":
        return Pad(size=32, fill=self.fill, resample=self.resample)

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        long = max(height, width)
        return max(1, round(self.size * height / long)), max(1, round(self.size * width / long))

    def place(self, image: np.ndarray, *, exact: bool) -> np.ndarray:
        # The published order is to pad and then to resize, which mixes the border into the fill; resizing
        # first is the same picture to a level or two on that border and does not touch the padding.
        if exact:
            image = self._paste(image, max(image.shape[:2]))
            return resize(image, self.size, self.size, resample=self.resample, exact=True)
        image = resize(image, *self.scaled(*image.shape[:2]), resample=self.resample, exact=False)
        return self._paste(image, self.size)

    def _paste(self, image: np.ndarray, side: int) -> np.ndarray:
        height, width = image.shape[:2]
        if height == width:
            return image
        top, left = (side - height) // 2, (side - width) // 2
        canvas = np.empty((side, side, 3), np.uint8)
        canvas[:] = self.fill
        canvas[top : top + height, left : left + width] = image
        return canvas


def centre(image: np.ndarray, size: int) -> np.ndarray:
    """The middle u8[size size 3]; an odd remainder leaves one pixel more at the bottom and right."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def cut(image: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """(values u8[p patch*patch*3], coords i32[p 3]) of u8[h w 3]: patches row by row, values as (row, column, channel).

    What does not fill a patch at the bottom and at the right is left out, as a convolution without padding
    does: SigLIP so400m cuts 384 pixels into 27 patches of 14.  Raises ConfigError if not even one patch fits.
    """
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    if not rows or not columns:
        raise ConfigError(f"a view of {image.shape[0]}x{image.shape[1]} pixels holds no patch of {patch}x{patch}")
    values = image[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch, 3)
    values = values.transpose(0, 2, 1, 3, 4).reshape(rows * columns, patch * patch * 3)
    coords = np.zeros((rows * columns, 3), np.int32)
    coords[:, 1], coords[:, 2] = np.divmod(np.arange(rows * columns, dtype=np.int32), columns)
    return values, coords


def join(values: np.ndarray, coords: np.ndarray, patch: int) -> np.ndarray:
    """u8[rows*patch columns*patch 3]: the image that `cut` made into patches, for previews."""
    rows, columns = coords[:, 1].max() + 1, coords[:, 2].max() + 1
    image = values.reshape(rows, columns, patch, patch, 3).transpose(0, 2, 1, 3, 4)
    return image.reshape(rows * patch, columns * patch, 3)
