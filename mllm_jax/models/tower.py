"""How one modality enters a model: a view cuts the bytes, an encoder reads the patches, a connector fits the width."""

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.nn.param import normal, param
from mllm_jax.sharding import constrain
from mllm_jax.types import Blob, Cut, Features, Grid, Media


class View(Protocol):
    """Runs on the host, on encoded bytes; see data/views.py."""

    packed: bool                        # every medium has a grid of its own (types.Media, "Packed layout")

    def look(self, blob: Blob, patch: int) -> Cut: ...
    def plan(self, height: int, width: int, patch: int) -> Cut: ...
    def room(self, patch: int) -> int: ...                       # the most that one medium takes of a row
    def tiny(self, size: int) -> "View": ...                     # for an encoder of so many pixels a side


class EncoderConfig(Protocol):
    width: int
    patch: int

    def build(self, *, rngs: nnx.Rngs) -> Any: ...               # Media -> Features
    def num_tokens(self, grid: Grid) -> Grid: ...
    def tiny(self) -> "EncoderConfig": ...


class ConnectorConfig(Protocol):
    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> Any: ...       # Features -> Features
    def num_tokens(self, grid: Grid) -> Grid: ...
    def tiny(self) -> "ConnectorConfig": ...


@config
class Also:
    """How another kind of media enters through a tower; what is None is as the tower says."""

    view: Any
    layout: Any = None
    sees: str | None = None
    place: str | None = None


@config
class TowerConfig:
    """One modality: view, encoder, connector, and how the features enter the row.

    `route="splice"` puts them into the row where the medium stands; `"memory"` keeps them beside it for cross-attention;
    `"pool"` keeps media out of the decoder: a model without one has vectors of them, with or without a connector.

    `also` are other kinds of media that the same encoder reads: "video", or "images" for examples of several images.
    """

    view: Any
    encoder: Any
    connector: Any = None
    route: str = "splice"
    layout: Any = None                  # of data/layouts.py; None: the tokens of all tiles, one after another
    sees: str = "causal"                # "item": media tokens side by side see one another; "prefix": so does all before the answer
    place: str = "row"                  # a token takes one position; "grid": (time, row, column) of its grid; "one": all share one
    also: Mapping[str, Also] = field(default_factory=dict)

    def num_tokens(self, grid: Grid) -> Grid:
        """Media tokens that the connector makes of a tile of this many patches."""
        tokens = self.encoder.num_tokens(grid)
        return (0, 0, 0) if self.route == "pool" else self.connector.num_tokens(tokens)

    @property
    def words(self) -> Any:
        """How text is read beside each medium (data/words.py); None where it is not, and in rows that are that text."""
        return None if self.route == "pool" else getattr(self.connector, "words", None)

    @property
    def patch(self) -> int:
        return self.encoder.patch

    @property
    def nominal(self) -> Cut:
        """The plan of a photograph of 640x480 pixels, which stands for all where sizes differ."""
        return self.view.plan(480, 640, self.patch)

    @property
    def marks(self) -> tuple[str, ...]:
        """Names of the learned vectors that the layouts put between media tokens."""
        return tuple(dict.fromkeys(name for tower in self.kinds.values() if tower.layout for name in tower.layout.marks))

    @property
    def kinds(self) -> dict[str, "TowerConfig"]:
        """The tower as each kind of media sees it; its own kind is ""."""
        own = replace(self, also={})
        given = {kind: {k: v for k, v in vars(also).items() if v is not None} for kind, also in self.also.items()}
        return {"": own} | {kind: replace(own, **fields) for kind, fields in given.items()}

    @property
    def room(self) -> int:
        """The most that one medium takes of a row: tiles, or patches where the layout is packed."""
        return max(tower.view.room(self.patch) for tower in self.kinds.values())

    def check(self) -> "TowerConfig":
        """Itself, if view and encoder agree on the grid; otherwise a ConfigError that says how to mend it."""
        if self.connector is None and self.route != "pool":
            raise ConfigError(f"a tower with route={self.route!r} needs a connector")
        for kind, tower in self.kinds.items():
            for name, known in (("sees", ("causal", "item", "prefix")), ("place", ("row", "grid", "one"))):
                if getattr(tower, name) not in known:
                    raise ConfigError(f"{name}={getattr(tower, name)!r} of a tower is not one of: {', '.join(known)}")
            if tower.view.packed != self.view.packed:
                raise ConfigError(f"the view of {kind!r} and that of the tower must both be packed, or neither: {tower.view}, {self.view}")
            self.num_tokens(tower.nominal.grid)
        return self

    def tiny(self) -> "TowerConfig":
        encoder = self.encoder.tiny()
        size = getattr(encoder, "grid", 4) * encoder.patch
        also = {kind: replace(also, view=also.view.tiny(size)) for kind, also in self.also.items()}
        return replace(self, view=self.view.tiny(size), encoder=encoder, connector=self.connector and self.connector.tiny(), also=also)


class Tower(nnx.Module):
    def __init__(self, cfg: TowerConfig, d_out: int, *, rngs: nnx.Rngs):
        cfg.check()
        self.encoder = cfg.encoder.build(rngs=rngs)
        self.connector = cfg.connector.build(cfg.encoder.width, d_out, rngs=rngs)
        self.names = cfg.marks
        self.marks = nnx.Dict({name: param(rngs, (d_out,), "embed", normal(d_out**-0.5)) for name in self.names})

    def __call__(self, media: Media) -> Features:
        """f[b m d]: the tokens of all items, and after them the marks."""
        features = self.encoder(media)
        features = self.connector(features if media.text is None else replace(features, text=media.text))
        # Said, because the partitioner of XLA otherwise gives a two-layer MLP on shuffled patches wrong gradients on a mesh of three axes.
        features = replace(features, tokens=constrain(features.tokens, "batch seq embed_act"))
        if not self.names:
            return features
        marks = jnp.stack([self.marks[name][...] for name in self.names])
        after = lambda x, more: jnp.concatenate([x, jnp.broadcast_to(more.astype(x.dtype), (*x.shape[:-2], *more.shape))], axis=-2)
        return Features(
            tokens=after(features.tokens, marks),
            mask=jnp.pad(features.mask, ((0, 0), (0, len(marks))), constant_values=True),
            deep=None if features.deep is None else after(features.deep, jnp.zeros_like(marks)),
        )


def one_item(pooled: jax.Array) -> jax.Array:
    """f[b i d] -> f[b d]: a pair has one item in its row."""
    return pooled[:, 0]
