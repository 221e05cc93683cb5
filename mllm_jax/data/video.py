"""Videos as frames at chosen moments, each brought to size by the view of an image.

    Frames(view=Square(size=384), frames=32)                    a tile each: LLaVA-OneVision
    Frames(view=Native(), frames=768, fps=2.0, pick="start")    one packed grid with time: Qwen2-VL

Which frames there will be is known from the header.  `exact` decodes every frame up to the last one wanted and counts
them, as PyAV readers of others do; otherwise gaps are jumped over and frames found by their time, which is the same
where the rate is constant and costs far less in a long video.  A frame that a broken end leaves out is shown by the one
before it, as long as nine tenths are there.

Surprise: rotation that a phone notes in the file is not applied, as everywhere else.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import av
import numpy as np
from PIL import Image

from mllm_jax.config import ConfigError, config, nearest
from mllm_jax.data.errors import BadExample
from mllm_jax.data.views import Change, cut
from mllm_jax.types import Blob, Cut

# Containers of one video each.  Playlists would make the reader open other files and addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
JUMP = 2.0                              # seconds: a shorter gap is decoded, a longer one jumped over
PICK = {                                # (frames wanted, frames there) -> their numbers
    "start": lambda n, total: np.arange(n) * total // n,
    "middle": lambda n, total: (2 * np.arange(n) + 1) * total // (2 * n),
    "ends": lambda n, total: np.linspace(0, total - 1, n).astype(np.int64),
    "nearest": lambda n, total: np.linspace(0, total - 1, n).round().astype(np.int64),
    "every": lambda n, total: np.linspace(0, total - 1, n).astype(np.int64),     # where one a second would be too many
    "inside": lambda n, total: np.linspace(0, total - 1, n).astype(np.int64),    # where the ends of the video count
}


@config
class Frames:
    """Frames of a video, spread evenly: the start or the middle of equal parts, or from the first frame to the last.

    "every" takes each round(rate / fps)-th frame from the first on, as long as they are not more than `frames` (LLaVA).
    "inside" leaves out the first and the last second of a video that is too long for `fps`, and rounds how many there are (SmolVLM).
    """

    view: Any                           # of one frame: Square, Pad or Native
    frames: int                         # so many, or all of a shorter video; with `fps` at most so many
    fps: float | None = None            # so many for each second
    least: int = 1                      # with `fps`, if the video has so many
    pick: str = "ends"                  # a name of PICK
    budget: int | None = None           # pixels of all frames together; more frames are smaller (packed views)

    def __post_init__(self):
        if self.pick not in PICK:
            raise ConfigError(f"pick={self.pick!r} is no way to choose frames; nearest: {nearest(self.pick, PICK)}")
        if self.pick in ("every", "inside") and self.fps is None:
            raise ConfigError(f"pick={self.pick!r} takes a frame so many times a second; give fps")
        if not self.packed and self.budget is not None:
            raise ConfigError(f"frames of one size cannot keep to budget={self.budget}; remove it, or use a packed view")

    @property
    def packed(self) -> bool:
        return self.view.packed

    def tiny(self, size: int) -> "Frames":
        return replace(self, view=self.view.tiny(size), frames=min(self.frames, 4), budget=None)

    def room(self, patch: int) -> int:
        if not self.packed:
            return self.frames
        steps = self.view.steps
        return max(-(-n // steps) * self._view(n).room(patch) for n in range(1, self.frames + 1))

    def look(self, blob: Blob, patch: int) -> Cut:
        """The plan of an encoded video, from its header; raises BadExample if it is none, or its file is missing."""
        with _open(_source(blob)) as (_, stream):
            total, rate = _length(stream)
            return self._plan(stream.height, stream.width, total, rate, patch)

    def plan(self, height: int, width: int, patch: int) -> Cut:
        """How a video of this size will be cut that is long enough for all frames, and has 24 a second."""
        seconds = self.frames / (self.fps or 1.0)
        return self._plan(height, width, max(self.frames, math.ceil(24 * seconds)), 24.0, patch)

    def __call__(self, data: bytes, patch: int, *, exact: bool, change: Change | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(values u8[n u], coords i32[n 3]) of an encoded video, frame after frame; the first coordinate is time."""
        with _open(io.BytesIO(data)) as (container, stream):
            wanted = self._wanted(*_length(stream))
            view, pixels = self._view(len(wanted)), []
            # One frame at a time: hours of film at full size would not fit in memory.
            for image in _decode(container, stream, wanted, exact=exact):
                image = Image.fromarray(change(np.asarray(image))) if change else image
                size = image.height, image.width
                if self.packed:
                    pixels.append(view.bring(image, size, view.resized(stream.height, stream.width, patch), exact=exact))
                else:
                    pixels.append(view.exactly(image) if exact else view.quickly(image, *size))
        if len(pixels) < max(1, 0.9 * len(wanted)):
            raise BadExample("", "decode", f"the video stops being readable after {len(pixels)} of {len(wanted)} frames")
        pixels += pixels[-1:] * (len(wanted) - len(pixels))
        if self.packed:
            return view.cut(np.stack(pixels), patch)
        values, coords = cut(np.stack(pixels), patch)
        coords[:, 0] = np.repeat(np.arange(len(pixels)), len(coords) // len(pixels))
        return values, coords

    def _plan(self, height: int, width: int, total: int, rate: float, patch: int) -> Cut:
        wanted = self._wanted(total, rate)
        n, seconds = len(wanted), wanted / rate
        one = self._view(n).plan(height, width, patch)
        if one.tiles > 1:
            raise ConfigError(f"a frame of a video must be one tile; {self.view} cuts {one.tiles}")
        if not self.packed:
            return replace(one, frames=n, seconds=tuple(seconds.tolist()), every=total / rate / n)
        steps = self.view.steps
        ends = np.minimum(np.arange(0, n, steps) + steps - 1, n - 1)
        middle = (seconds[::steps] + seconds[ends]) / 2
        return replace(one, grid=(len(middle), *one.grid[1:]), seconds=tuple(middle.tolist()), every=total / rate / n * steps)

    def _wanted(self, total: int, rate: float) -> np.ndarray:
        """i64[n]: the numbers of the frames of a video of so many, so many a second."""
        if self.pick == "every" and len(wanted := np.arange(0, total, max(1, round(rate / self.fps)))) <= self.frames:
            return wanted
        whole = round if self.pick == "inside" else int
        n = self.frames if self.fps is None or self.pick == "every" else max(whole(total / rate * self.fps), self.least)
        n = min(n, self.frames, total)
        if self.packed and n > self.view.steps:
            n -= n % self.view.steps
        if self.pick == "inside" and total / rate - 2 > self.frames * self.fps:
            return np.linspace(int(rate), min(int(total - rate), total - 1), n).astype(np.int64)
        return PICK[self.pick](n, total)

    def _view(self, n: int) -> Any:
        """The view of each of n frames."""
        if self.budget is None:
            return self.view
        # A frame never falls below the smallest image by its share of the budget.
        most = max(min(self.view.max_pixels, self.budget // n), int(self.view.min_pixels * 1.05))
        return replace(self.view, max_pixels=most)


def _source(blob: Blob) -> Any:
    """A file of the bytes, not read before they are wanted."""
    if blob.data is not None:
        return io.BytesIO(blob.data)
    try:
        return open(blob.path, "rb")
    except OSError as error:
        raise BadExample("", "missing_file", f"{blob.path}: {error.strerror}") from error


@contextmanager
def _open(file: Any) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a file; whatever the reader dislikes is a bad example."""
    with file:
        try:
            with av.open(file, options={"format_whitelist": FORMATS}) as container:
                if not container.streams.video:
                    raise BadExample("", "decode", f"a file of the format {container.format.name} has no video stream")
                yield container, container.streams.video[0]
        except av.error.FFmpegError as error:
            raise BadExample("", "decode", f"the video cannot be read: {error}") from error


def _length(stream: Any) -> tuple[int, float]:
    """(frames, frames a second)."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not stream.height or not stream.width:
        raise BadExample("", "decode", "the video says neither its rate nor its size")
    total = stream.frames
    if not total:                       # some containers do not say; an estimate is enough to spread frames over
        length = stream.duration * stream.time_base if stream.duration else (stream.container.duration or 0) / av.time_base
        total = int(length * rate)
    if total < 1:
        raise BadExample("", "decode", "the video says neither how many frames it has nor how long it is")
    return total, float(rate)


def _decode(container: Any, stream: Any, wanted: np.ndarray, *, exact: bool) -> Iterator[Image.Image]:
    """The frames of these numbers, which rise, as far as the file goes."""
    stream.thread_type = "AUTO"
    try:
        yield from _counted(container, stream, wanted) if exact else _timed(container, stream, wanted)
    except av.error.EOFError:
        return


def _counted(container: Any, stream: Any, wanted: np.ndarray) -> Iterator[Image.Image]:
    wanted = set(wanted.tolist())
    for i, frame in enumerate(container.decode(stream)):
        if i in wanted:
            yield frame.to_image()
            if i == max(wanted):
                return


def _timed(container: Any, stream: Any, wanted: np.ndarray) -> Iterator[Image.Image]:
    rate, first = float(stream.average_rate or stream.guessed_rate), float((stream.start_time or 0) * stream.time_base)
    frames, last = container.decode(stream), first
    for target in first + wanted / rate:
        if target - last > JUMP:
            container.seek(int(target / stream.time_base), stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            last = frame.time
            if last >= target - 0.5 / rate:
                yield frame.to_image()
                break
