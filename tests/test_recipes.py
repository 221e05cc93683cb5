"""Every recipe of the cookbook: it has its published size, it learns in miniature, and its whole run ends."""

import importlib
import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mllm_jax import sharding
from mllm_jax.config import load, recipe_names
from mllm_jax.hf.families import describe
from mllm_jax.hf.family import parameter_shapes
from mllm_jax.hf.load import load as load_hf
from mllm_jax.nn.param import merge
from mllm_jax.sharding import Layout
from mllm_jax.train.feed import to_device
from mllm_jax.train.folder import RunOptions
from mllm_jax.train.optimizer import build
from mllm_jax.train.run import restore_params, train
from mllm_jax.train.state import Blueprint, make_state, trained_paths
from mllm_jax.train.step import corrupt, make_step, score, total_loss
from tests.conftest import ROOT
from tests.synthetic import batch_for

KNOBS = {
    "contrastive/clip": ("size=b32", "size=b16", "size=l14"),
    "contrastive/siglip": ("size=b16", "size=so400m"),
    "experts/mm1": ("size=3b", "size=7b", "size=30b", "size=3b_64e", "size=7b_32e"),
    "experts/moe_llava": ("size=1.6b", "size=2.7b"),
    "projector/gemma3": ("size=4b", "size=12b", "size=27b"),
    "projector/honeybee": ("connector=c", "connector=d"),
    "projector/idefics3": ("size=8b", "size=2.2b", "size=500m", "size=256m"),
    "projector/internvl": ("size=1b", "size=4b", "size=38b"),
    "projector/llava_15": ("size=7b", "size=13b"),
    "projector/mobilevlm": ("size=1.7b", "size=3b"),
    "projector/mobilevlm_v2": ("size=1.7b", "size=3b", "size=7b"),
    "resampler/blip2": ("size=2.7b", "size=6.7b"),
    "resampler/instructblip": ("size=7b", "size=13b"),
    "resolution/llava_next": ("size=7b", "size=13b", "size=mistral_7b"),
    "resolution/llava_onevision": ("size=0.5b", "size=7b", "size=72b"),
    "resolution/qwen2_vl": tuple(f"model={m}" for m in ("2-2b", "2-7b", "2-72b", "2.5-3b", "2.5-7b", "3-4b", "3-8b")),
}
NAMES = recipe_names()
ALL = [f"{name}:{knobs}" if knobs else name for name in NAMES for knobs in KNOBS.get(name, ("",))]
STAGES = [(name, stage) for name in NAMES for stage in load(name).stages]
# transformers has no class for them; of LLaVA, because it has two linear layers between tower and decoder, never one.
NO_CLASS = {"experts/mm1", "experts/moe_llava", "projector/honeybee", "projector/llava", "projector/mobilevlm", "projector/mobilevlm_v2",
            "resampler/flamingo", "resampler/qwen_vl"}
REMOTE = {"CogVLMForCausalLM"}          # whose class is code on the Hub


def test_the_contents_of_the_cookbook_are_complete():
    rows = re.findall(r"^\| \[(\w+)\]\(\1/README.md\) \| (.*?) \|", (ROOT / "configs" / "README.md").read_text(), re.M)
    listed = {f"{chapter}/{system}" for chapter, systems in rows for system in re.findall(r"`(\w+)`", systems)}
    assert listed == set(NAMES) and NAMES == sorted(NAMES)
    for name in NAMES:
        assert (ROOT / "configs" / f"{name}.py").exists()
        assert (ROOT / "configs" / name.split("/")[0] / "README.md").exists()


