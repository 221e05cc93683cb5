"""A stage: restored or begun, stepped, logged and saved.

Killed at any moment and started again with the same command, a run goes on from its last complete checkpoint and
its loss is, bit for bit, that of a run that was not killed: the data iterator is part of the checkpoint, and
randomness is folded from (seed, step).  Several processes take the same steps, or stop at the same one.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mllm_jax import sharding
from mllm_jax.config import ConfigError, Restart
from mllm_jax.data.loader import Loader, dropped, merge
from mllm_jax.hf.load import load_subtree
from mllm_jax.hosts import Lockstep, gather
from mllm_jax.train.adapters import trained_of
from mllm_jax.train.checkpoint import Checkpoints
from mllm_jax.train.feed import Fed, Feed
from mllm_jax.train.flops import Counts, step_flops
from mllm_jax.train.folder import Run
from mllm_jax.train.initial import initial_params
from mllm_jax.train.ledger import Ledger
from mllm_jax.train.log import Log
from mllm_jax.train.optimizer import build, schedule
from mllm_jax.train.state import Blueprint, TrainState, abstract_state, make_state
from mllm_jax.train.step import jit_step
from mllm_jax.train.trace import Trace

POLL = 0.0005                           # s between two looks at the devices while there is no batch


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what was kept."""


class Asked(TrainingError, Restart):
    """The run was asked to stop, and is saved."""


def train_stage(run: Run, name: str, log: Log) -> dict[str, Any]:
    """Trains one stage to its end, or from its last checkpoint to its end; its summary.

    Raises:
      TrainingError: the loss is not a number.
      Asked: the run was asked to stop.
      BadExample, ConfigError: what the user gave is at fault.
    """
    with run.ledger.on("start"), Lockstep() as lockstep:
        return _train_stage(run, name, log, lockstep)


def _train_stage(run: Run, name: str, log: Log, lockstep: Lockstep) -> dict[str, Any]:
    began = time.monotonic()
    stage, options, mesh, ledger = run.recipe.stages[name], run.options, run.mesh, run.ledger
    model_cfg = run.model_of(name)
    blueprint = Blueprint(model_cfg, options.layout, mesh)
    trained = trained_of(stage, blueprint.shapes)
    optimizer = build(stage.optimizer, stage.steps, sorted(trained))
    loader = make_loader(run, name)
    lockstep.meet()                     # each has found its files
    checkpoints = Checkpoints(run.stage_folder(name), patience=options.storage_patience)
    feed, trace = None, Trace(options.profile, run.stage_folder(name) / "profile")
    try:
        ledger.turn("start" if checkpoints.latest() is None else "restore")
        state, iterator = _resume_or_start(run, name, blueprint, trained, optimizer, checkpoints, loader, log)
        start = done = int(state.step)
        log.back_to(start)
        ledger.begin(name, start)
        ledger.turn("start")
        data_state = iterator.get_state()
        feed = Feed(iterator, mesh)
        step = jit_step(blueprint.graph, stage, optimizer, options.layout, mesh)
        key = jax.random.key(stage.data.seed)
        rate = schedule(stage.optimizer, stage.steps)
        program, compiled, recent, totals = None, 0.0, {}, _Totals(model_cfg, trained, sharding.host_share(mesh)[1], options.peak)
        first_loss = None

        def save(wait: bool = False) -> None:
            _check_number(log.flush(), done, recent.pop(done, ()), run.stage_folder(name), checkpoints)
            meta = {"recipe": options.name, "stage": name, "alpha": getattr(model_cfg, "alpha", None)}
            with ledger.on("save"):
                checkpoints.save(done, state, data_state, meta, wait=wait)
            ledger.saved(done)

        if options.profile and not start < options.profile[0] <= stage.steps:
            log.note(f"{name}: no profile, for step {options.profile[0]} is not one of {start + 1} to {stage.steps}")
        means = None                    # of the last step
        for n in range(start + 1, stage.steps + 1):
            waited = time.monotonic()
            fed = _next(feed, means, ledger)
            waited = time.monotonic() - waited
            with ledger.on("hosts" if _idle(means) else ledger.cause):
                stopping = lockstep.meet(options.stop.is_set())
            if stopping:
                if done > start and (done % options.save_every or not checkpoints.settle()):
                    save(wait=True)
                raise Asked(f"asked to stop: stage {name} is saved at step {done} of {stage.steps}; run again to go on")
            if program is None:
                compiling = time.monotonic()
                ledger.turn("compile")
                ledger.write()
                program = step.lower(state, fed.batch, key).compile()
                ledger.turn("step")     # and so until the end of the stage, but for what is named otherwise
                compiled = time.monotonic() - compiling
                log.detail(f"{name}: compiled in {compiled:.1f} s")
                totals.begin()
            trace.before(n, means)
            state, means = program(state, fed.batch, key)
            trace.after(n, means)
            done, data_state = n, fed.state
            recent[n] = fed.info.ids
            rates = totals.add(fed, waited)
            loss = log.step(n, means, lr=float(rate(n - 1)), **rates)
            if loss is not None:
                first_loss = first_loss if first_loss is not None else time.monotonic() - began
                _check_number(loss, n - 1, recent.pop(n - 1, ()), run.stage_folder(name), checkpoints)
            if n == stage.steps or n % options.save_every == 0:
                save(wait=n == stage.steps)
        return totals.summary(stage=name, steps=stage.steps, seconds=log.seconds, compile_seconds=compiled,
                              first_loss_seconds=first_loss, params=(blueprint, trained),
                              dropped=dropped(merge(gather(data_state))))
    finally:
        trace.close()
        if feed is not None:
            feed.close()
        checkpoints.close()


