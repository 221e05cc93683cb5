"""Checkpoints of a stage (Orbax, asynchronous).

A checkpoint holds the trained parameters, the optimizer, the moving average, and `meta`: the state of the
data iterator of every host, the recipe and the versions.  Frozen parameters do not change, so they are
written once for the stage and not with every step.  A checkpoint appears under its number only when it
is complete; what a killed process leaves behind is never read.  One that cannot be read is put aside, and the one before is
used.  Storage that fails is tried again for a while.
"""

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mllm_jax.config import ConfigError, nearest
from mllm_jax.hosts import gather, together
from mllm_jax.nn.lora import LEAVES, merge_adapters
from mllm_jax.nn.param import Params
from mllm_jax.train import grown
from mllm_jax.train.state import TrainState
from mllm_jax.train.storage import anywhere, cause, check_room, passing, pauses, tell

KEEP = 2                                # newest checkpoints kept in a stage
LEAST = 600                             # s that hosts wait at least until all have written
SHARED = 1 << 20                        # bytes of an array from which on its copies write a part each
ANEW = "start anew with --fresh"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy", "mllm_jax")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which one is intact and what to do."""


class Checkpoints:
    """The checkpoints of one stage, in a folder of their own."""

    def __init__(self, folder: Path, *, patience: float = 0.0):
        self.folder, self.patience = Path(folder).absolute(), patience
        self.folder.mkdir(parents=True, exist_ok=True)
        self.saver: Any = None
        self.pending: Any = None
        self.failing: float | None = None               # since when every checkpoint failed
        self._open()

    def _open(self) -> None:
        """Looks at the folder anew; after a failure Orbax believes that the step was saved."""
        self.stale = True               # until this is done
        if self.saver is not None:
            self._close_saver()
        self.saver = ocp.training.Checkpointer(
            self.folder / "checkpoints", preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),
            cleanup_tmp_directories=jax.process_count() == 1)
        self.stale = False

    def latest(self) -> int | None:
        return self.saver.latest.step if self.saver.latest else None

    def save_frozen(self, frozen: Params) -> None:
        """Writes what the stage does not train, once."""
        if frozen and not (self.folder / "frozen").exists():
            def write() -> None:
                with _saving(self.patience):
                    ocp.save(self.folder / "frozen", frozen, overwrite=True)

            self._persist("the frozen parameters", frozen, write)

    def save(self, step: int, state: TrainState, data_state: Any, meta: Mapping[str, Any], *, wait: bool = False) -> None:
        """Starts to write; the state may be donated to the next step at once.

        If the checkpoint before could not be written, that is said, and this one stands for both.  With `wait` it returns when the
        checkpoint is complete.  Storage that fails is tried again, for `patience` seconds.

        Raises:
          CheckpointError: it cannot be written.
        """
        self.settle()
        parts = {"params": state.params, "opt_state": state.opt_state, "step": state.step}
        parts |= {"ema": state.ema} if state.ema is not None else {}
        # As one text: Orbax would write each number of it as an array with files of its own.
        meta = {**meta, "step": step, "data_states": json.dumps(gather(data_state)), "versions": versions()}

        def begin() -> None:
            with _saving(self.patience):
                pending = self.saver.save_checkpointables_async(step, {"state": parts, "meta": meta}, overwrite=True)
            if wait:
                pending.result()
            else:
                self.pending = (step, pending)

        self._persist(f"step {step}", parts, begin)

    def settle(self) -> bool:
        """Until the last checkpoint is complete; whether it is, on all hosts.  Says so if it is not.

        Raises:
          CheckpointError: nor were those before it, for longer than `patience`.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return True
        error = None
        try:
            pending[1].result()
        except Exception as e:          # noqa: BLE001  of any sort: it is told, and the next checkpoint is tried
            error = e
        if why := anywhere(error):
            with contextlib.suppress(Exception):
                self._open()
            now = time.monotonic()
            since, self.failing = self.failing, now if self.failing is None else self.failing
            if gather(since is not None and now - since > self.patience)[0]:
                with _explained(self, f"step {pending[0]}, nor the one before"):
                    raise OSError(why) from error
            tell(f"could not save step {pending[0]} in {self.folder}: {why}; the next checkpoint is tried when it is due")
        else:
            self.failing = None
        return not why

    def wait(self) -> None:
        """Until the last checkpoint is complete.  Raises CheckpointError if it could not be written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            with _explained(self, f"step {pending[0]}"):
                pending[1].result()

    def _persist(self, what: str, tree: Any, write: Callable[[], None]) -> None:
        """Writes, again and again until it succeeds or patience is at its end; hosts try together."""
        for pause in [*pauses(self.patience), None]:
            error = None
            try:
                if self.stale:
                    self._open()
                check_room(self.folder, tree)
                write()
            except Exception as e:      # noqa: BLE001  Orbax raises many kinds for one full disk
                error = e
            if not (why := anywhere(error)):
                return
            self.stale = True
            if pause is None:
                with _explained(self, what):
                    raise error or OSError(why)
            tell(f"could not save {what} in {self.folder}: {why}; trying again in {pause:.0f} s")
            time.sleep(pause)

    def restore(self, abstract: TrainState) -> tuple[TrainState, list[Any], dict[str, Any]] | None:
        """(state, the iterator states of all hosts, meta) of the newest checkpoint, or None if there is none."""
        steps, broken, found = sorted((c.step for c in self.saver.checkpoints), reverse=True), {}, None
        for step in steps:
            error = None
            try:
                found = self._read(step, abstract)
            except CheckpointError as e:
                error = e
            # All hosts take the same one, though a file may be broken that only one of them reads.
            if not (why := anywhere(error)):
                break
            broken[step] = error or CheckpointError(why)
        else:
            if broken:                  # as like as not the fault is elsewhere: nothing is moved
                raise broken[steps[0]]
            return None
        if broken:
            together(lambda: self._put_aside(broken, step) if jax.process_index() == 0 else None)
            self.saver.reload()
        with _readable(self.folder / "frozen", advice=ANEW):
            frozen = ocp.load(self.folder / "frozen", abstract.frozen) if abstract.frozen else {}
        state = TrainState(step=found["state"]["step"], params=found["state"]["params"], frozen=frozen,
                           opt_state=found["state"]["opt_state"], ema=found["state"].get("ema"))
        return state, json.loads(found["meta"]["data_states"]), found["meta"]

    def _put_aside(self, broken: Mapping[int, CheckpointError], used: int) -> None:
        """Moves checkpoints that cannot be read out of the way, to be looked at; nothing is deleted."""
        for step, error in broken.items():
            aside = self.folder / "broken" / str(step)
            while aside.exists():
                aside = aside.with_name(aside.name + "-")
            aside.parent.mkdir(exist_ok=True)
            (self.folder / "checkpoints" / str(step)).rename(aside)
            tell(f"{str(error).partition(';')[0]}; it is put aside as {aside}, and the run goes on from step {used}")

    def _read(self, step: int, abstract: TrainState) -> dict[str, Any]:
        """What a checkpoint holds.  A disk or a network that fails is tried again; a file that is broken stays so."""
        parts = {"params": abstract.params, "opt_state": abstract.opt_state, "step": abstract.step}
        parts |= {"ema": abstract.ema} if abstract.ema is not None else {}
        path = self.folder / "checkpoints" / str(step)
        with _readable(path):
            for pause in [*pauses(self.patience), None]:
                try:
                    return self.saver.load_checkpointables(step, {"state": parts, "meta": None})
                except Exception as error:
                    if pause is None or not passing(error):
                        raise
                    tell(f"could not read {path}: {cause(error)}; trying again in {pause:.0f} s")
                    time.sleep(pause)
        raise AssertionError

    def close(self) -> None:
        """Of a run that is done, or has an error of its own to tell."""
        with contextlib.suppress(Exception):
            self.wait()
        self._close_saver()

    def _close_saver(self) -> None:
        try:
            self.saver.close()
        except Exception:               # of a write that failed, which `wait` has told: Orbax tells each thread once more
            with contextlib.suppress(Exception):
                self.saver.close()


