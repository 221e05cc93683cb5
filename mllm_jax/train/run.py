"""A whole recipe with one call: every stage, its evaluations, samples, the Hugging Face folder and the report.

Everything is found again in the run's folder: a stage that is done is not trained again, an evaluation that
is done is not asked again, and the same command goes on wherever the last one was stopped.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax

from mllm_jax import sharding
from mllm_jax.config import ConfigError, load
from mllm_jax.data.sources import open_source
from mllm_jax.data.templates import chat_template, generation
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.evaluation.report import write_report
from mllm_jax.evaluation.run import evaluate
from mllm_jax.evaluation.samples import write_samples
from mllm_jax.evaluation.tasks import Answers, Task
from mllm_jax.hf.export import export
from mllm_jax.hf.family import CannotExpress
from mllm_jax.hosts import gather
from mllm_jax.nn.lora import LoRA
from mllm_jax.nn.param import Params
from mllm_jax.recipe import Recipe
from mllm_jax.sharding import Layout
from mllm_jax.train.adapters import save_adapters
from mllm_jax.train.checkpoint import read_params
from mllm_jax.train.folder import Run, RunOptions, finished, prepare
from mllm_jax.train.log import Log, counter, duration
from mllm_jax.train.loop import Asked, train_stage
from mllm_jax.train.state import Blueprint
from mllm_jax.train.watchdog import Watchdog


def train(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Runs the recipe into `options.out` and returns what is in its metrics.json.

    Raises:
      ConfigError, BadExample: what the user wrote or gave is at fault.
      TrainingError, CheckpointError: the run cannot go on; what was saved is intact.
    """
    run = prepare(recipe, options)
    try:
        with Watchdog(run.ledger, run.folder, options.patience):
            return _train(run)
    finally:
        run.ledger.write()


