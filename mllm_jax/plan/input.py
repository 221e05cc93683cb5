"""What the host must feed the chips, and what it can: images decoded and cut in a second, by one of its processors."""

import io
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax.data.expand import entrance
from mllm_jax.data.pack import RowSpec

PICTURE = (640, 480)                    # of the JPEGs that are decoded for measuring; the size of those in COCO


def images_of_row(spec: RowSpec, towers: Mapping[str, Any]) -> dict[str, int]:
    """{modality: media of a row that is full}, counted in images: a video is its frames."""
    out = {}
    for modality, room in spec.media.items():
        tower = towers[modality]
        media = max(1, room.items // tower.room)
        cut = tower.nominal
        out[modality] = media * (cut.frames if cut.frames > 1 else cut.grid[0])
    return out


def images_per_second(towers: Mapping[str, Any], seconds: float = 1.0) -> float | None:
    """Images that one processor of this machine decodes and cuts as training does; None if the model takes no images."""
    if not any(kind in ("", "images") or kind == "image" for tower in towers.values() for kind in tower.kinds):
        return None
    tower = entrance(towers, "image")[1] if "image" in towers else next(iter(towers.values()))
    rng, file = np.random.default_rng(0), io.BytesIO()
    # Smooth noise: as many bytes as a photograph has.
    small = rng.integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(small).resize(PICTURE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    data = file.getvalue()
    tower.view(data, tower.patch, exact=False)          # what is made once
    done, began = 0, time.monotonic()
    while done < 3 or time.monotonic() - began < seconds:
        tower.view(data, tower.patch, exact=False)
        done += 1
    return done / (time.monotonic() - began)