def read_params(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], *, partial: bool = False) -> Params:
    """Parameters of the newest checkpoint in a stage's folder, each with the sharding that is wanted.

    Trained parameters come from the moving average if the stage kept one.  Adapters that are not wanted are merged
    into their matrices, and adapters that the stage did not have are left out.  Layers of a model that grew from the one
    of the stage are found (grown.py); what it has beyond that, the routers of its experts, is left out.  With
    `partial` all is left out that the stage did not have.

    Raises:
      CheckpointError: no checkpoint, a parameter is missing, or it has another shape.
    """
    folder = Path(folder).absolute()
    with ocp.training.Checkpointer(folder / "checkpoints") as saver:
        if saver.latest is None:
            raise CheckpointError(f"{folder} holds no complete checkpoint; run that stage first")
        step = saver.latest.step
    path = folder / "checkpoints" / str(step)
    with _readable(path):
        saved = ocp.metadata(path, checkpointable_name="state").metadata
        part = "ema" if "ema" in saved else "params"
    with _readable(folder / "frozen", advice=ANEW):
        frozen = ocp.metadata(folder / "frozen").metadata if (folder / "frozen").exists() else {}
        if frozen is None:              # Orbax logs it and goes on
            raise ValueError("its metadata are broken")
    there = {**frozen, **saved[part]}
    found = grown.origins(wanted, there)
    leave = {k for k in wanted if k not in there and (k.endswith(LEAVES) or k in grown.fresh(found))}
    target, wanted = wanted, {k: v for k, v in wanted.items() if k not in found and k not in leave} | grown.needed(found, wanted, there)
    if partial:
        wanted = {k: v for k, v in wanted.items() if k in there}
    for name, want in wanted.items():
        have = saved[part].get(name) or frozen.get(name)
        if have is None:
            raise CheckpointError(f"{path} has no parameter {name!r}; nearest: {nearest(name, [*saved[part], *frozen])}")
        if tuple(have.shape) != tuple(want.shape):
            raise CheckpointError(f"{path}: {name} has shape {tuple(have.shape)}; the model wants {tuple(want.shape)}")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _readable(path), context:
        mine = {k: v for k, v in wanted.items() if k in saved[part]}
        out = ocp.load(path, {part: mine}, checkpointable_name="state")[part] if mine else {}
    rest = {k: v for k, v in wanted.items() if k not in mine}
    with _readable(folder / "frozen", advice=ANEW), context:
        out |= ocp.load(folder / "frozen", rest) if rest else {}
    folded = {k for k in saved[part].keys() - wanted.keys() if k.endswith(LEAVES) and _matrix(k) in wanted}
    out = _fold(path, part, out, {k: saved[part][k] for k in folded}) if folded else out
    same = {k: v for k, v in out.items() if k in target and k not in found}
    return same | grown.grow(found, target, out) if found else out


