"""A plan: what one stage of a recipe needs on a topology, how fast it is there and what that costs; as text and as JSON.

Rates are those of rows that are full, every position of an example that fills its row, with all media they have room for.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mllm_jax import sharding
from mllm_jax.chips import GIB
from mllm_jax.compiler import sets
from mllm_jax.evaluation.html import duration, percent, short
from mllm_jax.objectives.cross_entropy import chunk_size
from mllm_jax.plan import program as programs
from mllm_jax.plan.audit import Replicated, replicated
from mllm_jax.plan.estimate import Estimate, Replay
from mllm_jax.plan.input import images_of_row, images_per_second
from mllm_jax.plan.memory import Memory, memory, shard_bytes
from mllm_jax.plan.network import Network
from mllm_jax.plan.topology import Topology
from mllm_jax.recipe import Recipe
from mllm_jax.sharding import Layout
from mllm_jax.train.adapters import plain
from mllm_jax.train.flops import full_counts, step_flops
from mllm_jax.types import record

SMALL = 1 << 16                         # bytes of memory that are not worth a word


@record
class Options:
    """What a plan takes beside recipe, topology and layout."""

    price: float | None = None          # of a chip for an hour
    host_images: float | None = None    # images/s that a host gives; None: measured here, on one processor
    supervised: float = 1.0             # part of the positions that are in the loss
    measure: float = 1.0                # s of measuring the input; 0 leaves it out


@record
class Plan:
    recipe: str
    stage: str
    on: Topology
    layout: Layout
    mesh: Mapping[str, int]
    rows: int
    seq_len: int
    packed: bool                        # rows hold several examples
    parameters: int
    trained: int
    state_bytes: int                    # of parameters and optimizer, on a chip
    compile_seconds: float
    whole: bool                         # machine code was made too; without it the time of products is less sure (plan/passes.py)
    refusal: str                        # why it does not fit; "" if it does
    memory: Memory | None
    estimate: Estimate | None
    model_flops: float                  # of a step, of all chips
    images: Mapping[str, int]           # {modality: images of a row}
    core_images: float | None           # images/s that one processor of this machine decodes
    options: Options
    replicated: tuple[Replicated, ...]

    @property
    def chips(self) -> int:
        return len(self.on.devices)

    @property
    def fits(self) -> bool:
        return not self.refusal

    def mfu(self, seconds: float) -> float:
        """Of the model's operations, were a step to take so long."""
        return self.model_flops / (self.chips * self.on.chip.peak * seconds)

    @property
    def need(self) -> float:
        """Images/s that each host must give."""
        return self.rows * sum(self.images.values()) / self.estimate.seconds / self.on.hosts

    @property
    def gives(self) -> float | None:
        """Images/s that each host can give."""
        if self.options.host_images is not None:
            return self.options.host_images
        return self.core_images and self.core_images * self.on.chip.host_cores

    @property
    def examples(self) -> int:
        """Of a step: a packed row is taken to hold one for each medium it has room for."""
        return self.rows * max(1, *self.images.values()) if self.packed and self.images else self.rows

    @property
    def step_seconds(self) -> float:
        """With the wait for the input, where that is what takes longest."""
        wait = self.need * self.estimate.seconds / self.gives if self.gives and self.images else 0.0
        return max(self.estimate.seconds, wait)

    @property
    def bound(self) -> str:
        return "input" if self.step_seconds > self.estimate.seconds else next(iter(self.estimate.by_unit()), "compute")

    @property
    def cost(self) -> float | None:
        """Of a million examples."""
        price = self.options.price
        return None if price is None else 1e6 / self.examples * self.step_seconds / 3600 * self.chips * price


def plan(name: str, recipe: Recipe, stage: str | None, on: Topology, layout: Layout, options: Options = Options()) -> Plan:
    """Compiles the step of a stage for a topology, and reads from the program what it needs.

    Raises:
      ConfigError: no such stage, or recipe, layout and topology do not fit together.
    """
    stage = recipe.stage_name(stage)
    return plan_of(name, stage, on, programs.lower(recipe, stage, layout, list(on.devices)), options)


