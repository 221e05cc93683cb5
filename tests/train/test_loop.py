"""The loop: killed and started again it computes what an uninterrupted run computes, to the bit; and where stages start from."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mllm_jax import sharding
from mllm_jax.config import RESTART, ConfigError, load
from mllm_jax.data.views import Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.recipe import Recipe
from mllm_jax.sharding import Layout
from mllm_jax.train.checkpoint import Checkpoints, read_params
from mllm_jax.train.folder import RunOptions, prepare
from mllm_jax.train.log import Log
from mllm_jax.train.loop import TrainingError, train_stage
from mllm_jax.train.state import Blueprint
from tests.conftest import FAST, ROOT

KILLS = 3                               # benchmarks/faults.py does it more often, and worse
STEPS = {"align": 30, "instruct": 40}
SAVE_EVERY = 5
ONE = Layout(mesh={"data": -1})


# --- killed, and started again --------------------------------------------------------------------------------------


def write_sources(folder: Path) -> None:
    """Two files of records with pictures; some records are bad, and one picture breaks off behind its header."""
    rng = np.random.default_rng(0)
    for i in range(6):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (30 + 4 * i, 40, 3), np.uint8)).save(file, "jpeg")
        (folder / f"{i}.jpg").write_bytes(file.getvalue() if i else file.getvalue()[:-300])
    for name, count in (("talk", 40), ("short", 23)):
        records = []
        for i in range(count):
            image = "nowhere.jpg" if i % 11 == 3 else f"{i % 6}.jpg"
            answer = "" if i % 13 == 5 else f"{name} " * (1 + i % 7)
            records.append({"id": f"{name}-{i}", "image": image, "conversations": [
                {"from": "human", "value": f"<image>\nWhat is {i}?"}, {"from": "gpt", "value": answer}]})
        (folder / f"{name}.json").write_text(json.dumps(records))


def command(folder: Path, out: str) -> list[str]:
    """The very command that a user gives: mixture, packing, shuffling, prefetch, bad records, two stages."""
    both = [x for stage, steps in STEPS.items() for x in (
        f"stages.{stage}.data.sources={{'llava:talk.json': 0.7, 'llava:short.json': 0.3}}",
        f"stages.{stage}.data.on_bad_example=skip", f"stages.{stage}.steps={steps}", f"stages.{stage}.data.batch_size=2",
        f"stages.{stage}.data.pack=True", f"stages.{stage}.data.seq_len=192", f"stages.{stage}.data.template=plain")]
    return [sys.executable, "-m", "mllm_jax.cli", "train", "projector/llava_15", "--tiny", "--out", out, "--data-root", str(folder),
            "--save-every", str(SAVE_EVERY), *both]


def environment() -> dict[str, str]:
    # One device, and no new start of the process for large pages: a second of each would be for that.
    return {**os.environ, "XLA_FLAGS": FAST, "PYTHONPATH": str(ROOT),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}


def steps_done(out: Path) -> int:
    """Lines of the log of all stages: steps that were begun, and not forgotten again."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("stages/*/log.jsonl"))


def start(folder: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen(command(folder, str(out)), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def interrupt(process: subprocess.Popen, out: Path, target: int, how: int) -> bool:
    """Sends the signal when `target` steps are done; whether it came before the end."""
    limit = time.monotonic() + 120
    while steps_done(out) < target:
        if process.poll() is not None or time.monotonic() > limit:
            return False
        time.sleep(0.002)
    process.send_signal(how)
    return True


def trace(out: Path) -> dict[str, list[dict[str, Any]]]:
    """What was computed, without what was timed."""
    timed = lambda k: k == "seconds" or k.endswith(("_per_s", "_wait_s"))
    return {stage: [{k: v for k, v in json.loads(line).items() if not timed(k)}
                    for line in (out / "stages" / stage / "log.jsonl").read_text().splitlines()] for stage in STEPS}


def params_of(out: Path) -> dict[str, dict[str, bytes]]:
    blueprint = Blueprint(load("projector/llava_15").tiny().model, ONE, ONE.make_mesh())
    return {s: {k: np.asarray(v).tobytes() for k, v in read_params(out / "stages" / s, blueprint.shapes).items()} for s in STEPS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """(folder of the sources, folder of a run that nothing interrupted)."""
    folder = tmp_path_factory.mktemp("kill")
    write_sources(folder)
    process = start(folder, folder / "whole")
    err = process.communicate(timeout=200)[1]
    assert process.returncode == 0, err
    return folder, folder / "whole"


def test_killed_at_random_steps_and_started_again_a_run_is_the_same_to_the_bit(whole: tuple[Path, Path]):
    folder, wanted = whole
    out, rng, kills, total = folder / "killed", random.Random(0), 0, sum(STEPS.values())
    said = []
    for attempt in range(4 * KILLS):
        process = start(folder, out)
        # Beyond what any run before has reached, so that lines it left behind cannot be mistaken for progress.
        target = steps_done(out) + rng.randint(1, 6)
        polite = attempt == 2           # one of them is asked and not killed: it saves before it goes
        sent = interrupt(process, out, min(target, total - 1), signal.SIGTERM if polite else signal.SIGKILL)
        err = process.communicate(timeout=200)[1]
        code = process.returncode
        if not sent:
            assert code == 0, err
            break
        if polite:
            said.append((code, err, steps_done(out)))
        else:
            assert code == -signal.SIGKILL, err
            kills += 1
        if kills >= KILLS:
            process = start(folder, out)
            err = process.communicate(timeout=300)[1]
            assert process.returncode == 0, err
            break
    assert kills >= KILLS
    assert trace(out) == trace(wanted)
    assert [len(rows) for rows in trace(out).values()] == list(STEPS.values())
    assert params_of(out) == params_of(wanted)
    summaries = [{s: json.loads((o / "stages" / s / "summary.json").read_text())["dropped"] for s in STEPS} for o in (out, wanted)]
    assert summaries[0] == summaries[1] and all(len(dropped) == 6 for dropped in summaries[0].values())

    [(code, err, done)] = said
    assert code == RESTART and "Traceback" not in err
    assert f"asked to stop: stage align is saved at step {done} of {STEPS['align']}; run again to go on" in err.splitlines()[-1]
    assert (out / "report.html").exists() and (out / "export" / "config.json").exists()


# --- in this process ------------------------------------------------------------------------------------------------


def run_stages(recipe: Recipe, out: Path, name: str = "test/test", **options: Any) -> dict[str, Any]:
    """Trains the stages, and no more; the summaries."""
    run = prepare(recipe, RunOptions(name=name, out=out, layout=ONE, **options))
    done = {}
    with sharding.use(ONE, run.mesh):
        for stage in recipe.stages:
            with Log(run.stage_folder(stage), total=recipe.stages[stage].steps, title=stage, quiet=True, start=run.start_of(stage)) as log:
                done[stage] = train_stage(run, stage, log)
    return done


def small(**stages: dict[str, Any]) -> Recipe:
    """LLaVA-1.5 in miniature, with these stages of few and short rows; each argument changes one."""
    recipe = load("projector/llava_15").tiny()
    instruct = recipe.stages["instruct"]
    instruct = replace(instruct, steps=2, data=replace(instruct.data, template="plain", seq_len=160, items={"image": 2}))
    return replace(recipe, stages={name: replace(instruct, **change) for name, change in stages.items()})


def params(out: Path, stage: str, model: Any) -> dict[str, np.ndarray]:
    blueprint = Blueprint(model, ONE, ONE.make_mesh())
    return {k: np.asarray(v) for k, v in read_params(out / "stages" / stage, blueprint.shapes).items()}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray], part: str, of: str | None = None) -> bool:
    """Whether all of `a` below `part` is what `b` has below `of`; there must be something."""
    of = part if of is None else of
    mine = [k for k in a if k.startswith(part)]
    return bool(mine) and all(a[k].tobytes() == b[of + k.removeprefix(part)].tobytes() for k in mine)


CONNECTOR = ("inputs/image/connector/*",)


def test_stages_start_where_they_say(tmp_path: Path):
    """From the stage before, an earlier stage, another recipe's run, and another part of the same model."""
    first = small(a={"train": ("decoder/*",)})
    run_stages(first, tmp_path / "chapter-first", "chapter/first")
    k, q = "decoder/blocks/0/attn/k", "decoder/blocks/0/attn/q"
    image = first.model.inputs["image"]
    squashed = Square(size=image.view.size)
    recipe = small(
        fresh={"train": CONNECTOR},
        follows={"train": CONNECTOR},
        other={"train": CONNECTOR, "weights": {"decoder": "recipe://chapter/first/decoder"}},
        back={"train": CONNECTOR, "weights": {"*": "stage://fresh"}},
        copied={"train": CONNECTOR, "weights": {k: f"copy://{q}"}},
        # Another view is another model, with all that was learned.
        squashed={"train": CONNECTOR, "model": replace(first.model, inputs={"image": replace(image, view=squashed)})},
    )
    out = tmp_path / "run"
    run_stages(recipe, out)
    theirs = params(tmp_path / "chapter-first", "a", first.model)
    at = {name: params(out, name, recipe.model) for name in recipe.stages}
    assert not equal(at["fresh"], theirs, "decoder/")
    assert equal(at["follows"], at["fresh"], "decoder/") and not equal(at["follows"], at["fresh"], "inputs/image/connector/")
    assert equal(at["other"], theirs, "decoder/") and equal(at["other"], at["fresh"], "inputs/image/encoder/")
    assert equal(at["back"], at["fresh"], "decoder/") and not equal(at["back"], at["other"], "decoder/")
    assert equal(at["squashed"], at["copied"], "decoder/") and equal(at["squashed"], at["copied"], "inputs/image/encoder/")
    assert equal(at["copied"], at["copied"], k, q) and not equal(at["back"], at["back"], k, q)


def test_a_stage_starts_from_folders_of_transformers(tmp_path: Path, torch):
    """The tower of a CLIP and a Llama, that transformers wrote; the vocabulary grows for the tokens of the tokenizer."""
    from mllm_jax.hf.load import load as load_hf
    from tests.hf import tiny

    tiny.save("clip", tmp_path / "clip")
    tiny.save("llama", tmp_path / "llama")
    clip, clip_params = load_hf(tmp_path / "clip")
    llama, llama_params = load_hf(tmp_path / "llama")
    recipe = small(start={"train": CONNECTOR, "weights": {
        "inputs/image/encoder": str(tmp_path / "clip"), "decoder": str(tmp_path / "llama")}})
    tower = recipe.model.inputs["image"]
    encoder: ViTConfig = replace(clip.inputs["image"].encoder, layer=-2, pool="none", final_norm=False)
    tower = replace(tower, encoder=encoder, view=replace(tower.view, size=encoder.grid * encoder.patch))
    recipe = replace(recipe, model=MLLMConfig(inputs={"image": tower}, decoder=replace(llama, vocab=320)))
    run_stages(recipe, tmp_path / "run")
    got = params(tmp_path / "run", "start", recipe.model)
    for path, value in clip_params.items():
        if path.startswith("inputs/image/"):
            ours = "inputs/image/encoder/" + path.removeprefix("inputs/image/").removeprefix("encoder/")
            if ours in got:
                assert np.array_equal(got[ours], value), path
    assert {p for p in got if p.startswith("inputs/image/encoder/")} <= {
        "inputs/image/encoder/" + p.removeprefix("inputs/image/").removeprefix("encoder/") for p in clip_params}
    for path, value in llama_params.items():
        have, value = got["decoder/" + path], np.asarray(value)
        if have.shape == value.shape:
            assert np.array_equal(have, value), path
        else:                           # the table, and the head: the old rows, then their mean
            assert "table" in path or "head" in path
            axis = 0 if "table" in path else 1
            assert np.array_equal(np.take(have, range(tiny.VOCAB), axis), value)
            np.testing.assert_allclose(np.take(have, tiny.VOCAB + 1, axis), value.mean(axis), atol=1e-6)


@pytest.mark.parametrize(("weights", "says"), [
    ({"decoder": "stage://nothing/decoder"}, r"stage://nothing/decoder has no checkpoint under .*nothing; train it first"),
    ({"decoder": "recipe://chapter/nothing"}, r"recipe://chapter/nothing has no checkpoint under .*chapter-nothing.*; train it first"),
    ({"decoder": "recipe://nothing"}, "does not name a recipe; write recipe://chapter/system"),
    ({"decodr": "stage://a"}, "weights names 'decodr', which no parameter is in; nearest: decoder"),
    ({"decoder": "copy://decodr"}, "'decoder' starts from copy://decodr, but there is no parameter 'decodr/"),
    ({"decoder/blocks/0/attn/q": "copy://decoder/blocks/0/mlp/up"}, r"of the shape \(.*\) of 'decoder/blocks/0/attn/q/kernel'"),
])
def test_a_start_that_is_not_there_is_named(weights: dict[str, str], says: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=says):
        run_stages(small(a={"train": CONNECTOR, "weights": weights}), tmp_path / "run")


def test_a_loss_that_is_no_number_stops_and_names_the_records(tmp_path: Path):
    recipe = small(a={"steps": 9})
    hot = replace(recipe.stages["a"].optimizer, lr=1e30, warmup=0, schedule="constant", clip=None)
    recipe = replace(recipe, stages={"a": replace(recipe.stages["a"], optimizer=hot)})
    with pytest.raises(TrainingError, match="the loss of step") as error:
        run_stages(recipe, tmp_path / "run", save_every=1)
    stage = tmp_path / "run" / "stages" / "a"
    [path] = stage.glob("bad-step-*.json")
    bad = json.loads(path.read_text())
    # Step 1 is computed with the parameters that were given, and saved; its update is the end of them.
    assert bad["step"] == 2 and path.name == "bad-step-2.json" and bad["loss"] in ("nan", "inf")
    assert len(bad["ids"]) == 8 and all(id.startswith("shapes/0/") for row in bad["ids"] for id in row) and any(bad["ids"])
    assert str(path) in str(error.value) and "the checkpoint of step 1 is intact" in str(error.value)
    assert Checkpoints(stage).latest() == 1 and not (stage / "summary.json").exists()
    assert json.loads((stage / "log.jsonl").read_text().splitlines()[-1])["loss"] is None
    assert params(tmp_path / "run", "a", recipe.model)


class Later(threading.Event):
    """Is set when it is looked at for the second time, before the second step."""

    def is_set(self) -> bool:
        before, self.looked = getattr(self, "looked", False), True
        return before


def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path: Path):
    recipe = small(a={"steps": 6})
    for step in range(1, 4):            # each call does one step, saves it and leaves
        stop = Later()
        with pytest.raises(TrainingError, match=f"asked to stop: stage a is saved at step {step} of 6; run again to go on"):
            run_stages(recipe, tmp_path / "slow", stop=stop)
    run_stages(recipe, tmp_path / "slow")
    run_stages(recipe, tmp_path / "whole")
    rows = [[(r["step"], r["loss"]) for r in map(json.loads, (tmp_path / n / "stages/a/log.jsonl").read_text().splitlines())]
            for n in ("slow", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert equal(params(tmp_path / "slow", "a", recipe.model), params(tmp_path / "whole", "a", recipe.model), "")


def test_a_moving_average_is_what_the_next_stage_starts_from(tmp_path: Path):
    recipe = small(a={"ema": 0.5, "train": ("decoder/*",)}, b={"train": CONNECTOR})
    run_stages(recipe, tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "a"
    from orbax.checkpoint import v1 as ocp

    name, context = "decoder/blocks/0/attn/q/kernel", ocp.Context()
    context.pytree.loading.partial_load = True
    wanted = {k: v for k, v in Blueprint(recipe.model, ONE, ONE.make_mesh()).shapes.items() if k.startswith("decoder/")}
    with context:
        raw = ocp.load(stage / "checkpoints" / "2", {"params": wanted, "ema": wanted}, checkpointable_name="state")
    assert np.any(np.asarray(raw["params"][name]) != np.asarray(raw["ema"][name]))
    assert np.array_equal(params(tmp_path / "run", "b", recipe.model)[name], raw["ema"][name])
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), raw["ema"]))
