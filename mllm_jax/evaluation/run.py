"""A task on a model, on any number of devices and processes: each example is counted exactly once.

All processes know all requests and make the same schedule, so that they run the same number of steps with the
same shapes; a batch that is not full is filled up with rows that nobody counts.  Each process appends its
own rows to `part-<process>.jsonl`, safe on disk after every batch.  A run that was cut off goes on where it
was: answered examples are left out, whatever the number of devices now.  Metrics come from the merged file
and never from sums on devices.

    folder/config.json            what was asked, of which weights; another one in the same folder is refused
    folder/part-00000.jsonl       a record a line
    folder/merged.jsonl           all records, in the order of the source
    folder/<baseline>/...         the same for each baseline
    folder/result.json
"""

import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm_jax.config import ConfigError, to_json
from mllm_jax.data.sources import Source, open_source
from mllm_jax.evaluation.tasks import Env, Pass, Record, Request, Runner, Task, media_hash
from mllm_jax.generate import host_rows, schedule
from mllm_jax.hosts import agree, gather
from mllm_jax.sharding import Layout
from mllm_jax.types import Example

Progress = Callable[[str, int, int], None]      # name of the pass, examples answered, examples asked for


def evaluate(
    model: Any,
    params: Mapping[str, Any],
    task: Task,
    tokenizer: Any,
    *,
    folder: Path,
    template: str = "plain",
    layout: Layout | None = None,
    mesh: Mesh | None = None,
    root: Path | None = None,
    seq_len: int | None = None,
    restart: bool = False,
    progress: Progress = lambda name, done, total: None,
) -> Record:
    """The numbers of a task, also written to `folder/result.json`; every process calls it and gets them.

    Args:
      params: of `model`, global arrays or numpy.
      seq_len: positions of a text for dual encoders, as in training; None: the size of the tower's table.
      root: where sources with relative paths begin.
      restart: begin anew if the folder holds answers of other weights or of another task.

    Raises:
      ConfigError: the folder belongs to another evaluation, or the source has an id twice.
      BadExample: an example that cannot be read; the answers so far are kept.
    """
    begin = time.monotonic()
    layout = layout or Layout()
    mesh = layout.make_mesh() if mesh is None else mesh
    env = Env(model=model, params=params, tokenizer=tokenizer, layout=layout, mesh=mesh, template=template, seq_len=seq_len,
              root=root)
    source = open_source(task.source, root)
    _claim(folder, _identity(env, task), restart)
    runner = task.start(env)
    requests = _requests(source, min(len(source), task.limit or len(source)))
    records = {
        name: _answer(folder / name, requests, one, source, runner, mesh, functools.partial(progress, name))
        for name, one in task.passes(requests, source).items()}
    result = {"task": to_json(task)} | task.result(records, env) | {"seconds": round(time.monotonic() - begin, 3)}
    if jax.process_index() == 0:
        _write(folder / "result.json", json.dumps(result, indent=1))
    return result


def fingerprint(params: Mapping[str, Any]) -> str:
    """A checksum of all weights, the same however they are sharded: sums of their bits as integers, which are exact."""

    def bits(x: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32), dtype=jnp.uint32)

    sums = jax.jit(lambda p: {k: bits(v) for k, v in p.items()})(dict(params))
    text = json.dumps({k: int(v) for k, v in sorted(sums.items())})
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _identity(env: Env, task: Task) -> Record:
    """What the answers depend on.  The mesh is not in it: a run may go on on other devices."""
    vocabulary = json.dumps(sorted(env.tokenizer.get_vocab().items())) + (env.tokenizer.chat_template or "")
    return {
        "task": to_json(task), "model": to_json(env.model), "weights": fingerprint(env.params), "template": env.template,
        "tokenizer": hashlib.blake2b(vocabulary.encode(), digest_size=8).hexdigest(), "seq_len": env.seq_len, "dtype": env.layout.dtype}


def _claim(folder: Path, identity: Record, restart: bool) -> None:
    """Makes the folder this evaluation's, or raises on all processes."""
    error = None
    if jax.process_index() == 0:
        try:
            file = folder / "config.json"
            old = json.loads(file.read_text()) if file.exists() else None
            if old is not None and old != json.loads(json.dumps(identity)):
                changed = ", ".join(k for k in identity if old.get(k) != json.loads(json.dumps(identity[k])))
                if not restart:
                    raise ConfigError(f"{folder} holds another evaluation (its {changed} differ); "
                                      "choose another folder, or restart it")
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            _write(file, json.dumps(identity, indent=1))
        except (ConfigError, OSError, json.JSONDecodeError) as e:
            error = e
    agree(error)