def _next(feed: Feed, running: Any, ledger: Ledger) -> Fed:
    """The next batch.  Time is spent waiting for it only when the devices have nothing left to do."""
    while not (feed.ready() or _idle(running)):
        time.sleep(POLL)
    with ledger.on("data"):
        return next(feed)


def _idle(running: Any) -> bool:
    """Whether the step that made these arrays is done, or there is none."""
    return all(x.is_ready() for x in jax.tree.leaves(running))


def make_loader(run: Run, name: str) -> Loader:
    """The stream of one stage, the part of this host."""
    data = run.recipe.stages[name].data
    return Loader(data, run.model_of(name).inputs, run.tokenizer_of(name), rows=data.batch_size,
                  mine=sharding.host_rows(run.mesh, data.batch_size), shards=data.shards or sharding.host_share(run.mesh)[1],
                  root=run.options.data_root, seed=data.seed)


def _resume_or_start(run: Run, name: str, blueprint: Blueprint, trained: set[str], optimizer: Any, checkpoints: Checkpoints,
                     loader: Loader, log: Log) -> tuple[TrainState, Any]:
    """(state, data iterator) of the last checkpoint, or of the beginning."""
    stage = run.recipe.stages[name]
    iterator = iter(loader)
    found = checkpoints.restore(abstract_state(blueprint, trained, optimizer, ema=stage.ema is not None))
    if found is not None:
        state, data_states, meta = found
        iterator.set_state(merge(data_states))
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

    def __init__(self, model_cfg: Any, trained: set[str], hosts: int, peak: float = 0.0):
        self.model_cfg, self.trained = model_cfg, trained
        self.peak = peak                # FLOP/s of all devices; 0 if it is not known
        self.hosts = hosts              # that read different rows; each counts its own, and they are alike in size
        self.counts = dict.fromkeys(("steps", "rows", "examples", "tokens", "images", "flops", "waited"), 0.0)
        self.losses: list[float] = []

    def begin(self) -> None:
        self.began = self.last = time.monotonic()

    def add(self, fed: Fed, waited: float) -> dict[str, float]:
        """The rates of the step that was dispatched before this call."""
        info, hosts, now = fed.info, self.hosts, time.monotonic()
        rows = sum(bool(row) for row in info.ids) * hosts
        items, pairs = ({m: n * hosts for m, n in of.items()} for of in (info.media, info.pairs))
        flops = step_flops(self.model_cfg, self.trained, Counts(
            rows=rows, tokens=info.tokens * hosts, squares=info.squares * hosts, trained=info.trained * hosts, items=items, pairs=pairs))
        read = {"steps": 1, "rows": rows, "examples": sum(map(len, info.ids)) * hosts, "tokens": info.tokens * hosts,
                "images": sum(info.frames.get(m, n) for m, n in info.media.items()) * hosts, "flops": flops, "waited": waited}
        for key, value in read.items():
            self.counts[key] += value
        seconds, self.last = max(now - self.last, 1e-9), now
        if self.counts["steps"] == 1:   # dispatched, not done: there is no rate yet
            return {"data_wait_s": waited}
        rates = {f"{k}_per_s": read[k] / seconds for k in ("rows", "examples", "tokens", "images", "flops")}
        return rates | self.mfu(rates["flops_per_s"]) | {"data_wait_s": waited}

    def mfu(self, flops_per_s: float) -> dict[str, float]:
        """What of the devices' best is useful: the positions and images that are there, nothing padded and nothing done twice."""
        return {"mfu": flops_per_s / self.peak} if self.peak else {}

    def summary(self, *, params: tuple[Blueprint, set[str]], seconds: float, **facts: Any) -> dict[str, Any]:
        blueprint, trained = params
        busy = max(time.monotonic() - self.began, 1e-9) if self.counts["steps"] else 1.0
        sizes = {k: math.prod(v.shape) for k, v in blueprint.shapes.items()}
        return facts | {
            "seconds": round(seconds, 2),
            "examples": int(self.counts["examples"]), "tokens": int(self.counts["tokens"]), "images": int(self.counts["images"]),
            "trained_params": sum(sizes[k] for k in trained), "total_params": sum(sizes.values()),
            **{f"{k}_per_s": self.counts[k] / busy for k in ("rows", "examples", "tokens", "images", "flops")},
            **self.mfu(self.counts["flops"] / busy),
            "data_wait_s": round(self.counts["waited"], 3),
        }
