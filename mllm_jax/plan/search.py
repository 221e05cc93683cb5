"""The fastest layout of a stage that fits a topology: an analytic model puts candidates in an order, the compiler decides.

Candidates are meshes over which the rows divide, what layers keep for the backward pass, microbatches, and lengths of packed
rows where they may change.  One trace of a step that keeps nothing tells for each mesh and length what every policy would
keep and save.  Then the compiler's passes (plan/passes.py) look at the likely ones in order, some side by side, and what they
say of one corrects the model for the next, until none can be better or the time is up.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from mllm_jax.config import ConfigError, override
from mllm_jax.plan import program as programs
from mllm_jax.plan.analytic import Needs, fixed, living, needs, parameter_axes
from mllm_jax.plan.passes import quick
from mllm_jax.plan.report import Options, Plan, many, network_of, seconds, size
from mllm_jax.plan.roofline import Clock, Roof, kept
from mllm_jax.plan.topology import Topology
from mllm_jax.recipe import Recipe
from mllm_jax.sharding import CONTEXT, Layout, row_shards
from mllm_jax.train.adapters import model_of, plain
from mllm_jax.types import record

POLICIES = ("full", "attention", "qkv+attention", "qkv+attention+out", "qkv+attention+mlp", "qkv+attention+out+mlp")
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
SHARING = (1, 2, 4, 8, 16)              # chips that may share rows
FSDP = 64                               # chips over which parameters are split at least, where there are more
USABLE = 0.975                          # of a chip's memory, for a program
DOUBT = 1.06                            # the model's needs may be so many times too large
HOPELESS = 2.0                          # and what needs so many times what there is is not tried
CLOSE = 1.03                            # what the model takes for so much slower may be the fastest
MORE = 1.1                              # times what there is: taken of a program that does not fit


@record
class Wanted:
    """What a search may change, and how long it may take."""

    rows: tuple[int, ...] = ()          # lengths of packed rows; none: that of the recipe.  Longer rows are fewer: tokens stay the same
    budget: float = 180.0               # s after which the compiler is asked no more
    most: int = 8                       # programs that it is asked about
    jobs: int = 2                       # of them at once, each in a process of 1 to 4 GB


@record
class Candidate:
    layout: Layout
    overrides: tuple[str, ...]          # of the recipe
    needs: float                        # bytes of a chip, by the model
    seconds: float                      # of a step, by the model
    plan: Plan | None = None            # by the compiler

    @property
    def fits(self) -> bool | None:
        """None: it is not known."""
        return self.plan and self.plan.fits


def search(name: str, recipe: Recipe, stage: str | None, on: Topology, layout: Layout, options: Options = Options(),
           wanted: Wanted = Wanted()) -> list[Candidate]:
    """Candidates, the best first: those that fit by the compiler's time, and then the others by the model's.

    `layout` is what they begin with: its dtype, rules and attention stay.

    Raises:
      ConfigError: no such stage, or its rows divide over no mesh of these chips.
    """
    began, stage = time.monotonic(), recipe.stage_name(stage)
    left = Left([c for base in bases(recipe, stage, on, layout, wanted.rows, least) for c in base.candidates()] for least in SHARING)
    done, limit, ratio, slowest = [], on.chip.hbm * USABLE, Ratio(), 0.0

    def look(one: Candidate) -> tuple[Candidate, float]:
        since = time.monotonic()
        return replace(one, plan=quick(name, override(recipe, *one.overrides), stage, on, one.layout, options)), time.monotonic() - since

    with ThreadPoolExecutor(wanted.jobs) as pool:
        running: set[Future] = set()
        while True:
            best = min((c.plan.step_seconds for c in done if c.fits), default=math.inf)
            in_time = not done or time.monotonic() - began + slowest < wanted.budget
            while len(running) < wanted.jobs and len(done) + len(running) < wanted.most and in_time:
                one = left.take(ratio, limit, best, alone=not running)
                if one is None:
                    break
                running.add(pool.submit(look, one))
            if not running:
                break
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for one, took in (future.result() for future in ended):
                done.append(one)
                slowest = max(slowest, took)
                # What the compiler refuses takes more than there is: how much more it says of a part only.
                memory = one.plan.memory.total if one.fits else max(limit * MORE, one.needs * ratio.memory)
                ratio = Ratio(time=one.plan.estimate.seconds / one.seconds if one.fits else ratio.time, memory=memory / one.needs)
    key = lambda c: (0, c.plan.step_seconds) if c.fits else (1 if c.fits is None else 2, c.seconds)
    return sorted([*done, *(c for c in left.all if c.needs * ratio.memory <= limit * DOUBT)], key=key)


class Left:
    """Candidates that were not looked at; `wider` gives more of them, for when none of those before fits."""

    def __init__(self, wider: Iterable[list[Candidate]]):
        self.all, self.wider = [], iter(wider)
        self.asked = self.tried = False
        self._widen()

    def take(self, ratio: "Ratio", limit: float, best: float, alone: bool) -> Candidate | None:
        """The first by the model that may fit and may be the best; where nothing does and none is being looked at (`alone`), what needs least
        is tried once, unless that is far too much, before there are more."""
        found = None
        while found is None:
            found = next((c for c in self.all if c.needs * ratio.memory <= limit * DOUBT and c.seconds * ratio.time < best * CLOSE), None)
            if found is None and (best < math.inf or not alone):
                return None
            if found is None:
                least = min(self.all, key=lambda c: c.needs, default=None)
                if least and not self.tried and least.needs < limit * HOPELESS:
                    found, self.tried = least, True
                elif not self._widen():
                    if least is None or self.asked:
                        return None
                    found = least
        self.asked = True
        self.all.remove(found)
        return found

    def _widen(self) -> bool:
        """False: there is nothing more."""
        added = next(self.wider, None)
        if added:
            self.all, self.tried = sorted([*self.all, *added], key=lambda c: c.seconds), False
        return added is not None


@record
class Ratio:
    """Of what the compiler said to what the model had said."""

    time: float = 1.0
    memory: float = 1.0


@record
class Base:
    """What one trace, which keeps nothing in one microbatch, tells of a mesh and a length of rows."""

    layout: Layout
    overrides: tuple[str, ...]
    rows: int                           # of a chip
    needs: Needs
    by_row: float                       # of the temporaries, what grows with the rows
    gradients: float                    # of all that trains
    roof: Roof
    keeps: Mapping[str, tuple[float, float]]

    def candidates(self) -> Iterator[Candidate]:
        """Of every policy that with the fewest microbatches which fit, or the most there can be."""
        for policy in POLICIES:
            names = [] if policy == "full" else policy.split("+")
            more, less = (sum(self.keeps[n][k] for n in names) for k in (0, 1))
            if policy != "full" and not more:
                continue
            for n in MICROBATCHES:
                if self.rows % n == 0:
                    yield self._candidate(policy, n, more, less)

    def _candidate(self, policy: str, n: int, more: float, less: float) -> Candidate:
        total = self.needs.total - self.by_row + (self.by_row + more) / n + (self.gradients if n > 1 else 0)
        roof = replace(self.roof, compute=self.roof.compute - less, gathers=self.roof.gathers * n, sums=self.roof.sums * n)
        # Fewer rows at once fill the units less, and each part begins anew.
        return Candidate(layout=replace(self.layout, remat=policy, microbatches=n), overrides=self.overrides, needs=total,
                         seconds=roof.seconds * (1 + 0.02 * (n > 1) + 0.01 * math.log2(n)))


def bases(recipe: Recipe, stage: str, on: Topology, layout: Layout, lengths: Sequence[int] = (), least: int = 1) -> list[Base]:
    """Of every mesh and length of rows; `least` as in `meshes`."""
    out = []
    for overrides in variants(recipe, stage, lengths):
        changed = override(recipe, *overrides)
        for mesh in meshes(changed, stage, on, least):
            one = replace(layout, mesh=mesh, slices=on.slices, remat="full", microbatches=1)
            program = programs.lower(changed, stage, one, list(on.devices))
            live = living(program)
            clock, found = Clock(on.chip, network_of(program, on)), needs(program, live)
            trained = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in program.state.params.values())
            out.append(Base(
                layout=one, overrides=overrides, rows=changed.stages[stage].data.batch_size // row_shards(program.mesh), needs=found,
                by_row=live.peak - fixed(live, parameter_axes(program)), gradients=4.0 * trained, roof=clock.body(live), keeps=kept(live, clock)))
    return out


def variants(recipe: Recipe, stage: str, lengths: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """Overrides of the recipe for rows of these lengths, with as many positions and media in a step as before.

    Raises:
      ConfigError: rows of this stage are not packed, or a step is no whole number of such rows.
    """
    data = recipe.stages[stage].data
    for length in lengths or (data.seq_len,):
        path, rows = f"stages.{stage}.data", data.batch_size * data.seq_len / length
        scaled = lambda n: n * length / data.seq_len
        if length == data.seq_len:
            yield ()
            continue
        if not data.pack:
            raise ConfigError(f"stage {stage} does not pack its rows, so that others than {data.seq_len} positions would be another recipe")
        if rows % 1 or length < 1:
            raise ConfigError(f"{data.batch_size} rows of {data.seq_len} positions are {rows:g} rows of {length}; choose a length that divides them")
        more = {"trained": data.trained} if data.trained else {}
        counts = {f"items.{m}": n for m, n in data.items.items()} | more
        yield (f"{path}.seq_len={length}", f"{path}.batch_size={int(rows)}", *(f"{path}.{k}={max(1, int(scaled(n)))}" for k, n in counts.items()))


def meshes(recipe: Recipe, stage: str, on: Topology, least: int = 1) -> list[dict[str, int]]:
    """Meshes of a slice over which the rows of a stage divide: as few chips as possible share a row.

    Where `least` chips shall share each, because rows are too long for fewer, those with just so many that split its positions, if any.

    Raises:
      ConfigError: there are none; the message says what would have one.
    """
    data, chips = recipe.stages[stage].data, len(on.devices) // on.slices
    rows, splits = data.batch_size, lambda n: data.seq_len % (2 * n) == 0 and hasattr(plain(model_of(recipe, stage)), "decoder")
    fits = [t for t in SHARING if chips % t == 0 and rows % (on.slices * chips // t) == 0]
    if least > 1:
        return [{"data": 1, "fsdp": chips // least, "tensor": 1, CONTEXT: least}] * (least in fits[1:] and splits(least))
    if not fits:
        each = on.slices * chips
        raise ConfigError(f"stages.{stage}.data.batch_size is {rows}, which does not divide over {each} chips, nor do {SHARING[-1]} chips that "
                          f"share a row help; take a multiple of {each}, such as {-(-rows // each) * each}, or {many(math.gcd(rows, each), 'chip')}")
    tensor = fits[0]
    parts = chips // tensor
    out = [{"data": 1, "fsdp": parts, "tensor": tensor}]
    if tensor > 1 and splits(tensor):
        out.append({"data": 1, "fsdp": parts, "tensor": 1, CONTEXT: tensor})
    if parts > FSDP and parts % FSDP == 0:
        out.append({"data": parts // FSDP, "fsdp": FSDP, "tensor": tensor})
    if experts := _experts(model_of(recipe, stage)):
        size = next((e for e in (8, 4, 2) if experts % e == 0 and parts % e == 0), 1)
        out += [{"data": 1, "fsdp": parts // size, "tensor": tensor, "expert": size}] * (size > 1)
    return out


def _experts(model: object) -> int:
    """How many experts a sparse layer of the model has; 0 if it has none."""
    layers = getattr(getattr(plain(model), "decoder", None), "cycle", ())
    return max((getattr(getattr(layer, "mlp", None), "experts", 0) for layer in layers), default=0)


def remarks(recipe: Recipe, stage: str, on: Topology, best: Candidate) -> Iterator[str]:
    """What the user should know of the choice, a line each."""
    data, shards = override(recipe, *best.overrides).stages[stage].data, math.prod(best.layout.mesh.values()) * on.slices
    if (tensor := best.layout.mesh.get("tensor", 1) * best.layout.mesh.get(CONTEXT, 1)) > 1:
        if data.batch_size % shards == 0:
            yield f"rows of {data.seq_len:,} positions are too long for a chip: {tensor} chips share each"
        else:
            yield (f"{data.batch_size} rows are too few for {shards} chips: {tensor} chips share each row; "
                   f"stages.{stage}.data.batch_size={data.batch_size * tensor} would use them better")
    parts = shards // tensor * best.layout.microbatches
    if odd := [k for k, s in recipe.stages.items() if k != stage and s.data.batch_size % parts]:
        yield (f"the rows of stage {odd[0]} ({recipe.stages[odd[0]].data.batch_size}) do not divide over this layout; train with --stages {stage}, "
               f"or change stages.{odd[0]}.data.batch_size to a multiple of {parts}")


def table(found: Sequence[Candidate], most: int = 12) -> Iterator[str]:
    """The ranking, a line each."""
    yield f"  {'mesh':<22}{'remat':<24}{'parts':>6}{'rows':>13}  {'model: memory':>13}{'step':>10}  {'compiled: memory':>16}{'step':>10}{'MFU':>8}"
    for c in found[:most]:
        mesh = " ".join(f"{k}={n}" for k, n in c.layout.mesh.items() if n > 1) or "one chip"
        said = dict(o.rpartition(".")[2].split("=") for o in c.overrides)
        rows = f"{said['batch_size']} x {said['seq_len']}" if said else ""
        line = f"  {mesh:<22}{c.layout.remat:<24}{c.layout.microbatches:>6}{rows:>13}  {size(c.needs):>13}{seconds(c.seconds):>10}"
        if c.fits:
            line += f"  {size(c.plan.memory.total):>16}{seconds(c.plan.step_seconds):>10}{100 * c.plan.mfu(c.plan.step_seconds):>6.1f} %"
        yield line + (f"  {'does not fit':>16}" if c.fits is False else "")
    if len(found) > most:
        yield f"  and {len(found) - most} more, slower by the model"
