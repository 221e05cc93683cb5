"""The values that flow through the library, in the order in which they appear.

    Example -> (view, template) -> Sequence -> (pack) -> Batch -> (encoder, connector) -> Features
            -> (decoder) -> Outputs -> (objective) -> Mean

Axis names, used in every shape comment of the library:
    b batch row      s position in a row     t key position           i media item in a row
    p patch of an item (before the encoder)  m media token of a row (after the connector)
    d width          h head                  g key-value head         k width of a head
    f hidden width   v vocabulary            e expert                 u values of a raw patch

`Example`, `Sequence` and a `Batch` fresh from the loader live on the host (numpy); the same `Batch`
holds device arrays inside the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

struct = lambda cls: jax.tree_util.register_dataclass(dataclass(frozen=True, kw_only=True)(cls))
record = dataclass(frozen=True, kw_only=True)

Grid = tuple[int, int, int]             # (time, rows, columns) of the patches or tokens of one media item

KINDS = {"text": 0, "image": 1, "video": 2, "audio": 3}     # the numbers in Batch.kinds


# --- on the host: one example -------------------------------------------------------------------------------------


@record
class Part:
    """A piece of a turn: text, or the place where a medium stands."""

    kind: str = "text"                  # "text", "image", "video" or "audio"
    text: str = ""                      # of a text part
    media: int = -1                     # of the others: index into Example.media


@record
class Turn:
    role: str                           # "system", "user", "assistant" or "tool"
    parts: tuple[Part, ...]
    weight: float | None = None         # of its tokens in the loss; None: 1 for the assistant, 0 for the others


@record
class Blob:
    """An encoded medium: its bytes, or where they are.  Never decoded pixels."""

    kind: str
    data: bytes | None = None
    path: str | None = None             # read when the row is decoded, so that packing stays light


@record
class Example:
    """One example of any source.  Placeholder strings such as `<image>` exist in files only; parsing makes them Parts."""

    id: str                             # unique in its source; keys augmentation, logs and exactly-once evaluation
    turns: tuple[Turn, ...] = ()
    media: tuple[Blob, ...] = ()
    captions: tuple[str, ...] = ()      # contrastive pairs: alternative texts of the one medium
    answers: tuple[str, ...] = ()       # evaluation: all accepted answers
    chosen: tuple[Turn, ...] = ()       # preference: two continuations of `turns`
    rejected: tuple[Turn, ...] = ()
    kind: str = ""                      # for reports: the sort of question, the category, ...
    source: str = ""                    # the data set it came from
    extra: Mapping[str, Any] = field(default_factory=dict)


@record
class Cut:
    """How a view cuts one medium: into `tiles` pieces of one grid of patches each.

    Tiles lie in rows and columns and are counted row by row; frames of a video follow one another.  `overview` is the
    number of the tile that shows the whole medium once more, before all others or after them.  A medium that is nothing
    but its overview has no rows and columns.
    """

    size: tuple[int, int]               # (height, width) of the medium in pixels
    grid: Grid                          # patches of one tile
    rows: int = 1
    columns: int = 1
    overview: int | None = None
    frames: int = 1                     # tiles of a video, one after another
    seconds: tuple[float, ...] = ()     # of a video: the time of each frame, or of each step of `grid`
    every: float = 0.0                  # of a video: seconds between them on average

    @property
    def tiles(self) -> int:
        return self.frames * self.rows * self.columns + (self.overview is not None)


@record
class Run:
    """Media tokens that stand side by side in a row; what a layout makes of a medium, together with pieces of text.

    A slot below -1 is mark number -2 - slot of the layout (a learned vector, see TowerConfig.marks).
    """

    slots: np.ndarray                   # i32[n]     tile * tokens of a tile + token
    places: np.ndarray | None = None    # i32[n 3]   positions counted from that of the run; None: as TowerConfig.place says
    taps: np.ndarray | None = None      # i32[n 4]   slots of which a token is the weighted mean; the first one is its slot
    mix: np.ndarray | None = None       # f32[n 4]   their weights
    kind: str | None = None             # of these positions, a key of KINDS; None: that of the medium


@record
class Item:
    """A medium of a Sequence: not decoded yet, but how it will be cut is known from the header."""

    modality: str                       # the input of the model by which it enters
    blob: Blob
    cut: Cut
    room: int                           # what it takes of a row: tiles, or patches where the layout is packed
    num_tokens: int                     # media tokens of all its tiles, after the connector
    text: np.ndarray | None = None      # i32[t]    that the tower reads beside it, in a vocabulary of its own


@record
class Sequence:
    """One tokenized example, ragged; arrays have one entry for each position."""

    id: str
    source: str
    tokens: np.ndarray                  # i32[s]
    targets: np.ndarray                 # i32[s]    the token after this one
    weights: np.ndarray                 # f32[s]    0 where nothing is predicted
    kinds: np.ndarray                   # i32[s]
    positions: np.ndarray               # i32[s 3]
    blocks: np.ndarray | None           # i32[s], or None for causal
    # By the input of the model, i32[s]: token among those of its own items (one after another), -1 where none stands,
    # -2 - k for mark k.  With route "memory" it is the item that a position reads.
    slots: Mapping[str, np.ndarray] = field(default_factory=dict)
    items: tuple[Item, ...] = ()
    taps: np.ndarray | None = None      # i32[s 4]  slots as above, where a token is a mean of several
    mix: np.ndarray | None = None       # f32[s 4]

    def __len__(self) -> int:
        return len(self.tokens)


# --- on the device ------------------------------------------------------------------------------------------------


@struct
class Media:
    """Media items of one modality in a batch, and where their tokens go in the rows.

    Fixed layout: every item (a tile) has the same grid, and `values` is [b i p u].

    Packed layout (native resolution): `values` is [b n u], every item has a grid of its own, one item follows the
    other, and `item[b n]` says which item of its row, counted from 1, a patch belongs to; 0 is padding.  An encoder
    attends within an item only.  The grid of an item is the largest of its coordinates plus one.  Patches that become
    one token stand side by side, so token m is made of patches m * k to m * k + k - 1.

    A slot after the last media token is a mark: a learned vector that the tower appends.
    """

    values: jax.Array                   # [b i p u]: u8 raw pixels 0-255, which the encoder normalizes; or f32, taken as they are
    coords: jax.Array                   # i32[b i p 3]   grid position (time, row, column) of each patch; packed i32[b n 3]
    mask: jax.Array                     # bool[b i]      False where the row has fewer items; packed bool[b n], of patches
    slot: jax.Array                     # i32[b s]       media token of the row that stands at position s; -1 for text
    item: jax.Array | None = None       # i32[b n]       packed layout only
    taps: jax.Array | None = None       # i32[b s 4]     media tokens whose weighted mean stands there; None: slot alone
    mix: jax.Array | None = None        # f32[b s 4]     their weights
    text: jax.Array | None = None       # i32[b i t]     what the tower reads beside an item, in a vocabulary of its own; -1 is padding
    time: jax.Array | None = None       # f32[b i]       noise level in [0, 1]; diffusion only
    target: jax.Array | None = None     # f32[b i p u]   what the output head should predict; diffusion only


@struct
class Batch:
    """Packed rows of text and media; every array has a static shape.

    Position i sees position j when they share a segment and `blocks[j] <= blocks[i]`.  None stands for
    the position in the row, that is causal attention, and is a static choice of the faster kernels.  One
    number for a whole image makes attention bidirectional inside it.
    """

    tokens: jax.Array                   # i32[b s]
    targets: jax.Array                  # i32[b s]       token to predict here
    weights: jax.Array                  # f32[b s]       0 where nothing is predicted
    segments: jax.Array                 # i32[b s]       packed example, counted from 1; 0 is padding
    positions: jax.Array                # i32[b s 3]     (time, row, column); all equal for text
    kinds: jax.Array                    # i32[b s]       see KINDS
    blocks: jax.Array | None = None     # i32[b s]
    trained: jax.Array | None = None    # i32[b n]       positions with a weight, -1 behind the last; None: any may have one
    media: dict[str, Media] = field(default_factory=dict)
    draws: jax.Array | None = None      # u32[b]         random bits for a model that draws, such as negatives for each row


@struct
class Features:
    tokens: jax.Array                   # f[b m d]
    mask: jax.Array                     # bool[b m]
    deep: jax.Array | None = None       # f[n b m d]     the same tokens at n earlier levels of the encoder
    text: jax.Array | None = None       # i32[b i t]     as in Media, for a connector that reads it


@struct
class Mean:
    """A weighted mean kept as numerator and denominator, so that adding two of them is exact."""

    total: jax.Array
    count: jax.Array

    @property
    def value(self) -> jax.Array:
        """The mean; 0 where nothing was counted."""
        return self.total / jnp.where(self.count == 0, 1, self.count)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(total=self.total + other.total, count=self.count + other.count)


def mean(x: jax.Array, weights: jax.Array | None = None) -> Mean:
    """Mean of f[...] with weights of the same or a broadcastable shape."""
    weights = jnp.ones_like(x) if weights is None else jnp.broadcast_to(weights, x.shape)
    return Mean(total=jnp.sum(x * weights), count=jnp.sum(weights))


@struct
class Pairs:
    """Answers to "do these two belong together?" about pairs of each row."""

    logits: jax.Array                   # f[b n 2]       of no and yes
    labels: jax.Array                   # i32[b n]       the truth: 0 no, 1 yes, -1 where there is no pair


@struct
class Outputs:
    """Everything an objective may read; unused fields are None or empty."""

    hidden: jax.Array | None = None                                # f[b s d]
    unembed: jax.Array | None = None                               # f[d v]: hidden @ unembed are the logits
    media: dict[str, jax.Array] = field(default_factory=dict)      # f[b i p u]  outputs of heads
    embeds: dict[str, jax.Array] = field(default_factory=dict)     # f[b d]      unit vectors; f[b n d] where a row has n
    scale: jax.Array | None = None                                 # f[]         logit scale
    bias: jax.Array | None = None                                  # f[]         logit bias
    pairs: Pairs | None = None
    aux: dict[str, Mean] = field(default_factory=dict)
    reference: "Outputs | None" = None
