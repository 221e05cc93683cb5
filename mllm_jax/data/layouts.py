"""How the tokens of a medium stand in the row: text, media tokens in an order, and marks between them.

    AnyRes()                        LLaVA-NeXT: overview, then the rows of the whole image without its padding, each
                                    with a learned newline
    Spans(before="<img>", ...)      InternVL, Idefics3, SmolVLM, LLaVA-UHD: text around and between the tiles, or frames
    Pooled()                        LLaVA-OneVision: frames of a video, shrunk
    Marked()                        CogVLM: a learned vector before the image and one after it

A layout is called with the plan of a medium and the grid of tokens that one tile has after the connector, and gives
pieces: text (special tokens are known, nothing is trained), and Runs of media tokens.  `marks` are the names of learned
vectors that it places, `specials` the special tokens in its texts (a tokenizer made here is given them), `taps` says that
some of its tokens are means of several, and `token` which placeholder fills their places.  All is done before anything is
decoded, from the header.
"""

from dataclasses import replace
from datetime import timedelta
from math import sqrt
from typing import Protocol

import numpy as np

from mllm_jax.config import ConfigError, config
from mllm_jax.types import Cut, Grid, Run

Pieces = list[str | Run]
SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
         "nineteen").split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
MARK = -2                               # the slot of the first mark of a layout; the next one is one less


class Layout(Protocol):
    marks: tuple[str, ...]
    specials: tuple[str, ...]
    taps: bool
    token: str | None                   # the placeholder that fills the places of its runs; None: that of the medium

    def __call__(self, cut: Cut, grid: Grid) -> Pieces: ...


class _Bare:
    marks: tuple[str, ...] = ()
    specials: tuple[str, ...] = ()
    taps = False
    token: str | None = None


@config
class Plain(_Bare):
    """All tokens of all tiles, one after another; what a tower without a layout does."""

    def __call__(self, cut: Cut, grid: Grid) -> Pieces:
        return [Run(slots=np.arange(cut.tiles * np.prod(grid), dtype=np.int32))]


