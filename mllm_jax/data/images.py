"""The one decoder of images: encoded bytes -> u8[h w 3], upright, RGB, over white.

`exact` decoding and resizing are Pillow's, and bit-equal to the PIL image processors of `transformers` on
ordinary RGB files. Training may be faster than exact: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size
inside the inverse cosine transform where the result is still at least as large as what the view will ask
for, and OpenCV, where installed, averages areas. The mean difference to exact pixels is one to three levels of 255.

Two surprises. OpenCV applies EXIF rotation by default, Pillow never does; here it is always applied, once.
Pillow clips 16-bit greyscale to white; here it is scaled.
"""

import io
import struct
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mllm_jax.data.errors import BadExample

try:
    import cv2
    from cv2 import IMREAD_COLOR_RGB, IMREAD_IGNORE_ORIENTATION
except ImportError:                     # an optional extra (4.11 or later): faster, never needed
    cv2 = None

MAX_PIXELS = 128_000_000
MIN_SIDE = 8
# Named, because Pillow's full list holds formats that start other programs (EPS) or are no pictures at all.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Keeps up to 8 freed blocks (of at most 16 MB) for the next image: without them every image pays again
# for the page faults of its memory, 15-50 % of the time of decoding.
Image.core.set_blocks_max(8)

Fit = Callable[[int, int], tuple[int, int]]


def decode_image(data: bytes, *, fit: Fit | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """u8[h w 3]: the image upright, RGB, transparency over white, the first frame of an animation.

    With `fit`, a function from the image's (height, width) to the size that the caller will resize it to,
    a JPEG may come out smaller than it is, never smaller than that size.

    Raises:
      BadExample: not an image or truncated ("decode"), more than `max_pixels` ("bomb"), a side below 8 ("tiny").
    """
    image = _open(data, max_pixels)
    turn = _orientation(image)
    if fit and image.format == "JPEG":
        tall, wide = fit(*_upright_size(image))
        tall, wide = (wide, tall) if turn >= 5 else (tall, wide)
        if cv2 is not None and image.mode in ("RGB", "L") and _ends(data):
            pixels = _cv2_decode(data, min(image.height / tall, image.width / wide))
            if pixels is not None:      # None: Pillow will say what is wrong
                return pixels if turn == 1 else np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[turn]))
        image.draft(None, (wide, tall))
    try:
        image.load()
    except Exception as error:          # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadExample("", "decode", f"{len(data)} bytes of {image.format} stop being readable: {error}") from error
    image = _rgb(image)
    return np.asarray(image if turn == 1 else image.transpose(_UPRIGHT[turn]))


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) that `decode_image` will give, from the header alone; about 0.05 ms.

    Raises:
      BadExample: as `decode_image`, except for faults behind the header.
    """
    return _upright_size(_open(data, max_pixels))


def resize(image: np.ndarray, height: int, width: int, *, resample: str = "bicubic", exact: bool) -> np.ndarray:
    """u8[height width 3] of u8[h w 3]; `exact` is Pillow's filter, widened when shrinking (antialiased)."""
    tall, wide = image.shape[:2]
    if (tall, wide) == (height, width):
        return image
    if not exact and cv2 is not None and tall >= height and wide >= width:
        # OpenCV's own cubic filter is not antialiased and is 5-11 levels off when shrinking; areas are within 2.
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(Image.fromarray(image).resize((width, height), RESAMPLE[resample]))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadExample("", "bomb", f"{str(error).split(',')[0]}; at most {max_pixels} pixels are decoded") from error
    except UnidentifiedImageError as error:
        raise BadExample("", "decode", f"{len(data)} bytes that begin with {data[:12]!r} are no image") from error
    except Exception as error:          # a header cut short raises whatever the plugin met first
        raise BadExample("", "decode", f"the header of {len(data)} bytes cannot be read: {error}") from error
    if image.width * image.height > max_pixels:
        pixels = f"{image.width}x{image.height} is {image.width * image.height} pixels"
        raise BadExample("", "bomb", f"{pixels}; at most {max_pixels} are decoded")
    if min(image.size) < MIN_SIDE:
        raise BadExample("", "tiny", f"{image.width}x{image.height} pixels; each side must have {MIN_SIDE}")
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1-8 as far as the header holds it."""
    # Pillow turns TIFF itself. For PNG `getexif` would decode the whole file to look for a late chunk.
    if image.format == "TIFF" or not ("exif" in image.info or "xmp" in image.info):
        return 1
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    # Broken EXIF in a good picture is common, and not a reason to lose it.
    except (OSError, ValueError, SyntaxError, KeyError, IndexError, TypeError, struct.error):
        return 1
    return turn if turn in _UPRIGHT else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return image.size if _orientation(image) >= 5 else (image.height, image.width)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):      # 16 bits: 65535 becomes 255; the rare 32-bit ones are 16-bit data as well
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadExample("", "decode", "pixels are floating-point numbers of unknown range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _ends(data: bytes) -> bool:
    """Whether a JPEG has its end marker; some versions of OpenCV fill a missing tail with grey in silence."""
    return b"\xff\xd9" in data[-64:]


def _cv2_decode(data: bytes, shrink: float) -> np.ndarray | None:
    # OpenCV calls "reduced greyscale" what is a scale alone; with the colour flag the pixels are RGB.
    scale = next((getattr(cv2, f"IMREAD_REDUCED_GRAYSCALE_{n}") for n in (8, 4, 2) if shrink >= n), 0)
    return cv2.imdecode(np.frombuffer(data, np.uint8), IMREAD_COLOR_RGB | IMREAD_IGNORE_ORIENTATION | scale)