def plan_of(
    name: str, stage: str, on: Topology, program: programs.Program, options: Options = Options(), compiled: programs.Compiled | None = None,
) -> Plan:
    """The same of a step that is traced already, and perhaps compiled."""
    compiled = compiled or programs.compile(program)
    sizes = {k: math.prod(v.shape) for k, v in program.blueprint.shapes.items()}
    towers, data = program.model.inputs, program.stage.data
    counts = full_counts(data.batch_size, program.spec, towers)
    counts = replace(counts, trained=counts.trained * options.supervised)
    estimate = found = None
    repeats = replicated(program, None, None)
    if not compiled.refusal:
        hlo, network = compiled.hlo, network_of(program, on)
        frames = {room.items: math.prod(towers[m].nominal.grid) for m, room in program.spec.media.items() if towers[m].view.packed}
        estimate, found = Replay(hlo, on.chip, network, turns_of(program, options.supervised), frames).out, memory(compiled)
        repeats = replicated(program, hlo, network)
    images = images_of_row(program.spec, towers)
    measured = images_per_second(towers, options.measure) if options.host_images is None and options.measure and images else None
    return Plan(
        recipe=name, stage=stage, on=on, layout=program.layout, mesh=dict(program.mesh.shape), rows=data.batch_size, seq_len=data.seq_len,
        packed=data.pack, parameters=sum(sizes.values()), trained=sum(sizes[k] for k in program.trained),
        state_bytes=shard_bytes(program.state), compile_seconds=compiled.seconds, whole=compiled.executable is not None,
        refusal=compiled.refusal, memory=found,
        estimate=estimate, model_flops=step_flops(program.model, program.trained, counts), images=images, core_images=measured,
        options=options, replicated=tuple(repeats))


def network_of(program: programs.Program, on: Topology) -> Network:
    coords = [(*d.coords, getattr(d, "slice_index", None) or 0) for d in program.mesh.devices.flat]
    return Network(on.chip, coords, program.mesh.shape)


def turns_of(program: programs.Program, supervised: float) -> int:
    """Of the loop over positions that are in the loss, where its length depends on the data."""
    decoder = getattr(plain(program.model), "decoder", None)
    if decoder is None:
        return 1
    rows, s = program.stage.data.batch_size // program.layout.microbatches, program.stage.data.seq_len
    with sharding.use(program.layout, program.mesh):
        return max(1, math.ceil(supervised * s / chunk_size(rows, s, decoder.vocab)))


def text(p: Plan) -> Iterator[str]:
    """The plan on one screen."""
    shape = " ".join(f"{k}={n}" for k, n in p.mesh.items() if n > 1) or "one chip"
    room = "".join(f", room for {many(n, m)}" for m, n in p.images.items())
    yield f"{p.recipe}, stage {p.stage}, on {p.on}: {many(p.chips, 'chip')}, {many(p.on.hosts, 'host')}"
    flags = f"compiler flags {'+'.join(sets(p.layout.flags, p.on.devices[0])) or 'none'}"
    eight = "" if p.layout.quantize == "none" else f", layers in {p.layout.quantize} (MFU is of bfloat16's peak)"
    yield f"  mesh {shape}; {p.layout.dtype}{eight}, remat {p.layout.remat}, {many(p.layout.microbatches, 'microbatch')}, {flags}"
    yield (f"  a step is {many(p.rows, 'row')} of {p.seq_len:,} positions{room}; {short(p.parameters)} parameters, {short(p.trained)} of them train")
    yield ""
    if not p.fits:
        yield f"It does not fit: {said(p.refusal)}"
        yield f"  parameters and optimizer take {size(p.state_bytes)} of each chip's {size(p.on.chip.hbm)}; the rest is activations and temporaries"
        yield "  try more microbatches, remat=full, fewer rows or shorter ones, a larger fsdp axis, or more chips"
        return
    m, e = p.memory, p.estimate
    how = "compiled" if p.whole else "without machine code"
    yield f"It fits: {size(m.total)} of {size(p.on.chip.hbm)} of each chip ({how} in {duration(p.compile_seconds)})"
    yield "  " + ", ".join(f"{k} {size(v)}" for k, v in m.by_kind().items() if v >= SMALL) + (f"; on the host {size(m.host)}" if m.host else "")
    yield ""
    rates = "".join(f", {p.rows * n / p.step_seconds:,.0f} {k}s/s" if n else "" for k, n in p.images.items())
    yield (f"A step takes {seconds(e.seconds)} ({seconds(e.low)} to {seconds(e.high)}), MFU {percent(p.mfu(e.seconds))} "
           f"({percent(p.mfu(e.high))} to {percent(p.mfu(e.low))})")
    yield f"  {p.rows * p.seq_len / p.step_seconds:,.0f} tokens/s{rates}"
    yield f"  bound by {p.bound}: " + ", ".join(f"{k} {percent(v / e.seconds)}" for k, v in e.by_unit().items() if v > 1e-3 * e.seconds)
    yield (f"  model {short(p.model_flops, 'FLOP')}; compiled {short(e.flops * p.chips, 'FLOP')}, {e.flops * p.chips / p.model_flops:.2f} x; "
           f"memory traffic {short(e.hbm_bytes, 'B')} a chip")
    yield ""
    if e.traffic:
        yield f"  {'collective':<20}{'axis':<14}{'GB/chip':>9}{'busy':>11}{'waited':>11}{'times':>8}"
        for (kind, axes), t in sorted(e.traffic.items(), key=lambda kv: -kv[1].bytes):
            yield (f"  {kind:<20}{'+'.join(axes) + (' (DCN)' if t.dcn else ''):<14}{t.bytes / 1e9:>9.3f}{seconds(t.busy):>11}"
                   f"{seconds(t.exposed):>11}{t.count:>8.0f}")
        yield ""
    yield from (f"  {line}" for line in feeding(p))
    if p.cost is not None:
        yield f"  a million examples cost {p.cost:,.2f}, at {p.options.price:g} for a chip and hour ({p.examples} examples a step)"
    yield from (f"  {line}" for line in audited(p))
    for note, n in e.notes.most_common():
        yield f"  assumed: {note}" + (f" (x{n})" if n > 1 else "")


