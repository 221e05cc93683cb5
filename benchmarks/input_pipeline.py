"""Images per second and core: our source, decoder and view against webdataset with Pillow, on the same JPEGs.

    python benchmarks/input_pipeline.py [--seconds 20] [--size 336]

Both read one tar of photographs (from a folder of real ones, scaled to 640x480 and 1024x768, quality 90; see
--photos) and give u8[h w 3] arrays. Theirs is what the tutorials show: decode, convert to RGB, shortest edge to
`size` with the bicubic filter, centre crop. Ours is `open_source` and a view, for training (exact=False) and exact.
They take turns image by image in one process, so that a busy machine slows all alike, and theirs gains as
much as ours from the memory that `mllm_jax.data.images` lets Pillow keep. The figure is CPU time; the last column is
the median over rounds of the ratio to theirs.
"""

import argparse
import io
import os
import platform
import random
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import webdataset
from PIL import Image

from mllm_jax.data.sources import open_source
from mllm_jax.data.views import Pad, Square

SHAPES = ((640, 480), (1024, 768))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=os.environ.get("MLLM_JAX_REAL_DATA", "../shared/data"))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each size of photograph and of view")
    parser.add_argument("--size", type=int, nargs="+", default=[224, 336])
    args = parser.parse_args()
    photos = sorted(Path(args.photos).rglob("*.jpg"))
    if not photos:
        raise SystemExit(f"no photographs *.jpg in {args.photos}; name a folder with --photos")
    print(f"{_cpu()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"Pillow {PIL.__version__}, webdataset {webdataset.__version__}")
    print(f"{'photographs':12} {'view':28} {'ms of CPU':>9} {'img/s/core':>10} {'x theirs':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            tar = Path(folder) / f"{shape[0]}x{shape[1]}.tar"
            _write(tar, photos, shape)
            for size in args.size:
                _compare(tar, size, args.seconds)


def _compare(tar: Path, size: int, seconds: float) -> None:
    theirs = iter(webdataset.WebDataset(str(tar), shardshuffle=False).repeat())
    source = open_source(f"webdataset:{tar}")
    blob = lambda i: source[i % len(source)].media[0].data
    crop, squash, pad = Square(size=size, crop=True), Square(size=size), Pad(size=size)
    # Name -> pixels of the next photograph. The first is the reference; each call does all of the work from the tar on.
    ways = {
        "webdataset + Pillow, crop": lambda i: _reference(next(theirs)["jpg"], size),
        "Square(crop=True)": lambda i: crop.pixels(blob(i), exact=False),
        "Square()": lambda i: squash.pixels(blob(i), exact=False),
        "Pad()": lambda i: pad.pixels(blob(i), exact=False),
        "Square(crop=True), exact": lambda i: crop.pixels(blob(i), exact=True),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    end, step = time.monotonic() + seconds, 0
    order = list(ways)
    while time.monotonic() < end or step < 3 * len(source):
        random.Random(step).shuffle(order)              # so that none always finds the caches as another left them
        for name in order:
            begin = time.process_time()
            ways[name](step)
            spent[name].append(time.process_time() - begin)
        step += 1
    # A round is one pass over the photographs: every way has then seen the same bytes.
    n = len(source)
    rounds = {name: [sum(t[i : i + n]) for i in range(0, step - n + 1, n)] for name, t in spent.items()}
    reference = rounds["webdataset + Pillow, crop"]
    for name, times in rounds.items():
        milliseconds = 1e3 * sum(times) / len(times) / n
        ratio = statistics.median(r / t for r, t in zip(reference, times, strict=True))
        print(f"{tar.stem:12} {f'{name} {size}':28.34} {milliseconds:9.2f} {1e3 / milliseconds:10.0f} {ratio:8.2f}")


def _reference(data: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def _write(tar: Path, photos: list[Path], shape: tuple[int, int]) -> None:
    with tarfile.open(tar, "w") as out:
        for i, photo in enumerate(photos):
            data = io.BytesIO()
            Image.open(photo).convert("RGB").resize(shape, Image.Resampling.LANCZOS).save(data, "JPEG", quality=90)
            for suffix, content in (("jpg", data.getvalue()), ("txt", photo.name.encode())):
                info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
