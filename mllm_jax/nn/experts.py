"""The experts of a sparse layer, and the way of the tokens to them and back, on one device or on a mesh.

A token's output is the weighted sum of what its experts make of it.  On a mesh each device works on the tokens of its
own rows and on the experts that lie on it, and what moves between is written here (shard_map), because the compiler
would gather all experts on every device:

    dropless    devices of one group of experts gather each other's tokens, each expert takes what is its own (sorted by
                expert, `jax.lax.ragged_dot`), and the sums are scattered back.  Any balance fits; traffic grows with
                the group.
    capacity    each row sends its `room` tokens of every expert (all_to_all) and gets them back.  Traffic grows with
                top_k only.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mllm_jax.config import ConfigError
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.mlp import ACTIVATIONS
from mllm_jax.nn.param import axes_of, merge, normal, param, split, zeros
from mllm_jax.nn.remat import keep
from mllm_jax.sharding import compute_dtype, current, current_mesh, spec
from mllm_jax.types import record, struct

SPLIT = ("expert", "mlp")               # axes that stay apart on the mesh; widths are gathered for the time of the product


@struct
class Routes:
    """Where tokens go."""

    expert: jax.Array                   # i32[b s k]   number of experts: nowhere
    weight: jax.Array                   # f32[b s k]   0 there
    place: jax.Array | None             # i32[b s k]   how many of the row stand before; only where room is limited


@record
class Share:
    """Which axes of the mesh the experts are split over."""

    experts: tuple[str, ...] = ()       # each device has some of them
    hidden: tuple[str, ...] = ()        # each device has some of their hidden units
    exchange: bool = False              # devices with other experts have other rows


def dense(path: str) -> str:
    """The parameter of a dense layer of which that of all experts is a copy to begin with (arXiv:2212.05055).

    `blocks/0/mlp/experts/up/kernel` grows from `blocks/0/mlp/up/kernel`; of other parameters it is the parameter itself.
    """
    return path.replace("/mlp/experts/", "/mlp/")


class Kernels(nnx.Module):
    """One matrix for each expert."""

    def __init__(self, experts: int, d_in: int, d_out: int, axes: str, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = param(rngs, (experts, d_in, d_out), f"expert {axes}", normal(d_in**-0.5))
        self.bias = param(rngs, (experts, d_out), f"expert {axes.split()[1]}", zeros) if bias else None


class Experts(nnx.Module):
    """Feed-forward layers like `MLP`, stacked on an axis "expert"."""

    def __init__(self, cfg: BlockConfig, experts: int, *, rngs: nnx.Rngs):
        d, f, bias = cfg.width, cfg.mlp, cfg.mlp_bias
        self.activation = cfg.activation
        self.gate = Kernels(experts, d, f, "embed mlp", bias=bias, rngs=rngs) if cfg.gated else None
        self.up = Kernels(experts, d, f, "embed mlp", bias=bias, rngs=rngs)
        self.down = Kernels(experts, f, d, "mlp embed", bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, routes: Routes, room: int | None) -> jax.Array:
        """f[b s d] -> f[b s d]; an expert takes at most `room` tokens of a row, None: all that come."""
        graph, params = split(self)
        params = {k: v.astype(compute_dtype()) for k, v in params.items()}
        x, mesh, rules = x.astype(compute_dtype()), current_mesh(), current().rules
        if mesh is None or mesh.size == 1:
            return merge(graph, params).apply(x, routes, room, Share())
        lies = {k: spec(tuple(a if a in SPLIT else None for a in axes), params[k].shape, rules, mesh)
                for k, axes in axes_of(self).items()}
        # Room is counted in whole rows; where there is no end of it, positions of a row may be on several devices.
        rows = spec(("batch", "seq" if room is None else None, None), x.shape, rules, mesh)
        share = _share(lies["up/kernel"], rows)
        apply = lambda params, x, routes: merge(graph, params).apply(x, routes, room, share)
        return jax.shard_map(apply, mesh=mesh, in_specs=(lies, rows, rows), out_specs=rows)(params, x, routes)

    def apply(self, x: jax.Array, routes: Routes, room: int | None, share: Share) -> jax.Array:
        """What one device does: its rows f[b s d] -> f[b s d], with the experts that lie on it."""
        # Said here, once: the gradients of all uses are then summed over devices after they are added, not each by itself.
        if together := share.hidden + (() if share.exchange else share.experts):
            x, weight = jax.lax.pcast((x, routes.weight), together, to="varying")
            routes = replace(routes, weight=weight)
        y = _dropless(self, x, routes, share) if room is None else _with_room(self, x, routes, room, share)
        return jax.lax.psum(y, share.hidden) if share.hidden else y

    def mlp(self, x: jax.Array, times: Callable[[jax.Array, Kernels], jax.Array], share: Share) -> jax.Array:
        """act(gate x) * up x, then down; `times` multiplies each row with the matrix of its expert and adds the bias."""
        act, y = ACTIVATIONS[self.activation], keep(times(x, self.up), "mlp")
        y = act(y) if self.gate is None else act(keep(times(x, self.gate), "mlp")) * y
        # Devices with some of the hidden units give a part of the sum each; the bias belongs to one of them.
        first = jax.lax.axis_index(share.hidden) == 0 if share.hidden else True
        return times(y, self.down, first)


def _share(kernel: PartitionSpec, rows: PartitionSpec) -> Share:
    names = lambda axis: () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    experts, hidden, over = names(kernel[0]), names(kernel[2]), names(rows[0])
    if 0 < len(both := set(experts) & set(over)) < len(experts):
        raise ConfigError(f"experts lie on the mesh axes {experts} and rows on {over}, which share only {sorted(both)}; let the "
                          "layout's rules for 'expert' and 'batch' share all axes of the experts, or none")
    return Share(experts=experts, hidden=hidden, exchange=bool(both))


def _dropless(experts: Experts, x: jax.Array, routes: Routes, share: Share) -> jax.Array:
    if share.exchange:
        x, routes = jax.tree.map(lambda a: jax.lax.all_gather(a, share.experts, tiled=True), (x, routes))
    n, k, d = len(experts.up.kernel[...]), routes.expert.shape[-1], x.shape[-1]
    expert = _mine(routes.expert, n, share).reshape(-1)             # n, for other devices or nobody, comes last
    at = jnp.arange(expert.size)
    # One number to sort by: jax 0.10 takes the permutation of an argsort inside shard_map to be the same on all devices.
    which, order = jnp.divmod(jnp.sort(expert * expert.size + at), expert.size)
    back = jnp.zeros_like(order).at[order].set(at, unique_indices=True)
    sizes, here = jnp.bincount(expert, length=n), (which < n)[:, None]
    which = jnp.minimum(which, n - 1)

    def times(rows: jax.Array, kernels: Kernels, first: jax.Array | bool = True) -> jax.Array:
        y = jax.lax.ragged_dot(rows, kernels.kernel[...], sizes)
        return y if kernels.bias is None else y + jnp.where(first, kernels.bias[...], 0)[which]

    # What ragged_dot makes of rows in no group is not defined, forward and backward: nothing goes in, nothing comes out.
    rows = jnp.where(here, x.reshape(-1, d)[order // k], 0)
    y = jnp.where(here, experts.mlp(rows, times, share), 0)[back]
    y = _combine(y.reshape(*routes.expert.shape, d), routes.weight)
    if share.exchange:
        return jax.lax.psum_scatter(y, share.experts, tiled=True)
    return jax.lax.psum(y, share.experts) if share.experts else y


def _with_room(experts: Experts, x: jax.Array, routes: Routes, room: int, share: Share) -> jax.Array:
    (b, s, d), k, n = x.shape, routes.expert.shape[-1], len(experts.up.kernel[...])
    if share.exchange:
        n, expert = n * jax.lax.axis_size(share.experts), routes.expert
    else:
        expert = _mine(routes.expert, n, share)
    # Seats in a row: `room` for each expert, and one behind them all for who goes nowhere.
    seat = jnp.where(expert < n, expert * room + routes.place, n * room)
    token = jnp.broadcast_to(jnp.arange(s)[:, None], (b, s, k))
    sitting = jnp.full((b, n * room + 1), s).at[jnp.arange(b)[:, None, None], seat].set(token)[:, :-1]
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))                   # token s, in empty seats, is 0
    rows = jnp.take_along_axis(padded, sitting[..., None], axis=1).reshape(b, n, room, d)

    def times(rows: jax.Array, kernels: Kernels, first: jax.Array | bool = True) -> jax.Array:
        y = jnp.einsum("becd,edf->becf", rows, kernels.kernel[...])
        return y if kernels.bias is None else y + jnp.where(first, kernels.bias[...], 0)[:, None]

    if share.exchange:
        rows = jax.lax.all_to_all(rows, share.experts, split_axis=1, concat_axis=0, tiled=True)
    y = experts.mlp(rows, times, share)
    if share.exchange:
        y = jax.lax.all_to_all(y, share.experts, split_axis=0, concat_axis=1, tiled=True)
    y = jnp.pad(y.reshape(b, n * room, d), ((0, 0), (0, 1), (0, 0)))
    y = jnp.take_along_axis(y, seat.reshape(b, s * k, 1), axis=1).reshape(b, s, k, d)
    y = _combine(y, routes.weight)
    return jax.lax.psum(y, share.experts) if share.experts and not share.exchange else y


def _mine(expert: jax.Array, n: int, share: Share) -> jax.Array:
    """Numbers of experts as numbers of the n on this device; n for all others."""
    if not share.experts:
        return expert
    local = expert - jax.lax.axis_index(share.experts) * n
    return jnp.where((local >= 0) & (local < n), local, n)


def _combine(y: jax.Array, weight: jax.Array) -> jax.Array:
    """f[b s k d], f32[b s k] -> f[b s d]."""
    return jnp.einsum("bskd,bsk->bsd", y, weight, preferred_element_type=jnp.float32).astype(y.dtype)
