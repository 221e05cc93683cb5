import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.errors import BadExample
from mllm_jax.data.images import _UPRIGHT, decode_image, image_size, load_image

REAL = Path(os.environ.get("MLLM_JAX_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
needs_photos = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real photographs in {REAL} (set MLLM_JAX_REAL_DATA)")


def photos() -> list[bytes]:
    return [p.read_bytes() for p in sorted(REAL.glob("*/images/*.jpg"))]


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random picture: JPEG keeps it, and a shifted or turned copy of it differs."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def reason(data: bytes, **options) -> str:
    with pytest.raises(BadExample) as error:
        load_image(data, **options)
    assert "\n" not in str(error.value)
    return error.value.reason


def png_header(width: int, height: int) -> bytes:
    """A PNG of which only the header is there: enough for a guard that looks before it decodes."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


BROKEN_EXIF = encode(noise(16, 16), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12")


def test_lossless_pictures_come_back_bit_for_bit():
    picture = noise(24, 40)
    webp = {"lossless": True, "exact": True}
    for format, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", webp), ("PPM", {})):
        np.testing.assert_array_equal(decode_image(encode(picture, format, **options)), np.asarray(picture), format)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied_once(turn, format):
    # A picture whose corner is marked, stored as a camera would that was held in each of the eight ways.
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:8, :16] = 255
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    stored = Image.fromarray(upright)
    if turn > 1:
        stored = stored.transpose(_UPRIGHT[undo[turn]])
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    assert image_size(data) == (32, 48)
    for pixels in (decode_image(data), np.asarray(load_image(data, fit=lambda h, w: (h, w))[0])):
        assert pixels.shape == (32, 48, 3)
        # JPEG rings around the corner; ten levels separate that from a picture that lies on its side.
        assert np.abs(pixels.astype(int) - upright).mean() < 10


def test_alpha_lies_over_white():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0], rgba[:4, :, 3], rgba[4:, :, 3] = 200, 255, 0
    expected = np.where(np.arange(8)[:, None, None] < 4, [200, 0, 0], [255, 255, 255]).astype(np.uint8)
    expected = np.broadcast_to(expected, (8, 8, 3))
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(rgba))), expected)
    half = Image.new("LA", (8, 8), (0, 128))
    assert decode_image(encode(half))[0, 0].tolist() == [127, 127, 127]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encode(palette))[0, 0].tolist() == [10, 20, 30]
    assert decode_image(encode(palette, transparency=1))[0, 0].tolist() == [255, 255, 255]
    assert decode_image(encode(Image.new("RGB", (8, 8), (9, 9, 9)), transparency=(9, 9, 9)))[0, 0].tolist() == [255] * 3


def test_sixteen_bits_are_scaled_not_clipped():
    wide = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    grey = decode_image(encode(Image.fromarray(wide)))
    np.testing.assert_array_equal(grey[..., 0], np.round(wide / 257))
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])


def test_other_modes_become_rgb():
    cmyk = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert decode_image(cmyk)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert decode_image(encode(Image.new("1", (8, 8), 1)))[0, 0].tolist() == [255, 255, 255]
    assert decode_image(encode(Image.new("L", (8, 8), 77)))[0, 0].tolist() == [77, 77, 77]
    assert reason(encode(Image.new("F", (8, 8), 0.5), "TIFF")) == "decode"


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0))]
    for format in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert decode_image(data)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3), format


def test_bad_bytes_have_a_reason():
    jpeg = encode(noise(200, 300), "JPEG")
    png = encode(noise(200, 300))
    assert reason(b"") == reason(b"<!DOCTYPE html><html>") == "decode"
    for data in (jpeg, png):
        for part in (0.99, 0.5, 0.02):
            cut_short = data[: int(len(data) * part)]
            assert reason(cut_short) == "decode", part
            assert reason(cut_short, fit=lambda h, w: (32, 32)) == "decode", part
    assert reason(png_header(20_000, 20_000)) == "bomb"
    assert reason(png_header(12_000, 11_000)) == "bomb"
    assert reason(png, max_pixels=59_999) == "bomb"
    assert reason(encode(noise(7, 100))) == "tiny"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n") == "decode"
    with pytest.raises(BadExample, match="20000x20000|400000000 pixels"):
        image_size(png_header(20_000, 20_000))


def test_broken_exif_does_not_lose_a_picture():
    assert decode_image(BROKEN_EXIF).shape == (16, 16, 3)


def test_what_pillow_would_warn_of_is_not_said_twice():
    """In a process of its own, for pytest has filters of its own."""
    code = "import sys\nfrom mllm_jax.data.images import decode_image\nprint(decode_image(sys.stdin.buffer.read(), max_pixels=1e9).shape)"
    for data, shape in ((png_header(12_000, 11_000), None), (BROKEN_EXIF, (16, 16, 3))):
        run = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True)
        assert b"Warning" not in run.stderr, run.stderr.decode()
        assert run.stdout == f"{shape}\n".encode() if shape else b"BadExample" in run.stderr


def test_fit_never_returns_less_than_asked():
    exif = Image.Exif()
    exif[0x0112] = 6
    for (height, width), target in {(480, 640): (224, 224), (100, 1000): (50, 200), (60, 60): (336, 336)}.items():
        for options in ({}, {"exif": exif}):
            data = encode(noise(height, width), "JPEG", **options)
            full = decode_image(data)
            small = np.asarray(load_image(data, fit=lambda h, w, target=target: target)[0])
            assert small.shape[0] >= min(target[0], full.shape[0]) and small.shape[1] >= min(target[1], full.shape[1])
    data = encode(noise(480, 640), "JPEG")
    assert load_image(data, fit=lambda h, w: (224, 224))[0].size == (320, 240)    # half size is enough
    image, size = load_image(encode(noise(450, 721), "JPEG"), fit=lambda h, w: (100, 100))
    assert image.size == (181, 113) and size == (112.5, 180.25)


@needs_photos
def test_header_size_is_the_size_of_the_pixels():
    for data in photos():
        assert image_size(data) == decode_image(data).shape[:2]
