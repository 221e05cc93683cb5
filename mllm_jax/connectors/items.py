"""Media tokens item by item, and on the square grid of an item: what connectors that mix neighbours share.

Features lie in the row one item after another, f[b (i n) d].  A connector that reads more than one token at a time
says in its configuration how many an item has, and reads each item apart.
"""

from math import isqrt

import jax
import jax.numpy as jnp

from mllm_jax.config import ConfigError
from mllm_jax.sharding import constrain
from mllm_jax.types import Features, Grid


def split_items(x: Features, n: int) -> jax.Array:
    """f[b (i n) d] -> f[(b i) n d].  Raises ConfigError where the tokens of a row are no multiple of n."""
    b, m, d = x.tokens.shape
    if m % n:
        raise ConfigError(f"the connector reads items of {n} tokens; a row has {m}, which is no multiple: set its grid to the encoder's")
    return x.tokens.reshape(b * (m // n), n, d)


def split_grids(x: Features, side: int) -> jax.Array:
    """f[b (i r c) d] -> f[(b i) r c d], where r and c count to `side`."""
    y = split_items(x, side * side)
    return y.reshape(y.shape[0], side, side, -1)


def join_items(y: jax.Array, x: Features) -> Features:
    """f[(b i) k d], made of the items of x -> f[b (i k) d]; an item is there if any of its tokens was."""
    b, k, d = x.mask.shape[0], y.shape[1], y.shape[2]
    y = constrain(y, "item patch embed_act")
    there = jnp.any(x.mask.reshape(y.shape[0], -1), axis=1)
    return Features(tokens=y.reshape(b, -1, d), mask=jnp.repeat(there.reshape(b, -1), k, axis=1))


def join_grids(y: jax.Array, x: Features) -> Features:
    """f[(b i) r c d] -> f[b (i r c) d]."""
    return join_items(y.reshape(y.shape[0], -1, y.shape[-1]), x)


def check_square(grid: Grid, side: int, name: str) -> int:
    """The frames of a grid whose rows and columns are `side`; otherwise a ConfigError that says how to mend it."""
    frames, rows, columns = grid
    if (rows, columns) != (side, side):
        want = rows if rows == columns else isqrt(rows * columns)
        raise ConfigError(f"the {name} reads grids of {side}x{side} tokens; the encoder gives {rows}x{columns}: "
                          f"set its grid to {want}" + ("" if rows == columns else ", and let the encoder give a square"))
    return frames
