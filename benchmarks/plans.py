"""Plans of many programs, which take hours: each is made in a process of its own and kept as a line of a file.

What is in the file is not made again, so that a run goes on where another one ended, on this machine or another.  A program
that does not compile, or takes too long, is a line that says so.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

Job = Mapping[str, Any]                 # what is planned: JSON; equal jobs are one
Row = dict[str, Any]                    # of a job: its fields, and what was found, or "error"
WARNING = "Involuntary full rematerialization"      # XLA could not go from one sharding to another without making the array whole
ALONE = "--alone"
MADE = "<!-- what follows is written by the command above -->"


def key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


def read(file: Path) -> dict[str, Row]:
    """{key: row}; of several of one job the last counts, and a line that was cut off does not."""
    out = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        out[key(row["job"])] = row
    return out


def make(script: Path, todo: Sequence[Job], file: Path, jobs: int = 1, limit: float = 3600, again: bool = False,
         anew: Mapping[str, Job] = {}) -> None:
    """Adds the rows of those jobs that the file has not; with `again` also of those that failed.

    Jobs whose keys are in `anew` are done again, by a process that is told this too.
    """
    done, lock = read(file), Lock()

    def one(job: Job) -> None:
        row = _process(script, job, limit, anew.get(key(job), {}))
        with lock, file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, job.values()))}: {said(row)}", file=sys.stderr, flush=True)

    missing = {k: job for job in todo if (k := key(job)) not in done or k in anew or again and "error" in done[k]}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, missing.values()))


def _process(script: Path, job: Job, limit: float, told: Job) -> Row:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}       # XLA's warnings are told
    command = [sys.executable, str(script), ALONE, json.dumps({**job, **told})]
    row: Row = {"job": dict(job), "jax": importlib.metadata.version("jax"), "libtpu": importlib.metadata.version("libtpu"), "commit": _commit()}
    began = time.monotonic()
    try:
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return row | {"error": f"not compiled in {limit / 60:.0f} minutes"}
    row["seconds"] = round(time.monotonic() - began)
    row["warnings"] = [line.split("] ", 1)[-1][:400] for line in ended.stderr.splitlines() if WARNING in line][:5]
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["nothing said"])[-1]
        return row | {"error": last[:300] if ended.returncode > 0 else f"signal {-ended.returncode} ended it: {last[:200]}"}
    return row | json.loads(ended.stdout.splitlines()[-1])


def _commit() -> str:
    """Of the code that plans, where git knows it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip()


def said(row: Row) -> str:
    """A row in a line."""
    if "error" in row:
        return row["error"]
    layout = f"{' '.join(f'{k}={n}' for k, n in row['mesh'].items() if n > 1)} remat={row['remat']} microbatches={row['microbatches']}"
    if not row["fits"]:
        return f"does not fit ({layout}): {row['refusal']}"
    return (f"{layout}, {row['hbm_gib']:.2f} of {row['hbm_of']:.0f} GiB, {row['step']:.3g} s, MFU {100 * row['mfu']:.1f} %, {row['bound']}; "
            f"{len(row['replicated'])} replicated, {len(row['warnings'])} warnings; {row['seconds']} s")


def lacks(row: Row | None) -> str:
    """Why a job has no figures, for a cell of a table; "" if it has."""
    if row is not None and "error" not in row and row["fits"]:
        return ""
    why = "not compiled yet" if row is None else row.get("error") or f"does not fit: {row['refusal']}"
    return why.replace("|", "/")


def summary(made: Any) -> Row:
    """What a row keeps of a plan (plan/report.py)."""
    from mllm_jax.plan.report import as_json
    from mllm_jax.plan.report import said as refused

    full = as_json(made)
    same = ("stage", "chips", "mesh", "remat", "microbatches", "rows", "seq_len", "parameters", "fits")
    out = {k: full[k] for k in same} | {
        "hbm_of": full["hbm"] / 2**30, "compile_seconds": round(made.compile_seconds), "machine_code": made.whole,
        "replicated": [f"{r.what} {r.shape} along {'+'.join(r.axes)}: {r.name[-90:]}" for r in made.replicated]}
    if not made.fits:
        return out | {"refusal": refused(made.refusal)}
    e = made.estimate
    return out | {
        "hbm_gib": round(made.memory.total / 2**30, 3), "step": e.seconds, "low": e.low, "high": e.high, "mfu": round(made.mfu(e.seconds), 4),
        "bound": made.bound, "units": {k: round(v, 5) for k, v in e.by_unit().items()},
        "sent": [[kind, "+".join(axes), t.dcn, round(t.bytes / 1e9, 4), round(t.busy, 5), round(t.exposed, 5)]
                 for (kind, axes), t in e.traffic.items()]}


def put(page: Path, lines: Iterable[str]) -> None:
    """Writes the lines under the text of a page, in the place of those that were there."""
    above = page.read_text().partition(MADE)[0] if page.exists() else ""
    page.write_text("\n".join([above + MADE, "", *lines]) + "\n")


def add_arguments(parser: argparse.ArgumentParser, file: Path, page: Path) -> None:
    parser.add_argument("--page", type=Path, default=page, metavar="FILE", help=f"whose tables are written anew (docs/{page.name})")
    parser.add_argument("--out", type=Path, default=file, metavar="FILE", help=f"lines of JSON; what is there is not made again ({file.name})")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once; each takes a core and 2 to 6 GB (default: 1)")
    parser.add_argument("--limit", type=float, default=60, metavar="MINUTES", help="for one program (default: 60)")
    parser.add_argument("--again", action="store_true", help="make those again that failed")
    parser.add_argument("--print", action="store_true", help="only the tables of the file, on this screen")


def alone(one: Callable[[Job], Row]) -> bool:
    """Whether this process is one of `make`; then it has printed the row of its job."""
    if sys.argv[1:2] != [ALONE]:
        return False
    from mllm_jax.launch import runtime

    runtime.start("cpu", cache=False)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)       # nothing is to be saved
    print(json.dumps(one(json.loads(sys.argv[2]))))
    return True
