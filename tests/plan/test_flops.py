"""The operations that training reports are those of the compiled step."""

from dataclasses import replace
from math import prod

import jax
import pytest

from mllm_jax.config import load
from mllm_jax.plan.hlo import Hlo
from mllm_jax.plan.program import lower
from mllm_jax.plan.work import program_flops
from mllm_jax.sharding import Layout
from mllm_jax.train.flops import full_counts, step_flops

NAMES = ("contrastive/siglip", "projector/llava_15", "resolution/qwen2_vl", "experts/moe_llava", "resampler/flamingo", "projector/gemma3")


def seen_whole(model):
    """The model with all pairs of a row visible and no room to spare, which is what a program computes and training does not count."""
    part = "decoder" if hasattr(model, "decoder") else "text"
    stack = getattr(model, part)
    tight = tuple(replace(layer, mlp=replace(layer.mlp, capacity=1.0)) if getattr(layer, "mlp", None) else layer for layer in stack.cycle)
    return replace(model, **{part: replace(stack, causal=False, cycle=tight)})


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_counted_within_two_percent_of_the_compiled_one(name):
    recipe = load(name).tiny()
    stage, last = list(recipe.stages.values())[-1], list(recipe.stages)[-1]
    # Of layers before the first one that trains, training counts gradients that do not exist: of one in two here, of one in 32 there.
    train = ("decoder/*",) if name == "experts/moe_llava" else stage.train
    recipe = replace(recipe, stages={last: replace(stage, model=seen_whole(stage.model or recipe.model), train=train)})
    program = lower(recipe, last, Layout(mesh={"data": 1}), jax.devices()[:1])
    towers = program.model.inputs
    counts = full_counts(stage.data.batch_size, program.spec, towers)
    # One image fills the room of a packed row.
    pairs = {m: n * program.spec.media[m].items if towers[m].view.packed else n * prod(towers[m].nominal.grid) for m, n in counts.items.items()}
    compiled = program_flops(Hlo(program.lowered.compile().as_text()))
    assert step_flops(program.model, program.trained, replace(counts, pairs=pairs)) == pytest.approx(compiled, rel=0.02)
