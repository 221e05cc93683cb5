"""What every part of a kind must satisfy; a new part calls its contract from its own test."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.nn.param import axes_of, merge, split
from mllm_jax.types import Features, Grid, Media


def check_connector(cfg: Any, grid: Grid = (1, 4, 4), d_in: int = 8, d_out: int = 12) -> Features:
    """Token count as promised, nothing mixed between rows or lost to an empty item, a gradient to every parameter."""
    module = cfg.build(d_in, d_out, rngs=nnx.Rngs(0))
    n = int(np.prod(grid))
    tokens = jax.random.normal(jax.random.key(1), (2, n, d_in))
    y = check_features(module, Features(tokens=tokens, mask=jnp.ones((2, n), bool).at[1].set(False)))
    assert y.tokens.shape == (2, int(np.prod(cfg.num_tokens(grid))), d_out)
    return y


def check_encoder(cfg: Any, grid: Grid, unused: tuple[str, ...] = ()) -> Features:
    """As `check_connector`, from patches.  `unused` are beginnings of paths that the features do not need."""
    module = cfg.build(rngs=nnx.Rngs(0))
    p = int(np.prod(grid))
    coords = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(p, 3)
    values = jax.random.normal(jax.random.key(1), (2, 3, p, cfg.patch_dim))
    mask = jnp.array([[True, True, True], [True, False, False]])
    media = Media(values=values, coords=jnp.broadcast_to(coords, (2, 3, p, 3)), mask=mask, slot=jnp.full((2, 1), -1))
    y = check_features(module, media, unused)
    n = int(np.prod(cfg.num_tokens(grid)))
    assert y.tokens.shape == (2, 3 * n, cfg.width)
    np.testing.assert_array_equal(y.mask, np.repeat(mask, n, axis=1))
    # An item is read alone: what stands in the place of a missing one changes no other.
    other = run(module, replace(media, values=values.at[1, 1:].set(7.0)))
    np.testing.assert_array_equal(other.tokens[np.asarray(y.mask)], y.tokens[np.asarray(y.mask)])
    return y


run = jax.jit(lambda module, x: module(x))


def check_features(module: nnx.Module, x: Any, unused: tuple[str, ...] = ()) -> Features:
    y = run(module, x)
    assert y.mask.shape == y.tokens.shape[:2] and y.mask.dtype == bool
    assert jnp.isfinite(y.tokens).all()
    graph, params = split(module)
    axes = axes_of(module)
    assert axes.keys() == params.keys() and all(params[k].ndim - len(axes[k]) in (0, 1) for k in params), "axes without names"
    target = jax.random.normal(jax.random.key(2), y.tokens.shape)       # a plain sum is blind to what a last norm does
    grads = jax.jit(jax.grad(lambda p: jnp.sum(run(merge(graph, p), x).tokens * target)))(params)
    for path, g in grads.items():
        reached = bool(jnp.any(g != 0))
        assert reached != path.startswith(unused or "\0"), f"{'no' if not reached else 'a'} gradient reaches {path}"
    return y
