"""The real step, compiled for chips that are not here."""

import jax
import numpy as np
import pytest

pytest.importorskip("libtpu")

from mllm_jax.config import ConfigError, load  # noqa: E402
from mllm_jax.data.batch import blank_batch  # noqa: E402
from mllm_jax.data.loader import Loader  # noqa: E402
from mllm_jax.data.pack import row_spec  # noqa: E402
from mllm_jax.data.vocabulary import recipe_tokenizer  # noqa: E402
from mllm_jax.plan.program import lower  # noqa: E402
from mllm_jax.plan.topology import topology  # noqa: E402
from mllm_jax.sharding import Layout  # noqa: E402


@pytest.mark.parametrize("name", ["projector/llava_15", "resolution/qwen2_vl", "projector/gemma3"])
def test_the_batch_is_that_of_the_loader_in_shapes_and_types(name):
    recipe = load(name).tiny()
    stage, towers = list(recipe.stages.values())[-1], recipe.model.inputs
    tokenizer = recipe_tokenizer(recipe)
    with iter(Loader(stage.data, towers, tokenizer, rows=2)) as batches:
        real = next(batches).batch
    blank = blank_batch(2, row_spec(stage.data.seq_len, stage.data.items, towers, tokenizer.pad_token_id))
    kinds = lambda batch: {jax.tree_util.keystr(k): (v.shape, v.dtype) for k, v in jax.tree_util.tree_leaves_with_path(batch)}
    assert kinds(blank) == kinds(real)
    assert all(x.base is not None and x.base.nbytes <= 8 for x in jax.tree.leaves(blank))


def test_the_state_comes_out_where_it_went_in_and_takes_its_place(one_slice):
    """So that the next step can be given it, and it is not there twice."""
    compiled, _, _ = one_slice
    program = compiled.program
    assert compiled.refusal == ""
    before, after = jax.tree.leaves(program.state), jax.tree.leaves(compiled.executable.output_shardings[0])
    assert all(b.sharding.is_equivalent_to(a, len(b.shape)) for b, a in zip(before, after, strict=True))
    memory = compiled.executable.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in before if x.size > 8)
    assert "tpu" in {d.platform for d in program.mesh.devices.flat}


def test_what_does_not_fit_is_told_before_anything_is_compiled():
    recipe = load("projector/llava_15").tiny()
    assert recipe.stage_name(None) == "instruct"
    with pytest.raises(ConfigError, match="no stage 'instruc'; nearest: instruct"):
        recipe.stage_name("instruc")
    with pytest.raises(ConfigError, match="stages.instruct.data.batch_size is 8; the layout needs a multiple of 16"):
        lower(recipe, "instruct", Layout(mesh={"fsdp": -1}), topology("v5e:4x4").devices)
