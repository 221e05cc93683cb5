"""How one modality enters a model: a view cuts the bytes, an encoder reads the patches, a connector fits the width."""

from dataclasses import replace
from typing import Any, Protocol

import jax
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.types import Features, Grid, Media


class View(Protocol):
    """Runs on the host, on encoded bytes; see data/views.py."""

    def grid(self, height: int, width: int, patch: int) -> Grid: ...
    def tiny(self) -> "View": ...


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
class TowerConfig:
    """One modality: view, encoder, connector, and the route of the features.

    `route="splice"` puts them into the row where the medium stands; `"pool"` keeps one vector of each
    item beside the row (dual encoders), and takes no connector.
    """

    view: Any
    encoder: Any
    connector: Any = None
    route: str = "splice"

    def num_tokens(self, grid: Grid) -> Grid:
        """Media tokens that stand in the row for an item of this many patches."""
        tokens = self.encoder.num_tokens(grid)
        return (0, 0, 0) if self.route == "pool" else self.connector.num_tokens(tokens)

    @property
    def patch(self) -> int:
        return self.encoder.patch

    def check(self) -> "TowerConfig":
        """Itself, if view and encoder agree on the grid; otherwise a ConfigError that says how to mend it."""
        if (self.connector is None) != (self.route == "pool"):
            raise ConfigError(f"a tower with route={self.route!r} {'needs a' if self.connector is None else 'takes no'} connector")
        self.num_tokens(self.view.grid(480, 640, self.patch))
        return self

    def tiny(self) -> "TowerConfig":
        encoder = self.encoder.tiny()
        view = replace(self.view, size=encoder.grid * encoder.patch)
        return replace(self, view=view, encoder=encoder, connector=self.connector and self.connector.tiny())


class Tower(nnx.Module):
    def __init__(self, cfg: TowerConfig, d_out: int, *, rngs: nnx.Rngs):
        cfg.check()
        self.encoder = cfg.encoder.build(rngs=rngs)
        self.connector = cfg.connector.build(cfg.encoder.width, d_out, rngs=rngs)

    def __call__(self, media: Media) -> Features:
        return self.connector(self.encoder(media))


def one_item(pooled: jax.Array) -> jax.Array:
    """f[b i d] -> f[b d]: a pair has one item in its row."""
    return pooled[:, 0]