def _train(run: Run) -> dict[str, Any]:
    recipe, options = run.recipe, run.options
    chosen = [name for name in recipe.stages if options.stages is None or name in options.stages]
    metrics: dict[str, Any] = {"recipe": options.name, "stages": {}}
    with sharding.use(options.layout, run.mesh):
        for name in chosen:
            metrics["stages"][name] = _stage(run, name)
            _leave_if_asked(run, name)
        headline(metrics)
        if name == list(recipe.stages)[-1]:
            with run.ledger.on("finish"):
                params = _trained(run, name)
                if jax.process_index() == 0:
                    _samples(run, name)
                _export(run, name, params)
    run.ledger.turn("finish")
    metrics["goodput"] = run.ledger.summary()
    metrics["wall_seconds"] = round(run.ledger.up, 2)
    if jax.process_index() == 0:
        (options.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        run.ledger.write()              # the report reads it
        write_report(options.out)
        print(run.ledger.line(), flush=True)
    return metrics


def restore_params(folder: Path, layout: Layout | None = None) -> tuple[Recipe, Any, Params, Any]:
    """(recipe, configuration of the model, parameters, tokenizer) of a run, after the last stage that has a checkpoint.

    Raises:
      ConfigError: the folder holds no run, or one without a checkpoint.
    """
    folder = Path(folder)
    if not (folder / "recipe.json").exists():
        raise ConfigError(f"{folder} holds no run: there is no recipe.json in it")
    facts = json.loads((folder / "recipe.json").read_text())
    recipe = load(facts["name"], *facts["overrides"], tiny=facts["tiny"])
    name = last_stage(folder, recipe)
    options = RunOptions(name=facts["name"], out=folder, layout=layout or Layout())
    mesh = options.layout.make_mesh()
    run = Run(recipe=recipe, options=options, mesh=mesh, tokenizer=load_tokenizer(str(folder / "tokenizer")))
    return recipe, run.model_of(name), _trained(run, name), run.tokenizer_of(name)


def last_stage(folder: Path, recipe: Recipe) -> str:
    """The last stage of a run that has a checkpoint; raises ConfigError if there is none."""
    done = [name for name in recipe.stages if any((folder / "stages" / name / "checkpoints").glob("[0-9]*"))]
    if not done:
        raise ConfigError(f"{folder} holds no checkpoint yet; train it first")
    return done[-1]


def _stage(run: Run, name: str) -> dict[str, Any]:
    """Trains and evaluates one stage, as far as that is not done; its summary, with the results of its evaluations."""
    stage, options = run.recipe.stages[name], run.options
    summary = finished(run, name)
    if summary is None:
        with Log(run.stage_folder(name), total=stage.steps, title=name, verbose=options.verbose, start=run.start_of(name),
                 ledger=run.ledger) as log:
            summary = train_stage(run, name, log)
            log.flush()
            rows = [json.loads(line) for line in (run.stage_folder(name) / "log.jsonl").read_text().splitlines()]
            summary |= {"loss_first": rows[0]["loss"], "loss_last": rows[-1]["loss"]}
            log.summary(summary)
            note = f"{name}: {stage.steps} steps in {duration(summary['seconds'])}, loss {summary['loss_last']:.4f}"
            skipped = sum(summary["dropped"].values())
            log.note(note + (f"; {skipped} examples were skipped: {summary['dropped']}" if skipped else ""))
    results = {}
    if stage.evals:
        _leave_if_asked(run, name)
        with run.ledger.on("evaluate"):
            run.ledger.write()
            params = _trained(run, name)
            for title, task in stage.evals.items():
                results[title] = _evaluate(run, name, title, task, params)
    return summary | {"evals": results}


def _leave_if_asked(run: Run, name: str) -> None:
    """Between stages, and before what follows the last one."""
    if any(gather(run.options.stop.is_set())):
        raise Asked(f"asked to stop: stage {name} is done and saved; run again to go on")


def _evaluate(run: Run, stage: str, title: str, task: Task, params: Params) -> dict[str, Any]:
    data, model = run.recipe.stages[stage].data, run.model_of(stage)
    result = evaluate(
        model, params, task, run.tokenizer_of(stage), folder=run.folder / "evals" / stage / title, template=data.template,
        layout=run.options.layout, mesh=run.mesh, root=run.options.data_root, restart=True,
        progress=counter(f"{stage}/{title}"), seq_len=None if hasattr(model, "decoder") else data.seq_len)
    if jax.process_index() == 0:
        numbers = {k: v for k, v in result.items() if isinstance(v, float) and k != "seconds"} | result.get("baselines", {})
        print(f"{stage}/{title}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
              + "".join(f"\n  {k:<8} {v:.3f}" for k, v in result.get("by_kind", {}).items()), flush=True)
    return result


def headline(metrics: dict[str, Any]) -> None:
    """Puts the numbers that a reader looks for first at the top: those of the last stage that has them."""
    for stage in metrics["stages"].values():
        for result in stage["evals"].values():
            if "exact_match" in result:
                metrics |= {k: result[k] for k in ("exact_match", "by_kind", "baselines") if k in result}
            if "image_to_text_r1" in result:
                metrics["retrieval_r1"] = result["image_to_text_r1"]


def _trained(run: Run, name: str) -> Params:
    blueprint = Blueprint(run.model_of(name), run.options.layout, run.mesh)
    return read_params(run.stage_folder(name), blueprint.shapes)


def _samples(run: Run, stage: str) -> None:
    """samples.jsonl: the first answers of the stage's evaluation, each with its image."""
    for title, task in run.recipe.stages[stage].evals.items():
        if isinstance(task, Answers):
            source = open_source(task.source, run.options.data_root)
            lines = (run.folder / "evals" / stage / title / "merged.jsonl").read_text().splitlines()[: run.recipe.samples]
            predictions = [json.loads(line)["prediction"] for line in lines]
            write_samples(run.folder / "samples.jsonl", [source[i] for i in range(len(lines))], predictions)
            return


def _export(run: Run, stage: str, params: Params) -> None:
    """export/, and adapter/ where the stage had adapters.

    A model that no class of transformers is like has neither, which is no reason to fail a run that is done.
    """
    model, data = run.model_of(stage), run.recipe.stages[stage].data
    folder = run.folder / "export"
    if jax.process_index() == 0 and folder.exists():
        shutil.rmtree(folder)
    tokenizer = run.tokenizer_of(stage)
    writes = {} if not hasattr(model, "decoder") else {
        "chat_template": chat_template(data.template, tokenizer), "generation": generation(data.template, tokenizer)}
    try:
        export(params, model, folder, tokenizer=tokenizer, seq_len=data.seq_len, **writes)
    except CannotExpress as error:
        if jax.process_index() == 0:
            print(f"no Hugging Face folder: {error}; the run itself can be evaluated, and generated from", flush=True)
        return
    if isinstance(model, LoRA):
        try:
            save_adapters(run.recipe, stage, params, run.folder / "adapter")
        except ConfigError as error:
            if jax.process_index() == 0:
                print(f"no PEFT adapter: {error}", flush=True)