def feeding(p: Plan) -> Iterator[str]:
    if not p.images:
        return
    if p.options.host_images is not None:
        yield f"input: a host must give {p.need:,.0f} images/s and gives {p.gives:,.0f}"
    elif p.gives is None:
        yield f"input: a host must give {p.need:,.0f} images/s"
    else:
        yield (f"input: a host must give {p.need:,.0f} images/s; a processor of this machine gives {p.core_images:,.0f}, so that "
               f"{math.ceil(p.need / p.core_images)} of the host's {p.on.chip.host_cores} are enough"
               if p.need <= p.gives else
               f"input: a host must give {p.need:,.0f} images/s; a processor of this machine gives {p.core_images:,.0f}, and the "
               f"{p.on.chip.host_cores} of a host {p.gives:,.0f}: smaller pictures, or JPEGs scaled before, would help")


def audited(p: Plan, most: int = 8) -> Iterator[str]:
    if not p.replicated:
        yield "no tensor above 1 MiB is replicated along an axis that could split it"
    for r in p.replicated[:most]:
        yield f"replicated along {'+'.join(r.axes)}: {r.what} {r.shape}, {r.bytes / 2**20:.1f} MiB, {r.name[-90:]}"
    if len(p.replicated) > most:
        yield f"and {len(p.replicated) - most} more, see --json"


def said(refusal: str) -> str:
    """What the compiler says about memory, in one line."""
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", refusal) or re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", refusal)
    return f"the compiler needs {used[1]}iB where {used[2]}iB are free" if used else refusal[:200]


def many(n: int, what: str) -> str:
    return f"{n:,} {what}{'es' if what.endswith('h') else 's'}" if n != 1 else f"1 {what}"


def size(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 8 else f"{n / 2**20:.1f} MiB"


def seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 1 else f"{1e3 * s:.3g} ms" if s >= 1e-3 or s == 0 else f"{1e6 * s:.3g} us"


def as_json(p: Plan) -> dict[str, Any]:
    """Bytes, seconds and operations, of a chip unless the key says otherwise."""
    out = {
        "recipe": p.recipe, "stage": p.stage, "topology": p.on.name, "slices": p.on.slices, "chips": p.chips, "hosts": p.on.hosts,
        "mesh": dict(p.mesh), "dtype": p.layout.dtype, "quantize": p.layout.quantize, "remat": p.layout.remat, "microbatches": p.layout.microbatches,
        "flags": list(sets(p.layout.flags, p.on.devices[0])),
        "rows": p.rows, "seq_len": p.seq_len, "parameters": p.parameters, "trained_parameters": p.trained, "fits": p.fits,
        "hbm": p.on.chip.hbm, "state_bytes": p.state_bytes, "compile_seconds": round(p.compile_seconds, 2), "machine_code": p.whole,
        "model_flops_of_all": p.model_flops, "images_per_row": dict(p.images),
        "replicated": [vars(r) | {"axes": list(r.axes)} for r in p.replicated],
    }
    if not p.fits:
        return out | {"refusal": p.refusal}
    e = p.estimate
    return out | {
        "memory": p.memory.by_kind() | {"host": p.memory.host, "total": p.memory.total},
        "step_seconds": {"estimate": e.seconds, "low": e.low, "high": e.high, "with_input": p.step_seconds},
        "mfu": {"estimate": p.mfu(e.seconds), "low": p.mfu(e.high), "high": p.mfu(e.low)},
        "hfu": e.flops / (p.on.chip.peak * e.seconds), "compiled_flops": e.flops, "hbm_bytes": e.hbm_bytes, "host_bytes": e.host_bytes,
        "tokens_per_second": p.rows * p.seq_len / p.step_seconds,
        "images_per_second": p.rows * sum(p.images.values()) / p.step_seconds,
        "bound": p.bound, "seconds_by_unit": e.by_unit(), "seconds_by_kind": e.by_kind(),
        "collectives": [{"kind": kind, "axes": list(axes)} | vars(t) for (kind, axes), t in e.traffic.items()],
        "host_images_per_second": {"needed": p.need, "given": p.gives}, "examples_per_step": p.examples,
        "cost_per_million_examples": p.cost, "assumed": list(e.notes),
    }

