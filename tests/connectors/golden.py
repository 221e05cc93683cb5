"""A connector of ours against a fixture of the official one: values, and gradients of the input and of every weight."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.nn.param import merge, split
from mllm_jax.types import Features

Group = Mapping[str, np.ndarray]


def check_official(cfg: Any, fixture: tuple[Group, Group, Group], convert: Callable[[Group], Group], atol: float = 1e-5) -> None:
    """`fixture` as of `official.read`.  `convert` gives our weights from theirs; it is linear, and converts gradients too.

    The items of the fixture stand in one row.  Both sides compute in float32, and sums run in another order.
    """
    io, weights, grads = fixture
    b, n, d_in = io["x"].shape
    d_out = io["y"].shape[-1]
    graph, fresh = split(cfg.build(d_in, d_out, rngs=nnx.Rngs(0)))
    params = {k: jnp.asarray(v) for k, v in convert(weights).items()}
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in fresh.items()}

    def run(params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = merge(graph, params)(Features(tokens=x.reshape(1, b * n, d_in), mask=jnp.ones((1, b * n), bool))).tokens.reshape(b, -1, d_out)
        return jnp.sum(y * io["pull"]), y

    (dp, dx), y = jax.jit(jax.grad(run, (0, 1), has_aux=True))(params, io["x"])
    near = lambda ours, theirs, what: np.testing.assert_allclose(
        ours, theirs, atol=atol * max(1.0, float(np.abs(theirs).max())), rtol=0, err_msg=what)
    near(y, io["y"], "y")
    near(dx, io["dx"], "dx")
    theirs = convert(grads)
    assert len(theirs) == len(params) >= 3 and any(np.abs(g).max() > 1e-2 for g in theirs.values())
    for path, g in theirs.items():
        near(dp[path], g, path)


def linear(group: Group, theirs: str, ours: str) -> dict[str, np.ndarray]:
    """A torch Linear, or a 1x1 convolution, with or without bias."""
    kernel = group[f"{theirs}.weight"]
    out = {f"{ours}/kernel": kernel.reshape(kernel.shape[:2]).T}
    return out | ({f"{ours}/bias": group[f"{theirs}.bias"]} if f"{theirs}.bias" in group else {})


def heads(group: Group, theirs: str, ours: str, n: int, *, out: bool = False) -> dict[str, np.ndarray]:
    """A torch Linear into n heads, or out of them."""
    return split_heads(linear(group, theirs, ours), n, out=out)


def split_heads(layer: Group, n: int, *, out: bool = False) -> dict[str, np.ndarray]:
    """One of ours, with a plain axis for (heads head_dim)."""
    shape = lambda v: (n, -1, v.shape[-1]) if out and v.ndim == 2 else v.shape if out else (*v.shape[:-1], n, v.shape[-1] // n)
    return {k: v.reshape(shape(v)) for k, v in layer.items()}


def norm(group: Group, theirs: str, ours: str) -> dict[str, np.ndarray]:
    return {f"{ours}/scale": group[f"{theirs}.weight"], f"{ours}/bias": group[f"{theirs}.bias"]}


def depthwise(group: Group, theirs: str, ours: str) -> dict[str, np.ndarray]:
    out = {f"{ours}/kernel": group[f"{theirs}.weight"][:, 0].transpose(1, 2, 0)}
    return out | ({f"{ours}/bias": group[f"{theirs}.bias"]} if f"{theirs}.bias" in group else {})


def stacked(layers: list[dict[str, np.ndarray]], ours: str) -> dict[str, np.ndarray]:
    """Layers with the same paths, as one with a leading axis."""
    return {f"{ours}/{k}": np.stack([layer[k] for layer in layers]) for k in layers[0]}