def _requests(source: Source, n: int) -> list[Request]:
    """Who is asked for: each process reads its share of the source and tells the others."""
    found, error = [], None
    try:
        for i in range(jax.process_index(), n, jax.process_count()):
            e = source[i]
            kinds = tuple(sorted({blob.kind for blob in e.media}))
            found.append(asdict(Request(index=i, id=e.id, media=media_hash(e), kinds=kinds)))
    except Exception as e:              # noqa: BLE001  of any sort: the others must not wait for this process
        error = e
    agree(error)
    everywhere = (r | {"kinds": tuple(r["kinds"])} for part in gather(found) for r in part)
    requests = sorted((Request(**r) for r in everywhere), key=lambda r: r.index)
    if twice := [id for id, count in Counter(r.id for r in requests).items() if count > 1]:
        raise ConfigError(f"the source has {len(twice)} ids more than once, such as {twice[0]!r}; evaluation counts by ids, "
                          "so give each example its own")
    return requests


def _answer(
    folder: Path, requests: Sequence[Request], one: Pass, source: Source, runner: Runner, mesh: Mesh,
    progress: Callable[[int, int], None],
) -> list[Record]:
    """The records of one pass, in the order of the source; what is already on disk is not computed again."""
    wanted = [requests[i].id for i in one.indices]
    part = Parts(folder)
    done = {id for ids in gather([r["id"] for r in part.read()]) for id in ids}
    todo = [i for i in one.indices if requests[i].id not in done]

    def example(i: int) -> Example:
        return source[i] if one.change is None else one.change(source[i], i)

    shapes, error = {}, None
    try:
        shapes = {i: runner.shape(example(i)) for i in todo[jax.process_index() :: jax.process_count()]}
    except Exception as e:              # noqa: BLE001
        error = e
    agree(error)
    shapes = {int(i): tuple(shape) for each in gather(shapes) for i, shape in each.items()}
    count = len(wanted) - len(todo)
    progress(count, len(wanted))
    with part:
        for shape, at in schedule([shapes[i] for i in todo], runner.rows):
            mine = host_rows([todo[k] for k in at], runner.rows, mesh)
            answered = runner.run([example(i) for i, _ in mine], shape)
            part.append([r for r, (_, real) in zip(answered, mine, strict=True) if real])
            count += len(at)
            progress(count, len(wanted))
    return _merge(folder, part.records, wanted)


def _merge(folder: Path, mine: Sequence[Record], wanted: Sequence[str]) -> list[Record]:
    """All records in the order of `wanted`; raises if any is missing or there twice."""
    records = [r for part in gather(list(mine)) for r in part]
    have, want = Counter(r["id"] for r in records), Counter(wanted)
    if have != want:
        missing, extra = sorted((want - have).elements()), sorted((have - want).elements())
        raise RuntimeError(f"{folder}: {len(missing)} of {len(wanted)} examples have no record ({missing[:3]}), "
                           f"{len(extra)} records are too many ({extra[:3]}); delete the folder and evaluate again")
    order = {id: i for i, id in enumerate(wanted)}
    records.sort(key=lambda r: order[r["id"]])
    if jax.process_index() == 0:
        _write(folder / "merged.jsonl", "".join(_line(r) for r in records))
    return records


class Parts:
    """The part files of a folder that this process answers for: its own, and those of processes that are no more."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"part-{jax.process_index():05d}.jsonl"
        self.folder, self.records, self.file = folder, [], None

    def read(self) -> list[Record]:
        """What is there already; a last line that was cut off is removed from its file."""
        for path in sorted(self.folder.glob("part-*.jsonl")):
            if int(path.stem.removeprefix("part-")) % jax.process_count() == jax.process_index():
                self.records += _whole_lines(path)
        return self.records

    def append(self, records: Sequence[Record]) -> None:
        self.file.write("".join(_line(r) for r in records))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.records += records

    def __enter__(self) -> Self:
        self.file = self.path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _whole_lines(path: Path) -> list[Record]:
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    out = []
    for number, line in enumerate(data[:end].splitlines(), 1):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise ConfigError(f"{path}:{number} is not a record ({e.msg}); delete the file to evaluate its examples again") from e
    return out


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    part = path.with_suffix(path.suffix + ".tmp")
    part.write_text(text)
    part.replace(path)
