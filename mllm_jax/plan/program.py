"""A stage's training step, compiled for devices that are not here.

The program is that of `train/loop.py`, on a state and a batch that have shapes and shardings and no data.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax import sharding
from mllm_jax.data.batch import blank_batch
from mllm_jax.data.pack import RowSpec, row_spec
from mllm_jax.plan.executable import Sizes, hlo_text
from mllm_jax.plan.hlo import Hlo
from mllm_jax.plan.topology import not_kept
from mllm_jax.recipe import Recipe, Stage
from mllm_jax.sharding import Layout
from mllm_jax.train.adapters import model_of, trained_of
from mllm_jax.train.feed import lies
from mllm_jax.train.optimizer import build
from mllm_jax.train.state import Blueprint, TrainState, abstract_state
from mllm_jax.train.step import jit_step
from mllm_jax.types import Batch, record


@record
class Program:
    """The step of one stage under one layout, traced, and what it takes."""

    model: Any
    stage: Stage
    layout: Layout
    mesh: Mesh
    blueprint: Blueprint
    trained: set[str]
    spec: RowSpec
    state: TrainState                   # of shapes with shardings, like
    batch: Batch
    traced: jax.stages.Traced

    @functools.cached_property
    def lowered(self) -> jax.stages.Lowered:
        with sharding.use(self.layout, self.mesh):
            return self.traced.lower()


@record
class Compiled:
    """An executable, or what the compiler had to say instead."""

    program: Program
    executable: jax.stages.Compiled | None      # None too where machine code was not waited for (plan/passes.py)
    text: str                           # of the optimised module, in the order in which it runs
    sizes: Sizes | None
    refusal: str                        # "" if it fits; otherwise that it does not, in the compiler's words
    seconds: float

    @functools.cached_property
    def hlo(self) -> Hlo:
        return Hlo(self.text)


def lower(recipe: Recipe, name: str, layout: Layout, devices: list[jax.Device]) -> Program:
    """The step of that stage, as it is traced on these devices.

    Raises:
      ConfigError: the mesh does not fit the devices, or the rows of a batch do not divide over it.
    """
    mesh = layout.make_mesh(list(devices))
    stage, model = recipe.stages[name], model_of(recipe, name)
    sharding.check_rows(f"stages.{name}.data.batch_size", stage.data.batch_size, layout, mesh.shape)
    sharding.check_length(f"stages.{name}.data.seq_len", stage.data.seq_len, mesh.shape)
    with sharding.use(layout, mesh), not_kept():
        blueprint = Blueprint(model, layout, mesh)
        trained = trained_of(stage, blueprint.shapes)
        optimizer = build(stage.optimizer, stage.steps, sorted(trained))
        state = abstract_state(blueprint, trained, optimizer, ema=stage.ema is not None)
        spec = row_spec(stage.data.seq_len, stage.data.items, model.inputs, 0, stage.data.trained)
        batch = abstract_batch(stage.data.batch_size, spec, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        traced = jit_step(blueprint.graph, stage, optimizer, layout, mesh).trace(state, batch, key)
    return Program(model=model, stage=stage, layout=layout, mesh=mesh, blueprint=blueprint, trained=trained, spec=spec, state=state,
                   batch=batch, traced=traced)


def abstract_batch(rows: int, spec: RowSpec, mesh: Mesh) -> Batch:
    """Shapes and shardings of what `train/feed.py` gives the step."""
    batch = blank_batch(rows, spec)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=where), batch, lies(batch, mesh))


def compile(program: Program) -> Compiled:
    """Compiles for the devices of the program's mesh; that it does not fit into their memory is an answer, not an error."""
    began, executable, refusal = time.monotonic(), None, ""
    try:
        with not_kept():
            executable = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = refused(error)
    seconds = time.monotonic() - began
    text, sizes = (hlo_text(executable), Sizes.of(executable)) if executable else ("", None)
    return Compiled(program=program, executable=executable, text=text, sizes=sizes, refusal=refusal, seconds=seconds)


def refused(error: BaseException) -> str:
    """What the compiler said, if it is that there is too little memory; else it is raised."""
    said = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in said:
        raise error
    return said
