"""Layers made by vmap and run by scan: one layer is compiled however many there are.

Layers may differ in a cycle (every fourth reads the image, every second is sparse): layer i is number
i // c of the stack at place i % c.  Parameter paths are `blocks/{i % c}/...` with a leading axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.nn import remat
from mllm_jax.nn.param import next_key
from mllm_jax.sharding import current


def make(cycle: Sequence[Callable[[nnx.Rngs], nnx.Module]], depth: int, *, rngs: nnx.Rngs) -> nnx.List:
    """`depth` layers, made in turn by the functions of the cycle; stacked where they stand at the same place of it."""
    c = len(cycle)
    keys = jax.random.split(next_key(rngs), depth)
    return nnx.List([jax.vmap(lambda key, one=one: one(nnx.Rngs(key)))(keys[j::c]) for j, one in enumerate(cycle)])


Step = Callable[[Any, nnx.Module, jax.Array, int], tuple[Any, Any]]


def run(blocks: nnx.List, step: Step, x: Any, *, depth: int) -> tuple[Any, list]:
    """Runs x, out = step(x, layer, i, j) for the first `depth` layers, rematerialized as the layout says.

    i is the number of the layer, traced, and j its place in the cycle.  Returns x, and for each place of the
    cycle what its layers gave out, stacked.
    """
    layout, c = current(), len(blocks)
    whole, inside = depth // c, step
    if (policy := remat.policy(layout.remat)) is not None:
        # In straight code the compiler finds what is computed again equal to what was, and keeps that; and of several layers in a turn
        # it computes everything again at the beginning, for nothing that is given waits for the gradients.
        kept = lambda apart: jax.checkpoint(step, policy=policy, prevent_cse=apart, static_argnums=(3,))
        inside, step = kept(c * layout.unroll > 1 or whole == 1), kept(True)

    def cycle(x: Any, i_layers: tuple[jax.Array, list[nnx.Module]]) -> tuple[Any, list]:
        i, layers = i_layers
        outs = []
        for j, layer in enumerate(layers):
            x, out = inside(x, layer, i * c + j, j)
            outs.append(out)
        return x, outs

    first = [_take(block, slice(0, whole)) for block in blocks]
    x, outs = jax.lax.scan(cycle, x, (jnp.arange(whole), first), unroll=min(layout.unroll, max(whole, 1)))
    for j in range(depth % c):
        x, out = step(x, _take(blocks[j], whole), jnp.asarray(whole * c + j), j)
        outs[j] = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), outs[j], out)
    return x, outs


def _take(block: nnx.Module, index: slice | int) -> nnx.Module:
    size = jax.tree.leaves(block)[0].shape[0]
    return block if index == slice(0, size) else jax.tree.map(lambda a: a[index], block)
