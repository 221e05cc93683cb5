"""The training step, one for every objective.

Microbatches change memory and not the result.  Losses that add up over rows are divided by the count of
the whole batch, which is found first (it costs nothing: the compiler drops the model from that pass).
Losses that compare all rows with all rows, the contrastive ones, see the embeds of the whole batch: the
model runs once without gradients for the embeds, then once for each microbatch against the gradient of
the loss at its embeds (GradCache, arXiv:2101.06983).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mllm_jax import compiler
from mllm_jax.nn.param import Params, merge
from mllm_jax.objectives.base import Objective
from mllm_jax.recipe import Stage
from mllm_jax.sharding import Layout
from mllm_jax.train.state import TrainState
from mllm_jax.types import Batch, Mean, Outputs, mean

Scores = dict[str, Mean]
Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Scores]]


def make_step(
    graph: object,
    objectives: Mapping[str, Objective],
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    ema: float | None = None,
) -> Step:
    """A function (state, batch, key) -> (state, {name: Mean}), to be jitted."""
    gradient = _gradient if microbatches == 1 else _accumulated(microbatches)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Scores]:
        batch = corrupt(objectives, batch, jax.random.fold_in(key, state.step))
        model = lambda params: merge(graph, {**state.frozen, **params})
        grads, scores = gradient(model, objectives, state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema if ema is None else optax.incremental_update(params, state.ema, 1 - ema)
        scores |= {"loss": mean(total_loss(objectives, scores)), "grad_norm": mean(optax.tree.norm(grads))}
        return TrainState(step=state.step + 1, params=params, frozen=state.frozen, opt_state=opt_state, ema=average), scores

    return step


def jit_step(graph: object, stage: Stage, optimizer: optax.GradientTransformation, layout: Layout, mesh: Mesh) -> jax.stages.Wrapped:
    """The step of a stage as it is run on this mesh; the new state takes the place of the old one."""
    step = make_step(graph, stage.objectives, optimizer, microbatches=layout.microbatches, ema=stage.ema)
    return jax.jit(step, donate_argnums=0, compiler_options=compiler.flags(layout.flags, mesh.devices.flat[0]))


def corrupt(objectives: Mapping[str, Objective], batch: Batch, key: jax.Array) -> Batch:
    """What the model is given in training: without what is to be predicted, and with random bits for each row."""
    for i, objective in enumerate(objectives.values()):
        batch = objective.corrupt(batch, jax.random.fold_in(key, i))
    if batch.draws is None:
        batch = replace(batch, draws=jax.random.bits(jax.random.fold_in(key, len(objectives)), batch.tokens.shape[:1]))
    return batch


def score(objectives: Mapping[str, Objective], out: Outputs, batch: Batch) -> Scores:
    """What the objectives say, as "name/..."; and what the model says of itself, under the names that it gives."""
    return {f"{name}/{k}": v for name, o in objectives.items() for k, v in o.score(out, batch).items()} | out.aux


def total_loss(objectives: Mapping[str, Objective], scores: Scores) -> jax.Array:
    return sum(o.weight * scores[f"{name}/loss"].value for name, o in objectives.items())


def _gradient(model: Callable, objectives: Mapping[str, Objective], params: Params, batch: Batch) -> tuple[Params, Scores]:
    def loss(params: Params) -> tuple[jax.Array, Scores]:
        scores = score(objectives, model(params)(batch), batch)
        return total_loss(objectives, scores), scores

    return jax.grad(loss, has_aux=True)(params)


def _accumulated(n: int) -> Callable:
    def gradient(model: Callable, objectives: Mapping[str, Objective], params: Params, batch: Batch) -> tuple[Params, Scores]:
        parts = split_rows(batch, n)
        by_row = {k: o for k, o in objectives.items() if not o.whole}
        whole = {k: o for k, o in objectives.items() if o.whole}

        counts = {}
        if by_row:
            _, each = jax.lax.scan(lambda _, part: (None, {
                k: o.score(model(params)(part), part)["loss"].count for k, o in by_row.items()}), None, parts)
            counts = {k: jnp.sum(c) for k, c in each.items()}

        scores, pull = {}, None
        if whole:
            _, embedded = jax.lax.scan(lambda _, part: (None, embeds_of(model(params)(part))), None, parts)
            together = join_rows(embedded.embeds)
            # Scale and bias are the same in every part; the first stands for all.
            first = lambda x: None if x is None else x[0]

            def loss(embeds: dict, scale: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, Scores]:
                scores = score(whole, Outputs(embeds=embeds, scale=scale, bias=bias), batch)
                return total_loss(whole, scores), scores

            over = (0, 1) if embedded.bias is None else (0, 1, 2)
            pulls, scores = jax.grad(loss, over, has_aux=True)(together, first(embedded.scale), first(embedded.bias))
            pull = (pulls[0], *(jnp.broadcast_to(p / n, (n,)) for p in pulls[1:]))
            pull = (jax.tree.map(lambda x: split_rows(x, n), pull[0]), *pull[1:])

        def part_loss(params: Params, part: Batch, pull: tuple | None) -> tuple[jax.Array, Scores]:
            out = model(params)(part)
            scores = score(by_row, out, part)
            total = sum((o.weight * scores[f"{k}/loss"].total / jnp.maximum(counts[k], 1e-8) for k, o in by_row.items()), 0.0)
            if pull is not None:
                values = (out.embeds, out.scale, out.bias)[: len(pull)]
                total += sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(pull), jax.tree.leaves(values)))
            return total, scores

        def add(carry: Params, part: tuple) -> tuple[Params, Scores]:
            grads, scores = jax.grad(part_loss, has_aux=True)(params, *part)
            return jax.tree.map(jnp.add, carry, grads), scores

        grads, each = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, pull))
        return grads, scores | jax.tree.map(lambda x: jnp.sum(x, axis=0), each)

    return gradient


def embeds_of(out: Outputs) -> Outputs:
    return Outputs(embeds=out.embeds, scale=out.scale, bias=out.bias)


def split_rows(tree: object, n: int) -> object:
    """[b ...] -> [n, b/n ...]: part k has rows k, k + n, ..., so that every device has rows of every part."""

    def one(x: jax.Array) -> jax.Array:
        if x.shape[0] % n:
            raise ValueError(f"a batch of {x.shape[0]} rows does not divide into {n} microbatches")
        return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

    return jax.tree.map(one, tree)


def join_rows(tree: object) -> object:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