def test_a_recipe_is_read_at_a_glance():
    """What it is, what is new, source; and a page of values."""
    for name in NAMES:
        text = (ROOT / "configs" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= (72 if name == "first/digits" else 45), name
        assert re.match(r'"""[^\n]+\n\nNew here: ', text), name


@pytest.mark.parametrize("name", NAMES)
def test_every_size_of_a_recipe_is_tested(name: str):
    knobs = inspect.signature(importlib.import_module("mllm_jax.configs." + name.replace("/", ".")).recipe).parameters
    tested = {assignment.partition("=")[0] for assignment in KNOBS.get(name, ())}
    assert set(knobs) == tested, f"add the knobs of {name} to KNOBS"


@pytest.mark.parametrize("name", ALL)
def test_the_size_is_the_published_one(name: str):
    recipe = load(name)
    if recipe.params is None:
        assert recipe.paper == "this project"
        return
    assert sum(math.prod(s) for s in parameter_shapes(recipe.model).values()) == pytest.approx(recipe.params, rel=0.01)


@pytest.mark.parametrize(("name", "stage_name"), STAGES)
def test_a_stage_learns_one_batch_and_leaves_the_rest_alone(name: str, stage_name: str, capfd):
    recipe = load(name).tiny()
    stage = recipe.stages[stage_name]
    # The rates of the papers are for many steps; the rule, its decay and its clipping are the recipe's own.
    lr = 1e-2 if stage.train == ("*",) else 3e-2
    optimizer_cfg = replace(stage.optimizer, lr=lr, warmup=0, schedule="constant")
    layout = Layout(mesh={"data": 1})
    with sharding.use(layout, mesh := layout.make_mesh(jax.devices()[:1])):
        blueprint = Blueprint(stage.model or recipe.model, layout, mesh)
        trained = trained_paths(blueprint.shapes, stage.train)
        optimizer = build(optimizer_cfg, 8, sorted(trained))
        state = make_state(blueprint.init(0), trained, optimizer, blueprint, ema=stage.ema is not None)
        before = jax.tree.map(np.asarray, (state.params, state.frozen))
        step = jax.jit(make_step(blueprint.graph, stage.objectives, optimizer, ema=stage.ema))
        batch, losses = batch_for(blueprint.cfg, rows=4), []
        for _ in range(8):
            state, scores = step(state, batch, jax.random.key(0))
            losses.append(float(scores["loss"].value))
    assert losses[-1] < losses[0] - 0.02, losses
    if stage_name == list(recipe.stages)[-1]:                   # float32 sums in another order
        assert loss_on_eight_devices(blueprint.cfg, stage.objectives, before[0] | before[1], batch) == pytest.approx(losses[0], rel=1e-5)
        assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert {k: v.tobytes() for k, v in before[1].items()} == {k: np.asarray(v).tobytes() for k, v in state.frozen.items()}
    # Of a tower whose features are read before it, the last norm is there for the checkpoint alone.
    unread = [f"inputs/{m}/encoder/norm/" for m, t in blueprint.cfg.inputs.items()
              if t.route != "pool" and not getattr(t.encoder, "final_norm", True)]
    # Of text that is read and left behind, the last layer has nothing to do.
    unread += [f"inputs/{m}/connector/former/blocks/{t.connector.every - 1}/text_" for m, t in blueprint.cfg.inputs.items() if t.words]
    still = [k for k, v in before[0].items() if np.array_equal(v, state.params[k]) and not k.startswith(tuple(unread))]
    assert not still, f"trained, and did not move: {still}"


def loss_on_eight_devices(model, objectives, params: dict, batch) -> float:
    """Of the first step."""
    layout = Layout(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use(layout, mesh := layout.make_mesh()):
        blueprint, key = Blueprint(model, layout, mesh), jax.random.fold_in(jax.random.key(0), 0)

        @jax.jit
        def run(params, batch):
            batch = corrupt(objectives, batch, key)
            return total_loss(objectives, score(objectives, merge(blueprint.graph, params)(batch), batch))

        return float(run({k: jax.device_put(v, blueprint.shapes[k].sharding) for k, v in params.items()}, to_device(batch, mesh)))


def miniature(name: str):
    """The tiny recipe with three steps a stage and evaluations of a few examples."""
    recipe = load(name).tiny()
    few = lambda task: replace(task, limit=16, **({"pool": 8} if hasattr(task, "pool") else {"train_limit": 50}))
    return replace(recipe, samples=2, stages={
        k: replace(s, steps=3, evals={e: few(t) for e, t in s.evals.items()}) for k, s in recipe.stages.items()})


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_run_ends_with_metrics_a_report_and_an_export(name: str, tmp_path: Path, capfd, torch):
    out, recipe = tmp_path / "run", miniature(name)
    metrics = train(recipe, RunOptions(name=name, out=out, tiny=True, layout=Layout(mesh={"data": -1})))
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert list(metrics["stages"]) == list(recipe.stages)
    for stage, summary in metrics["stages"].items():
        rows = [json.loads(line) for line in (out / "stages" / stage / "log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows] == [1, 2, 3] and all(math.isfinite(r["loss"]) for r in rows)
        assert summary["steps"] == 3 and set(summary["evals"]) == set(recipe.stages[stage].evals)
    report = (out / "report.html").read_text()
    assert name in report and all(stage in report for stage in recipe.stages)
    printed = capfd.readouterr()
    if name in NO_CLASS:
        assert not (out / "export").exists()
        assert [line for line in printed.out.splitlines() if line.startswith("no Hugging Face folder: the family ")]
        return
    check_export(out, restore=metrics)


def check_export(out: Path, restore: dict) -> None:
    """transformers opens the folder without a key too many or too few, and what we read back is what was trained."""
    import transformers as hf

    folder = out / "export"
    [kind] = json.loads((folder / "config.json").read_text())["architectures"]
    if kind not in REMOTE:
        _, info = getattr(hf, kind).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    describe(folder)
    _, again = load_hf(folder)
    stage = list(restore["stages"])[-1]
    from mllm_jax.train.checkpoint import read_params

    layout = Layout(mesh={"data": -1})
    recipe = load(restore["recipe"]).tiny()
    blueprint = Blueprint(recipe.stages[stage].model or recipe.model, layout, layout.make_mesh())
    ours = read_params(out / "stages" / stage, blueprint.shapes)
    assert ours.keys() == again.keys()
    assert all(np.array_equal(ours[k], again[k]) for k in ours)


def test_a_run_is_opened_as_it_was_trained(tmp_path: Path, monkeypatch):
    """Also that a second call trains nothing, that the time of both counts, and a profile and the part of a peak that was used."""
    name, out = "contrastive/clip", tmp_path / "run"
    recipe = miniature(name)
    options = RunOptions(name=name, out=out, tiny=True, layout=Layout(mesh={"data": -1}),
                         overrides=("stages.contrastive.steps=3", "samples=2"), profile=(2, 1), peak=1e12)
    traced = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: traced.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("stop"))
    first = train(recipe, options)
    assert traced == [str(out / "stages" / "contrastive" / "profile"), "stop"]
    summary, spent = first["stages"]["contrastive"], first["goodput"]
    assert summary["mfu"] == pytest.approx(summary["flops_per_s"] / 1e12) and 0 < spent["goodput"] < 1
    assert spent["starts"] == 1 and all(spent["seconds"][k] > 0 for k in ("step", "start", "compile", "save", "finish"))
    assert spent["goodput"] == pytest.approx(spent["seconds"]["step"] / first["wall_seconds"], abs=1e-3)
    stamp = (out / "stages" / "contrastive" / "log.jsonl").stat().st_mtime_ns
    second = train(recipe, options)
    assert (out / "stages" / "contrastive" / "log.jsonl").stat().st_mtime_ns == stamp
    assert second["stages"] == first["stages"] and second["wall_seconds"] > first["wall_seconds"]
    assert second["goodput"]["starts"] == 2 and second["goodput"]["seconds"]["step"] == pytest.approx(spent["seconds"]["step"], abs=1e-3)
    assert "Where the time went" in (out / "report.html").read_text()
    opened, model, params, tokenizer = restore_params(out)
    assert opened == recipe and model == recipe.model and len(tokenizer) <= model.text.vocab
    assert {k: v.shape for k, v in params.items()} == parameter_shapes(model)
