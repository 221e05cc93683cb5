"""The folder of a run: whose it is, what is in it, and what is checked before anything is computed.

It is all the state there is.  A folder belongs to one recipe, with its changes, from the first checkpoint on; a run
that saved nothing, stopped by a mistake in the command, may be begun again otherwise.
"""

import json
import shutil
import threading
from dataclasses import field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mllm_jax import sharding
from mllm_jax.config import ConfigError, compare, config, to_json
from mllm_jax.data.loader import check_shards
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.vocabulary import recipe_tokenizer, stage_tokenizer
from mllm_jax.hosts import together
from mllm_jax.recipe import Recipe
from mllm_jax.sharding import Layout
from mllm_jax.train.adapters import model_of, plain
from mllm_jax.train.checkpoint import versions
from mllm_jax.train.ledger import Ledger

# What a run writes into its folder, and forgets when it begins anew; whatever else is there is not its own.
WRITTEN = ("recipe.json", "tokenizer", "tokenizer.partial", "stages", "evals", "samples.jsonl", "metrics.json", "report.html", "export",
           "adapter", "heartbeat.json", "stacks")


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
    startup: float = 0.0                # seconds since the process began, when this was made
    peak: float = 0.0                   # FLOP/s of all devices together at their best; 0: not known
    patience: float = 900.0             # s without a step until the run is taken for hung, and ends
    storage_patience: float = 300.0     # s that storage which fails is tried again for
    profile: tuple[int, int] | None = None      # (first step, how many) of each stage that are traced
    stop: threading.Event = field(default_factory=threading.Event)      # set from outside: save and leave


@config
class Run:
    """What the stages of one run share."""

    recipe: Recipe
    options: RunOptions
    mesh: Mesh
    tokenizer: Any
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def folder(self) -> Path:
        return self.options.out

    def stage_folder(self, name: str) -> Path:
        return self.folder / "stages" / name

    def model_of(self, name: str) -> Any:
        return model_of(self.recipe, name)

    def tokenizer_of(self, name: str) -> Any:
        """That of the recipe, unless the model of the stage reads another vocabulary."""
        return stage_tokenizer(self.model_of(name), self.tokenizer)

    def start_of(self, name: str) -> int:
        """Steps of a stage that are done and saved."""
        found = (self.stage_folder(name) / "checkpoints").glob("*")
        return max((int(p.name) for p in found if p.name.isdigit()), default=0)

    def previous(self, name: str) -> str | None:
        """The stage before this one, if it trained a model of the same kind, which this one goes on with."""
        before = list(self.recipe.stages)[: list(self.recipe.stages).index(name)]
        return before[-1] if before and type(plain(self.model_of(before[-1]))) is type(plain(self.model_of(name))) else None


def prepare(recipe: Recipe, options: RunOptions) -> Run:
    """Checks the recipe and makes the run's folder, before anything is computed.

    Raises:
      ConfigError: a mesh, stage, source or template that cannot be; or the folder holds another recipe's run.
    """
    # Nobody writes before all have looked, and nobody goes on before it is written.
    mesh, tokenizer = together(lambda: (_check(recipe, options), _tokenizer(recipe, options)))
    together(lambda: _claim(recipe, options, tokenizer) if jax.process_index() == 0 else None)
    ledger = Ledger(options.out / "heartbeat.json" if jax.process_index() == 0 else None, spent=options.startup)
    return Run(recipe=recipe, options=options, mesh=mesh, tokenizer=tokenizer, ledger=ledger)


def _check(recipe: Recipe, options: RunOptions) -> Mesh:
    """The mesh; raises ConfigError where recipe, layout and folder do not fit together."""
    for stage in options.stages or ():
        recipe.stage_name(stage)
    mesh = options.layout.make_mesh()
    for name, stage in recipe.stages.items():
        sharding.check_rows(f"stages.{name}.data.batch_size", stage.data.batch_size, options.layout, mesh.shape)
        sharding.check_length(f"stages.{name}.data.seq_len", stage.data.seq_len, mesh.shape)
        check_shards(stage.data.shards or 1, stage.data.batch_size)
    if not _begins(recipe, options):
        differs = compare(_claimed(options.out), _plain(recipe))
        if differs:
            where, (old, new) = next(iter(differs.items()))
            raise ConfigError(f"{options.out} holds another run: {where} was {old!r} and is {new!r}; "
                              "choose another --out, or --fresh to forget that run")
    return mesh


def _begins(recipe: Recipe, options: RunOptions) -> bool:
    """Whether nothing of the folder is to be kept: it is new, or --fresh, or another recipe's that never saved anything."""
    saved = any(options.out.glob("stages/*/checkpoints/[0-9]*"))
    return options.fresh or _claimed(options.out) is None or not saved and _claimed(options.out) != _plain(recipe)


def _claim(recipe: Recipe, options: RunOptions, tokenizer: Any) -> None:
    """Writes recipe.json and the tokenizer of a run that begins; forgets what another one left there, and no other file."""
    if _begins(recipe, options):
        for path in map(options.out.joinpath, WRITTEN):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "recipe.json").write_text(json.dumps({
        "name": options.name, "overrides": list(options.overrides), "tiny": options.tiny,
        "layout": to_json(options.layout), "config": _plain(recipe), "versions": versions()}, indent=1))
    if not (options.out / "tokenizer").exists():
        partial = options.out / "tokenizer.partial"
        tokenizer.save_pretrained(partial)
        partial.replace(options.out / "tokenizer")


def _claimed(out: Path) -> Any:
    """The configuration of the run that a folder holds, or None."""
    path = out / "recipe.json"
    return json.loads(path.read_text())["config"] if path.exists() else None


def _plain(recipe: Recipe) -> Any:
    return json.loads(json.dumps(to_json(recipe)))


def _tokenizer(recipe: Recipe, options: RunOptions) -> Any:
    """The run's tokenizer: the saved one if the run was begun before, otherwise made."""
    saved = options.out / "tokenizer"
    if saved.exists() and not _begins(recipe, options):
        return load_tokenizer(str(saved))
    tokenizer = recipe_tokenizer(recipe, options.data_root)
    for name, stage in recipe.stages.items():
        model = stage.model or recipe.model
        room, read = getattr(model, "decoder", None) or model.text, stage_tokenizer(model, tokenizer)
        if len(read) > room.vocab:
            raise ConfigError(f"the tokenizer {getattr(model, 'tokenizer', recipe.tokenizer)!r} has {len(read)} tokens; the model of stage "
                              f"{name} has room for {room.vocab}: make its vocab at least as large")
    return tokenizer


def finished(run: Run, name: str) -> dict[str, Any] | None:
    """The summary of a stage that is done, or None."""
    path = run.stage_folder(name) / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None
