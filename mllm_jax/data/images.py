"""The one decoder of images: encoded bytes -> u8[h w 3], upright, RGB, over white.

Decoding and resizing are Pillow's, and bit-equal to the PIL image processors of `transformers` on ordinary RGB
files. Training may be faster than exact: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size inside the inverse
cosine transform where the result is still at least as large as what the view will ask for.

Surprises. Pillow never applies EXIF rotation and clips 16-bit greyscale to white; here the picture is turned, and
scaled. OpenCV would not be faster: half of its time, and of a pipeline that hands whole pictures to numpy, goes
into page faults of fresh memory, so pictures stay in Pillow's memory, which is used again, until they are small.
"""

import io
import struct
import warnings
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mllm_jax.data.errors import BadExample

MAX_PIXELS = 128_000_000
MIN_SIDE = 8
# Named, because Pillow's full list holds formats that start other programs (EPS) or are no pictures at all.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
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

# Pillow warns of what is settled here: a picture that is too large is a bad example, broken EXIF is passed over.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning, r"PIL\.")

Fit = Callable[[int, int], tuple[int, int]]
Size = tuple[float, float]


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """u8[h w 3]: the image upright, RGB, transparency over white, the first frame of an animation.

    Raises:
      BadExample: not an image or truncated ("decode"), more than `max_pixels` ("bomb"), a side below 8 ("tiny").
    """
    return np.asarray(load_image(data, max_pixels=max_pixels)[0])


def load_image(data: bytes, *, fit: Fit | None = None, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, Size]:
    """What `decode_image` gives as a Pillow image, and the (height, width) of its picture in pixels.

    With `fit`, a function from the image's (height, width) to the size that the caller will resize it to, a
    JPEG may come out at a half, a quarter or an eighth of its size, never smaller than that. Its picture may
    then end inside the last row and column: 450 rows at a quarter are 112.5, in 113 rows of pixels.
    """
    image = _open(data, max_pixels)
    turn = _orientation(image)
    drafted = None
    if fit and image.format == "JPEG":
        height, width = fit(*_upright_size(image))
        drafted = image.draft(None, (height, width) if turn >= 5 else (width, height))
    try:
        image.load()
    except Exception as error:          # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadExample("", "decode", f"{len(data)} bytes of {image.format} stop being readable: {error}") from error
    image = _rgb(image)
    if turn > 1:                        # the partly empty pixels may now be the first ones: half a pixel is let go
        image, drafted = image.transpose(_UPRIGHT[turn]), None
    _, (_, _, width, height) = drafted or ("RGB", (0, 0, *image.size))
    return image, (height, width)


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) that `decode_image` will give, from the header alone; about 0.05 ms.

    Raises:
      BadExample: as `decode_image`, except for faults behind the header.
    """
    return _upright_size(_open(data, max_pixels))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadExample("", "bomb", f"{str(error).split(' exceeds')[0]}; at most {max_pixels} pixels are decoded") from error
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