def _fold(path: Path, part: str, params: Params, adapters: Mapping[str, Any]) -> Params:
    """The parameters with these adapters of the checkpoint merged into them."""
    everywhere = {m: _replicated(params[m].sharding) for m in map(_matrix, adapters)}
    wanted = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=everywhere[_matrix(k)]) for k, v in adapters.items()}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _readable(path), context:
        adapters = ocp.load(path, {part: wanted}, checkpointable_name="state")[part]
        alpha = ocp.load_checkpointables(path, {"meta": None})["meta"]["alpha"]
    rank = next(v.shape[-1] for k, v in adapters.items() if k.endswith(LEAVES[0]))
    matrices = {m: params[m] for m in everywhere}
    merge = jax.jit(lambda params: merge_adapters(params, rank, alpha), out_shardings={k: v.sharding for k, v in matrices.items()})
    return params | merge(matrices | adapters)


def _matrix(adapter: str) -> str:
    return adapter[: adapter.rindex("lora/")] + "kernel"


def _replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def versions() -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in PACKAGES}


def _saving(patience: float) -> ocp.Context:
    context = ocp.Context()
    # In the background they would leave a thread behind that waits for a folder that could not be made, for ten minutes.
    context.asynchronous.create_directories_asynchronously = False
    # Of a host whose write fails the others hear nothing, and it waits for them too.
    if jax.process_count() > 1:
        context.asynchronous.timeout_secs = int(max(patience, LEAST))
    # Each part is cut by a program of its own, compiled for it, and is a file of its own.
    context.array.saving.min_slice_bytes_for_replica_parallel = SHARED
    return context


class _explained:
    """Turns a failed write into one line that says what is intact."""

    def __init__(self, checkpoints: Checkpoints, what: str):
        self.checkpoints, self.what = checkpoints, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        last = None
        with contextlib.suppress(Exception):
            self.checkpoints.saver.reload()
            last = self.checkpoints.latest()
        intact = f"the checkpoint of step {last} is intact" if last is not None else "there is no earlier checkpoint"
        raise CheckpointError(f"could not save {self.what} in {self.checkpoints.folder}: {cause(error)}; {intact}; "
                              "free space or choose another --out, and run again to resume") from error


class _readable:
    """Turns a failed read into one line that names the folder."""

    def __init__(self, path: Path, advice: str = ""):
        self.path, self.advice = path, advice or f"delete it, or {ANEW}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, (ConfigError, CheckpointError)):
            return
        raise CheckpointError(f"the checkpoint {self.path} cannot be read: {cause(error)}; {self.advice}") from error
