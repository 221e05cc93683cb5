"""Nothing large lies whole on every chip: the state of recipes in full size, and what the audit sees in programs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mllm_jax import sharding
from mllm_jax.chips import CHIPS
from mllm_jax.config import load
from mllm_jax.launch import layouts
from mllm_jax.plan.audit import of_activations, of_state
from mllm_jax.plan.hlo import Hlo
from mllm_jax.plan.network import Network
from mllm_jax.train.adapters import model_of, trained_of
from mllm_jax.train.optimizer import build
from mllm_jax.train.state import Blueprint, abstract_state

# Odd vocabularies, adapters, factored moments, one key head, learned queries, two sets of weights, memory, two towers.
NAMES = ("resampler/instructblip", "projector/idefics3", "experts/mm1", "projector/paligemma", "resampler/qwen_vl", "experts/cogvlm",
         "resampler/flamingo", "contrastive/siglip")
LAYOUT = layouts.find("auto:mesh.fsdp=4,mesh.tensor=2,slices=1", "tpu")


def state_of(name: str) -> SimpleNamespace:
    recipe, mesh = load(name), LAYOUT.make_mesh()
    stage_name, stage = list(recipe.stages.items())[-1]
    blueprint = Blueprint(model_of(recipe, stage_name), LAYOUT, mesh)
    trained = trained_of(stage, blueprint.shapes)
    state = abstract_state(blueprint, trained, build(stage.optimizer, stage.steps, sorted(trained)), ema=stage.ema is not None)
    return SimpleNamespace(mesh=mesh, layout=LAYOUT, blueprint=blueprint, state=state)


@pytest.mark.parametrize("name", NAMES)
def test_no_parameter_and_no_moment_of_a_mebibyte_is_replicated(name):
    assert not (found := list(of_state(state_of(name)))), found


def test_a_parameter_that_its_names_leave_whole_is_seen(monkeypatch):
    """As was a vocabulary of 32,001 over two chips, and a matrix of adapters without the width of the model."""
    monkeypatch.setattr(sharding, "LARGE", 1 << 60)
    found = {r.name: r for r in of_state(state_of("resampler/instructblip"))}
    assert found["decoder/embedding/table"].axes == ("tensor",) and found["decoder/embedding/table"].shape == "float32[32001,1024]"
    assert "decoder/blocks/0/attn/q/kernel" not in found


def program_of(function, batch: int) -> SimpleNamespace:
    """Of x f[batch 512 128] split by rows, and w f[128 256] split by its first axis, over eight CPU devices."""
    layout = sharding.Layout(mesh={"fsdp": 8})
    mesh = layout.make_mesh()
    put = lambda shape: jax.ShapeDtypeStruct(shape, "float32", sharding=jax.sharding.NamedSharding(mesh, jax.P("fsdp")))
    x, w = put((batch, 512, 128)), put((128, 256))
    text = jax.jit(function).lower(x, w).compile().as_text()
    stage = SimpleNamespace(data=SimpleNamespace(batch_size=batch))
    program = SimpleNamespace(mesh=mesh, layout=layout, stage=stage, state=SimpleNamespace(params={"w": w}, frozen={}),
                              spec=SimpleNamespace(seq_len=512, media={}))
    return program, Hlo(text), Network(CHIPS["v5e"], [(k, 0, 0, 0) for k in range(8)], {"fsdp": 8})


GATHER = """HloModule jit_step

ENTRY %main (p: f32[16,{0}]) -> f32[{1},16,{0}] {{
  %p = f32[16,{0}]{{1,0}} parameter(0)
  ROOT %gathered = f32[{1},16,{0}]{{2,1,0}} all-gather(%p), replica_groups={2}, dimensions={{0}}, metadata={{op_name="dot"}}
}}
"""
ALL, TWO = "{{0,1,2,3,4,5,6,7}}", "{{0,4},{1,5},{2,6},{3,7}}"


def test_a_weight_whose_shards_are_put_side_by_side_is_a_weight():
    """XLA gathers along both axes at once, or along one, in a shape that no weight has."""
    layout = sharding.Layout(mesh={"fsdp": 2, "context": 4})
    mesh = layout.make_mesh()
    w = jax.ShapeDtypeStruct((32, 16), "float32", sharding=jax.sharding.NamedSharding(mesh, jax.P("fsdp", "context")))
    program = SimpleNamespace(mesh=mesh, layout=layout, stage=SimpleNamespace(data=SimpleNamespace(batch_size=24)),
                              state=SimpleNamespace(params={"w": w}, frozen={}), spec=SimpleNamespace(seq_len=512, media={}))
    network = Network(CHIPS["v5e"], [(k, 0, 0, 0) for k in range(8)], {"fsdp": 2, "context": 4})
    assert not of_activations(program, Hlo(GATHER.format(4, 8, ALL)), network, large=1 << 8)
    assert not of_activations(program, Hlo(GATHER.format(4, 2, TWO)), network, large=1 << 8)
    [other] = of_activations(program, Hlo(GATHER.format(5, 8, ALL)), network, large=1 << 8)
    assert other.shape == "f32[8,16,5]" and other.axes == ("fsdp", "context")


def test_rows_that_are_gathered_are_seen_and_weights_that_are_gathered_are_not():
    everywhere = lambda x: jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(sharding.Layout(mesh={"fsdp": 8}).make_mesh(), jax.P()))
    apart = program_of(lambda x, w: jnp.tanh(x @ w), 24)
    assert not of_activations(*apart, large=1 << 10)
    found = of_activations(*program_of(lambda x, w: jnp.sum(jnp.sin(everywhere(jnp.tanh(x @ w))), 1), 24))
    assert found and all(r.what == "activation" and r.axes == ("fsdp",) for r in found)
    assert max(r.bytes for r in found) == 24 * 512 * 256 * 4
