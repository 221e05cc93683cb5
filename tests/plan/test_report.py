"""Whole plans of a tiny recipe: what is printed adds up, and agrees with the compiler."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.cli import main
from mllm_jax.config import load, override
from mllm_jax.launch import layouts
from mllm_jax.plan import program as programs
from mllm_jax.plan.audit import of_activations
from mllm_jax.plan.hlo import Hlo
from mllm_jax.plan.memory import alive, memory, shard_bytes
from mllm_jax.plan.page import page
from mllm_jax.plan.report import Options, as_json, network_of, plan, text


def test_memory_by_kind_is_what_the_compiler_counts(one_slice):
    compiled, hlo, on = one_slice
    stats, found = compiled.executable.memory_analysis(), memory(compiled)
    assert found.parameters + found.optimizer + found.batch == stats.argument_size_in_bytes
    assert found.gradients + found.activations + found.temporaries == stats.temp_size_in_bytes
    assert found.optimizer == pytest.approx(2 * shard_bytes(compiled.program.state.params), rel=0.01)        # Adam has two moments


def test_what_the_schedule_keeps_alive_is_what_the_compiler_allots(tpu):
    """Of eight layers and their gradients: a state of each layer is kept, but one; within what gaps and copies take."""
    from mllm_jax.plan.topology import not_kept

    mesh = jax.sharding.Mesh(np.array(tpu("v5e:2x2").devices), ("x",))
    put = lambda shape, *spec: jax.ShapeDtypeStruct(shape, "bfloat16", sharding=jax.sharding.NamedSharding(mesh, jax.P(*spec)))

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, w)[0].astype("float32") ** 2)

    with not_kept():
        compiled = jax.jit(jax.grad(loss)).lower(put((8, 1024, 1024), None, "x"), put((32_768, 1024), "x")).compile()
    live = alive(Hlo(compiled.as_text()))
    assert sum(size for size, _ in live) == pytest.approx(compiled.memory_analysis().temp_size_in_bytes, rel=0.15)
    assert max(size for size, _ in live) == 8 * 32_768 // 4 * 1024 * 2


def test_a_plan_is_printed_and_written(tpu, tmp_path, capsys):
    files = {k: tmp_path / f"plan.{k}" for k in ("json", "html")}
    code = main(["plan", "projector/llava_15", "--tiny", "--topology", "v5e:2x2", "--slices", "2", "stages.instruct.data.batch_size=16",
                 "--price", "2", "--host-images-per-second", "100", "--json", str(files["json"]), "--html", str(files["html"])])
    said, made, html = capsys.readouterr().out, json.loads(files["json"].read_text()), files["html"].read_text()
    assert code == 0 and said.startswith("projector/llava_15, stage instruct, on 2 x v5e:2x2: 8 chips, 2 hosts")
    assert made["fits"] and made["chips"] == 8 and made["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    step = made["step_seconds"]
    assert step["low"] < step["estimate"] < step["high"]
    assert sum(made["seconds_by_kind"].values()) == pytest.approx(step["estimate"], rel=1e-6)
    assert made["mfu"]["estimate"] == pytest.approx(made["model_flops_of_all"] / (8 * 197e12 * step["estimate"]))
    assert sum(v for k, v in made["memory"].items() if k not in ("host", "total")) == made["memory"]["total"]
    # The parameters of a slice are gathered in it, and the gradients summed over both.
    kinds = {(c["kind"], *c["axes"]): c for c in made["collectives"]}
    assert {("all-gather", "fsdp"), ("all-reduce", "data")} <= set(kinds)
    assert all(c["dcn"] == ("data" in c["axes"]) for c in kinds.values())
    # Of gradients in bfloat16 each chip of a slice sends its quarter, twice the half of it; padding makes more of small ones.
    assert 2 * made["trained_parameters"] / 4 <= kinds["all-reduce", "data"]["bytes"] < 20 * made["trained_parameters"] / 4
    # 100 images a second are too few: 16 rows of 3 images, for two hosts.
    assert step["with_input"] == pytest.approx(16 * 3 / 2 / 100) and made["bound"] == "input"
    assert made["cost_per_million_examples"] == pytest.approx(1e6 / 48 * 0.24 / 3600 * 8 * 2)
    for part in ("It fits", "MFU", "bound by input", "all-gather", "a million examples cost", "no tensor above 1 MiB is replicated"):
        assert part in said, part
    for part in ("<!doctype html>", "Memory of a chip", "Between chips", "between slices", "What takes longest"):
        assert part in html, part


def test_what_does_not_fit_is_said_with_what_to_try(tpu, llava, monkeypatch):
    """In the compiler's words of today; a program that is too large takes minutes to be refused."""
    refusal = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
               "(25.55G) exceeds available HBM (15.75G). HLO module: jit_step.")
    answer = {"executable": None, "text": "", "sizes": None, "refusal": refusal, "seconds": 1.0}
    monkeypatch.setattr(programs, "compile", lambda p: programs.Compiled(program=p, **answer))
    made = plan("projector/llava_15", llava, "instruct", tpu("v5e:2x2"), layouts.find("auto", "tpu"), Options(measure=0))
    assert not made.fits
    said = "\n".join(text(made))
    assert "It does not fit: the compiler needs 25.55GiB where 15.75GiB are free\n" in said and "try more microbatches" in said
    assert "It does not fit" in page(made) and "25.55GiB" in page(made)
    assert as_json(made)["refusal"] == refusal


@pytest.mark.parametrize(("arguments", "message"), [
    (["--topology", "v5e:3x5"], "there is no topology 'v5e:3x5'"),
    (["--topology", "v5e:2x2", "--layout", "v5e-8"], "does not fit 4 devices"),
    (["--topology", "v5e:2x2", "--stage", "instrukt"], "the recipe has no stage 'instrukt'; nearest: instruct"),
    (["--topology", "v5e:4x4"], "stages.instruct.data.batch_size is 8; the layout needs a multiple of 16"),
    (["--topology", "v5e:2x2", "--supervised", "1.5"], "--supervised is 1.5; it is a part"),
])
def test_what_cannot_be_planned_is_one_line(arguments, message, tpu, capsys):
    assert main(["plan", "projector/llava_15", "--tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["projector/llava_15", "contrastive/siglip", "resampler/flamingo"])
def test_no_activation_of_a_step_is_replicated(name, one_slice, tpu):
    """At a threshold for miniatures.  The rows are a number that nothing else has, so that an array of all of them is seen."""
    compiled, hlo, on = one_slice
    if name != "projector/llava_15":
        recipe = load(name).tiny()
        stage, on = list(recipe.stages)[-1], tpu("v5e:2x2")
        recipe = override(recipe, f"stages.{stage}.data.batch_size=28")
        compiled = programs.compile(programs.lower(recipe, stage, layouts.find("auto:mesh.fsdp=2,mesh.tensor=2", "tpu"), list(on.devices)))
        hlo = compiled.hlo
    found = of_activations(compiled.program, hlo, network_of(compiled.program, on), large=1 << 14)
    assert not found, found