@config
class AnyRes(_Bare):
    """LLaVA-NeXT and LLaVA-OneVision (`pack_image_features`): the overview, then the image row by row.

    The tiles are put together, the rows or columns that show padding are left out, and the mark "newline" ends each
    row.  A medium of one tile is its tokens and one newline.

    Raises:
      ConfigError: the tokens of a tile are no grid.
    """

    cap: int | None = None              # an image of more tokens than so many tiles is shrunk to them, bilinearly

    marks = ("newline",)

    @property
    def taps(self) -> bool:
        return self.cap is not None

    def __call__(self, cut: Cut, grid: Grid) -> Pieces:
        n = int(np.prod(grid))
        if cut.tiles == 1:
            return [Run(slots=np.append(np.arange(n), MARK).astype(np.int32))]
        overview, image = cut.overview * n + np.arange(n, dtype=np.int32), unpad(mosaic(cut, grid), *cut.size)
        ratio = sqrt(image.size / (self.cap * n)) if self.cap else 1.0
        rows, columns = (int(x // ratio) if ratio > 1.1 else x for x in image.shape)
        lines = np.full((rows, columns + 1), MARK, np.int32)
        if ratio <= 1.1:
            lines[:, :-1] = image
            return [Run(slots=np.concatenate([overview, lines.reshape(-1)]))]
        taps, mix = alone(lines)
        taps[:, :-1], mix[:, :-1] = bilinear(image, rows, columns)
        (first, ones), rest = alone(overview), (-1, 4)
        taps, mix = np.concatenate([first, taps.reshape(rest)]), np.concatenate([ones, mix.reshape(rest)])
        return [Run(slots=taps[:, 0], taps=taps, mix=mix)]


@config
class Spans(_Bare):
    """Text around and between tiles; frames of a video are rows of one tile each.

    `{row}`, `{column}` and `{frame}` in the texts count from 1, `{seconds}` is the time of the frame, `{clock}` the same as 01:05.
    In `before`, `{count}` says in words how many frames there are, and `{length}` as 0:01:05 how long the video is.
    """

    before: str = ""                    # before all of it
    tile: str = ""                      # before each tile that is not the overview
    close: str = ""                     # after each of them
    between: str = ""                   # between tiles of a row
    row: str = ""                       # between rows
    gap: str = ""                       # between the tiles and the overview
    overview: str = ""                  # before the overview
    after: str = ""                     # after all of it
    specials: tuple[str, ...] = ()
    token: str | None = None            # "image" for a video whose frames are images to its tokenizer
    rate: float | None = None           # positions of time for each second, rounded down; None: one for each step (place="grid")

    def __call__(self, cut: Cut, grid: Grid) -> Pieces:
        n, frames = int(np.prod(grid[1:])), cut.frames * grid[0]
        run = lambda tile: Run(slots=np.arange(tile * n, (tile + 1) * n, dtype=np.int32))
        first, out = int(cut.overview == 0), []
        for i in range(frames * cut.rows * cut.columns):
            row, column = divmod(i, cut.columns)
            seconds = cut.seconds[row] if cut.seconds else 0.0
            clock = f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
            names = {"row": row + 1, "column": column + 1, "frame": row + 1, "seconds": seconds, "clock": clock}
            apart = self.between if column else self.row if row else ""
            out += [apart, self.tile.format(**names), run(first + i), self.close.format(**names)]
        if cut.overview is not None:
            whole, gap = [self.overview, run(cut.overview)], [self.gap] if out else []
            out = whole + gap + out if first else out + gap + whole
        # A length that is a whole number of seconds was divided and multiplied by the frames on its way.
        before = self.before.format(count=in_words(cut.frames), length=timedelta(seconds=int(cut.every * cut.frames + 1e-6)))
        return [piece if isinstance(piece, str) else self._timed(piece, cut, grid) for piece in _joined([before, *out, self.after])]

    def _timed(self, run: Run, cut: Cut, grid: Grid) -> Run:
        if self.rate is None:
            return run
        places = on_grid(run.slots, grid)
        places[:, 0] = (places[:, 0] * cut.every * self.rate).astype(np.int32)
        return replace(run, places=places)


@config
class Pooled(_Bare):
    """Frames shrunk bilinearly to one token for `stride` x `stride`, rounded up (LLaVA-Video, LLaVA-OneVision), and marks "newline".

    Where the sides divide by 2 that is the mean of squares of four.
    """

    stride: int = 2
    newline: str = "end"                # where it stands: at the "end" of the video, of each "frame" or "row", or "" nowhere

    taps = True

    def __post_init__(self):
        if self.newline not in ("end", "frame", "row", ""):
            raise ConfigError(f"newline={self.newline!r} is no place for a newline; the places are end, frame and row, or '' for none")

    @property
    def marks(self) -> tuple[str, ...]:
        return ("newline",) if self.newline else ()

    def __call__(self, cut: Cut, grid: Grid) -> Pieces:
        n, frames = int(np.prod(grid[1:])), cut.tiles * grid[0]
        rows, columns = (-(-side // self.stride) for side in grid[1:])
        taps, mix = bilinear(np.arange(n, dtype=np.int32).reshape(grid[1:]), rows, columns)
        taps = taps + n * np.arange(frames, dtype=np.int32)[:, None, None, None]
        lines = {"row": frames * rows, "frame": frames, "end": 1, "": 1}[self.newline]
        taps, mix = taps.reshape(lines, -1, 4), np.broadcast_to(mix, taps.shape).reshape(lines, -1, 4)
        if self.newline:
            mark, one = alone(np.full((lines, 1), MARK, np.int32))
            taps, mix = np.concatenate([taps, mark], axis=1), np.concatenate([mix, one], axis=1)
        taps, mix = taps.reshape(-1, 4), mix.reshape(-1, 4)
        return [Run(slots=taps[:, 0], taps=taps, mix=mix)]


@config
class Marked(_Bare):
    """Learned vectors before and after the tokens of a medium, the second with the kind `after_kind`.

    CogVLM: an expert of the decoder reads "boi" and the image, and not "eoi".
    """

    before: str = "boi"
    after: str = "eoi"
    after_kind: str | None = "text"

    @property
    def marks(self) -> tuple[str, ...]:
        return self.before, self.after

    def __call__(self, cut: Cut, grid: Grid) -> Pieces:
        mark = lambda k, kind: Run(slots=np.array([MARK - k], np.int32), kind=kind)
        return [mark(0, None), *Plain()(cut, grid), mark(1, self.after_kind)]


INTERNVL = Spans(before="<img>", after="</img>", specials=("<img>", "</img>"))
INTERNVL_VIDEO = Spans(tile="Frame{frame}: <img>", close="</img>", row="\n", specials=("<img>", "</img>"), token="image")
# Each step of a video with its time before it, and tags around it; the template "qwen3_vl" writes none around a video.
QWEN3_VIDEO = Spans(tile="<{seconds:.1f} seconds><|vision_start|>", close="<|vision_end|>", specials=("<|vision_start|>", "<|vision_end|>"))
IDEFICS3 = Spans(
    tile="<fake_token_around_image><row_{row}_col_{column}>", row="\n", gap="\n\n",
    overview="<fake_token_around_image><global-img>", after="<fake_token_around_image>",
    specials=("<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))),
)  # fmt: skip
IDEFICS3_WHOLE = Spans(before=IDEFICS3.overview, after=IDEFICS3.after, specials=IDEFICS3.specials[:2])
SMOLVLM_VIDEO = Spans(
    before="You are provided the following series of {count} frames from a {length} [H:MM:SS] video.\n",
    tile="\nFrame from {clock}:" + IDEFICS3.overview, close=IDEFICS3.after, after="\n\n", specials=IDEFICS3.specials[:2], token="image",
)  # fmt: skip


def in_words(n: int) -> str:
    """A number as it is said in English: "one hundred and twenty-eight"."""
    if n < 100:
        tens, ones = divmod(n, 10)
        return SMALL[n] if n < len(SMALL) else TENS[tens] + (f"-{SMALL[ones]}" if ones else "")
    size, name = (1_000, "thousand") if n >= 1_000 else (100, "hundred")
    head, rest = divmod(n, size)
    return f"{in_words(head)} {name}" + ((" and " if rest < 100 else ", ") + in_words(rest) if rest else "")


def on_grid(slots: np.ndarray, grid: Grid) -> np.ndarray:
    """i32[n 3]: (time, row, column) of tokens of tiles of this grid, the time counted from that of the first; tiles follow in time."""
    steps, row, column = np.unravel_index(slots, (int(slots.max()) // (grid[1] * grid[2]) + 1, *grid[1:]))
    return np.stack([steps - steps[0], row, column], axis=1).astype(np.int32)


def mosaic(cut: Cut, grid: Grid) -> np.ndarray:
    """i32[rows columns]: the slots of the tiles put together, without the overview."""
    _, r, c = grid
    if (r == 1 or c == 1) and min(cut.grid[1:]) > 1 and r * c > 1:
        raise ConfigError(f"the layout puts tiles together; the connector must give a grid of tokens, not {r * c} in a line")
    first = int(cut.overview == 0) * r * c
    tiles = first + np.arange(cut.rows * cut.columns * r * c, dtype=np.int32).reshape(cut.rows, cut.columns, r, c)
    return tiles.transpose(0, 2, 1, 3).reshape(cut.rows * r, cut.columns * c)


def unpad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The rows and columns of [rows columns ...] that show an image of height x width, which was padded to fill it.

    As much is trimmed on both sides, rounded down; the published rounding to seven digits is kept.
    """
    rows, columns = image.shape[:2]
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return image[padding : rows - padding]
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return image[:, padding : columns - padding]


def bilinear(slots: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(taps i32[rows columns 4], mix f32[rows columns 4]) that resize i32[h w], as `interpolate(mode="bilinear")` of torch.

    Corners are not aligned, and shrinking does not filter: only the four nearest are read.
    """
    (top, bottom, y), (left, right, x) = (_between(n, old) for n, old in zip((rows, columns), slots.shape))
    taps = np.stack([slots[a][:, b] for a in (top, bottom) for b in (left, right)], axis=-1)
    mix = np.stack([a[:, None] * b for a in (1 - y, y) for b in (1 - x, x)], axis=-1)
    return taps, mix.astype(np.float32)


def alone(slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(taps i32[... 4], mix f32[... 4]) of tokens that are no means."""
    taps = np.repeat(slots[..., None], 4, axis=-1).astype(np.int32)
    return taps, np.broadcast_to(np.array([1, 0, 0, 0], np.float32), taps.shape).copy()


def _between(n: int, old: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For n places on a line of `old` values: the neighbour before, the one after, and the part of the second."""
    at = np.maximum((np.arange(n, dtype=np.float32) + np.float32(0.5)) * np.float32(old / n) - np.float32(0.5), 0)
    before = np.minimum(at.astype(np.int64), old - 1)
    return before, np.minimum(before + 1, old - 1), at - before


def _joined(pieces: Pieces) -> Pieces:
    """Without empty texts, and with neighbours joined: a tokenizer may have one token for two line breaks."""
    out: Pieces = []
    for piece in pieces:
        if isinstance(piece, str) and not piece:
            continue
        if out and type(out[-1]) is type(piece):
            last = out.pop()
            piece = last + piece if isinstance(piece, str) else Run(slots=np.concatenate([last.slots, piece.slots]))
        out.append(piece)
    return out
