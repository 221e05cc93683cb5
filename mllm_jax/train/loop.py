"""A run: the stages of a recipe in order, each restored, stepped, logged, saved and evaluated.

The run's folder is all the state there is.  Killed at any moment and started again with the same command,
a run goes on from its last complete checkpoint and its loss is, bit for bit, that of a run that was not
killed: the data iterator is part of the checkpoint, and randomness is folded from (seed, step).
"""

import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mllm_jax import sharding
from mllm_jax.config import ConfigError, compare, config, nearest, to_json
from mllm_jax.data.loader import Loader
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.vocabulary import recipe_tokenizer
from mllm_jax.hf.load import load_subtree
from mllm_jax.hosts import gather
from mllm_jax.recipe import Recipe
from mllm_jax.sharding import Layout
from mllm_jax.train import checkpoint
from mllm_jax.train.adapters import model_of, plain, trained_of
from mllm_jax.train.checkpoint import Checkpoints, initial_params
from mllm_jax.train.feed import Fed, Feed
from mllm_jax.train.flops import Counts, step_flops
from mllm_jax.train.log import Log
from mllm_jax.train.optimizer import build, schedule
from mllm_jax.train.state import Blueprint, TrainState, abstract_state, make_state
from mllm_jax.train.step import make_step


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what was kept."""


@config
class RunOptions:
    """How and where a recipe is run; none of it changes what is computed."""

    name: str                           # as given, with knobs: "projector/llava_15:size=13b"
    out: Path
    layout: Layout = Layout()
    overrides: tuple[str, ...] = ()
    tiny: bool = False
    data_root: Path | None = None
    stages: tuple[str, ...] | None = None       # None: all of them
    fresh: bool = False                 # forget what an earlier run left in the folder
    save_every: int = 1_000             # steps; a stage is saved at its end too
    verbose: bool = False
    stop: threading.Event = field(default_factory=threading.Event)      # set from outside: save and leave


@config
class Run:
    """What the stages of one run share."""

    recipe: Recipe
    options: RunOptions
    mesh: Mesh
    tokenizer: Any

    @property
    def folder(self) -> Path:
        return self.options.out

    def stage_folder(self, name: str) -> Path:
        return self.folder / "stages" / name

    def model_of(self, name: str) -> Any:
        return model_of(self.recipe, name)

    def start_of(self, name: str) -> int:
        """Steps of a stage that are done and saved."""
        found = (self.stage_folder(name) / "checkpoints").glob("*")
        return max((int(p.name) for p in found if p.name.isdigit()), default=0)

    def previous(self, name: str) -> str | None:
        """The stage before this one, if it trained the same model, with adapters or without."""
        before = list(self.recipe.stages)[: list(self.recipe.stages).index(name)]
        return before[-1] if before and plain(self.model_of(before[-1])) == plain(self.model_of(name)) else None


def prepare(recipe: Recipe, options: RunOptions) -> Run:
    """Checks the recipe and makes the run's folder, before anything is computed.

    Raises:
      ConfigError: a mesh, stage, source or template that cannot be; or the folder holds another recipe's run.
    """
    for stage in options.stages or ():
        if stage not in recipe.stages:
            raise ConfigError(f"the recipe has no stage {stage!r}; nearest: {nearest(stage, recipe.stages)}")
    mesh = options.layout.make_mesh()
    shards = sharding.row_shards(mesh) * options.layout.microbatches
    for name, stage in recipe.stages.items():
        if stage.data.batch_size % shards:
            raise ConfigError(f"stages.{name}.data.batch_size is {stage.data.batch_size}; the layout needs a multiple of {shards}: "
                              f"{sharding.row_shards(mesh)} parts of the rows times {options.layout.microbatches} microbatches")
    _claim(recipe, options)
    return Run(recipe=recipe, options=options, mesh=mesh, tokenizer=_tokenizer(recipe, options))


def train_stage(run: Run, name: str, log: Log) -> dict[str, Any]:
    """Trains one stage to its end, or from its last checkpoint to its end; its summary.

    Raises:
      TrainingError: the loss is not a number, or the run was asked to stop.
      BadExample, ConfigError: what the user gave is at fault.
    """
    began = time.monotonic()
    stage, options, mesh = run.recipe.stages[name], run.options, run.mesh
    model_cfg = run.model_of(name)
    blueprint = Blueprint(model_cfg, options.layout, mesh)
    trained = trained_of(stage, blueprint.shapes)
    optimizer = build(stage.optimizer, stage.steps, sorted(trained))
    loader = make_loader(run, name)
    checkpoints = Checkpoints(run.stage_folder(name))
    feed = None
    try:
        state, iterator = _resume_or_start(run, name, blueprint, trained, optimizer, checkpoints, loader, log)
        start = int(state.step)
        feed = Feed(iterator, mesh)
        step = jax.jit(
            make_step(blueprint.graph, stage.objectives, optimizer, microbatches=options.layout.microbatches, ema=stage.ema),
            donate_argnums=0)
        key = jax.random.key(stage.data.seed)
        rate = schedule(stage.optimizer, stage.steps)
        program, compiled, recent, totals = None, 0.0, {}, _Totals(model_cfg, trained)
        first_loss = None
        for n in range(start + 1, stage.steps + 1):
            waited = time.monotonic()
            fed = next(feed)
            waited = time.monotonic() - waited
            if program is None:
                compiling = time.monotonic()
                program = step.lower(state, fed.batch, key).compile()
                compiled = time.monotonic() - compiling
                log.detail(f"{name}: compiled in {compiled:.1f} s")
                totals.begin()
            state, means = program(state, fed.batch, key)
            recent[n] = fed.info.ids
            rates = totals.add(fed, waited)
            loss = log.step(n, means, lr=float(rate(n - 1)), **rates)
            if loss is not None:
                first_loss = first_loss if first_loss is not None else time.monotonic() - began
                _check_number(loss, n - 1, recent.pop(n - 1, ()), run.stage_folder(name), checkpoints)
            last = n == stage.steps or options.stop.is_set()
            if last or n % options.save_every == 0:
                _check_number(log.flush(), n, recent.pop(n, ()), run.stage_folder(name), checkpoints)
                checkpoints.save(n, state, fed.state,
                                 {"recipe": options.name, "stage": name, "alpha": getattr(model_cfg, "alpha", None)})
            if options.stop.is_set() and n < stage.steps:
                raise TrainingError(f"asked to stop: stage {name} is saved at step {n} of {stage.steps}; run again to go on")
        checkpoints.wait()
        return totals.summary(stage=name, steps=stage.steps, seconds=log.seconds, compile_seconds=compiled,
                              first_loss_seconds=first_loss, params=(blueprint, trained))
    finally:
        if feed is not None:
            feed.close()
        checkpoints.close()


def make_loader(run: Run, name: str) -> Loader:
    """The stream of one stage, the part of this host."""
    stage = run.recipe.stages[name]
    share = sharding.host_share(run.mesh)
    return Loader(stage.data, run.model_of(name).inputs, run.tokenizer, rows=stage.data.batch_size // share[1], shard=share,
                  root=run.options.data_root, seed=stage.data.seed)


def _resume_or_start(run: Run, name: str, blueprint: Blueprint, trained: set[str], optimizer: Any, checkpoints: Checkpoints,
                     loader: Loader, log: Log) -> tuple[TrainState, Any]:
    """(state, data iterator) of the last checkpoint, or of the beginning."""
    stage = run.recipe.stages[name]
    iterator = iter(loader)
    found = checkpoints.restore(abstract_state(blueprint, trained, optimizer, ema=stage.ema is not None))
    if found is not None:
        state, data_state, meta = found
        iterator.set_state(data_state)
        log.detail(f"{name}: goes on from step {meta['step']}")
        return state, iterator
    params = initial_params(blueprint, stage.weights, run_dir=run.folder, runs=run.folder.parent, previous=run.previous(name),
                            seed=stage.data.seed, from_hf=_from_hf(blueprint))
    state = make_state(params, trained, optimizer, blueprint, ema=stage.ema is not None)
    checkpoints.save_frozen(state.frozen)
    return state, iterator


def _from_hf(blueprint: Blueprint) -> Any:
    """Reads a subtree from a Hugging Face folder or name; the configuration of that part says what is meant."""

    def read(source: str, subtree: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        part = blueprint.cfg
        for key in filter(None, subtree.rstrip("/*").split("/")):
            part = part[key] if isinstance(part, Mapping) else getattr(part, key, None)
            if part is None:
                raise ConfigError(f"weights names {subtree!r}, which is not a part with a configuration; name an encoder, "
                                  "a connector, a decoder or the whole model")
        prefix = subtree.rstrip("/*")
        short = {path[len(prefix) + 1:] if prefix else path: shape for path, shape in wanted.items()}
        found = load_subtree(source, part, short)
        return {f"{prefix}/{path}" if prefix else path: value for path, value in found.items()}

    return read


def _check_number(loss: float | None, step: int, ids: tuple, folder: Path, checkpoints: Checkpoints) -> None:
    if loss is None or math.isfinite(loss):
        return
    everywhere = [row for host in gather([list(r) for r in ids]) for row in host]
    path = folder / f"bad-step-{step}.json"
    if jax.process_index() == 0:
        path.write_text(json.dumps({"step": step, "loss": str(loss), "ids": everywhere}, indent=1))
    last = checkpoints.latest()
    kept = f"the checkpoint of step {last} is intact" if last is not None else "nothing was saved yet"
    raise TrainingError(f"the loss of step {step} is {loss}; the ids of its records are in {path}; {kept}. "
                        "Lower optimizer.lr, or look at those records")


class _Totals:
    """Counts of what was read, and rates over the time since the program was compiled."""

    def __init__(self, model_cfg: Any, trained: set[str]):
        self.model_cfg, self.trained = model_cfg, trained
        self.counts = dict.fromkeys(("steps", "rows", "examples", "tokens", "images", "flops", "waited"), 0.0)
        self.hosts = jax.process_count()
        self.dropped: Mapping[tuple[str, str], int] = {}
        self.losses: list[float] = []

    def begin(self) -> None:
        self.began = self.last = time.monotonic()

    def add(self, fed: Fed, waited: float) -> dict[str, float]:
        """The rates of the step that was dispatched before this call."""
        info, hosts, now = fed.info, self.hosts, time.monotonic()
        rows = sum(bool(row) for row in info.ids) * hosts
        items = {m: n * hosts for m, n in info.media.items()}
        flops = step_flops(self.model_cfg, self.trained, Counts(
            rows=rows, tokens=info.tokens * hosts, squares=info.squares * hosts, trained=info.trained * hosts, items=items))
        read = {"steps": 1, "rows": rows, "examples": sum(map(len, info.ids)) * hosts, "tokens": info.tokens * hosts,
                "images": sum(items.values()), "flops": flops, "waited": waited}
        for key, value in read.items():
            self.counts[key] += value
        self.dropped = info.dropped
        seconds, self.last = max(now - self.last, 1e-9), now
        if self.counts["steps"] == 1:   # dispatched, not done: there is no rate yet
            return {"data_wait_s": waited}
        return {f"{k}_per_s": read[k] / seconds for k in ("rows", "examples", "tokens", "images", "flops")} | {"data_wait_s": waited}

    def summary(self, *, params: tuple[Blueprint, set[str]], seconds: float, **facts: Any) -> dict[str, Any]:
        blueprint, trained = params
        busy = max(time.monotonic() - self.began, 1e-9) if self.counts["steps"] else 1.0
        sizes = {k: math.prod(v.shape) for k, v in blueprint.shapes.items()}
        return facts | {
            "seconds": round(seconds, 2),
            "examples": int(self.counts["examples"]), "tokens": int(self.counts["tokens"]), "images": int(self.counts["images"]),
            "trained_params": sum(sizes[k] for k in trained), "total_params": sum(sizes.values()),
            **{f"{k}_per_s": self.counts[k] / busy for k in ("rows", "examples", "tokens", "images", "flops")},
            "data_wait_s": round(self.counts["waited"], 3),
            "dropped": {f"{source}/{reason}": n for (source, reason), n in self.dropped.items()},
        }


def _claim(recipe: Recipe, options: RunOptions) -> None:
    """Writes recipe.json; refuses a folder that holds the run of another recipe."""
    path = options.out / "recipe.json"
    mine = json.loads(json.dumps(to_json(recipe)))
    if options.fresh and options.out.exists() and jax.process_index() == 0:
        import shutil

        shutil.rmtree(options.out)
    if path.exists():
        differs = compare(json.loads(path.read_text())["config"], mine)
        if differs:
            where, (old, new) = next(iter(differs.items()))
            raise ConfigError(f"{options.out} holds another run: {where} was {old!r} and is {new!r}; "
                              "choose another --out, or --fresh to forget that run")
    gather(0)                           # nobody goes on before the folder is looked at by all
    if jax.process_index() == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({
            "name": options.name, "overrides": list(options.overrides), "tiny": options.tiny,
            "layout": to_json(options.layout), "config": mine, "versions": checkpoint.versions()}, indent=1))


def _tokenizer(recipe: Recipe, options: RunOptions) -> Any:
    """The run's tokenizer: the saved one if the run was begun before, otherwise made and saved."""
    saved = options.out / "tokenizer"
    if (saved / "tokenizer.json").exists():
        return load_tokenizer(str(saved))
    tokenizer = recipe_tokenizer(recipe, options.data_root)
    for name, stage in recipe.stages.items():
        model = stage.model or recipe.model
        room = getattr(model, "decoder", None) or model.text
        if len(tokenizer) > room.vocab:
            raise ConfigError(f"the tokenizer {recipe.tokenizer!r} has {len(tokenizer)} tokens; the model of stage {name} has room "
                              f"for {room.vocab}: make its vocab at least as large")
    if jax.process_index() == 0:
        tokenizer.save_pretrained(saved)
    return tokenizer


def finished(run: Run, name: str) -> dict[str, Any] | None:
    """The summary of a stage that is done, or None."""
    path = run.stage_folder(name) / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None
