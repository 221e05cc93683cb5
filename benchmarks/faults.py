"""What a run loses to its machines: faults at random, one after another, until it is done.

    python benchmarks/faults.py --faults 20 --seed 0

A small LLaVA is trained twice on the same records, once by one process that nothing disturbs, once by one or two processes, a
new number at each start, to which all that machines do is done.  Compared are the examples of every step, in their order, and the
losses.  It fails if an example was lost or repeated, or a loss differs by more than 1e-5.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESTART = 75
RECORDS = 48
SHARDS = 4
STAGE = "align"
PATIENCE = 10                           # s that storage may fail


def write_records(folder: Path) -> None:
    """Three of four without a picture, so that some hosts have a batch of text alone."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(file, "png")
    (folder / "image.png").write_bytes(file.getvalue())
    picture = lambda i: ({"image": "image.png"}, "<image>\n") if i % 4 == 0 else ({}, "")
    (folder / "talk.json").write_text(json.dumps([
        {"id": f"r{i}", "conversations": [{"from": "human", "value": f"{picture(i)[1]}What is {i}?"},
                                          {"from": "gpt", "value": f"It is {i}." + " Yes." * (i % 5)}]} | picture(i)[0]
        for i in range(RECORDS)]))


def start(folder: Path, out: Path, hosts: int, *options: str, devices: int = 1, stop_at: int = 0, steps: int, save_every: int,
          pack: bool = False, workers: int = 0) -> list[subprocess.Popen]:
    """`mllm-jax train` on so many hosts with so many devices each; the last one is asked to stop at the step `stop_at`."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    data = f"stages.{STAGE}.data"
    ids = folder / f"{out.name}-ids"
    ids.mkdir(exist_ok=True)
    number = len(list(ids.iterdir()))   # of the files that are there: those of a later start come later
    train = ["train", "projector/llava_15", "--tiny", "--stages", STAGE, "--out", str(out), "--data-root", str(folder), *options,
             "--save-every", str(save_every), f"{data}.sources={{'llava:talk.json': 1.0}}", f"{data}.template=plain",
             f"{data}.batch_size=8", f"{data}.seq_len=128", f"{data}.pack={pack}", f"{data}.items={{'image': 1}}",
             f"{data}.shards={SHARDS}", f"{data}.workers={workers}", f"stages.{STAGE}.steps={steps}"]
    flags = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false").split()
    flags = [f for f in flags if "device_count" not in f] + [f"--xla_force_host_platform_device_count={devices}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT), "MLLM_JAX_HEARTBEAT": "10"}
    if hosts > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    made = []
    for i in range(hosts):
        path = ids / f"{number + i:05}-{hosts}-{i}.jsonl"
        path.touch()
        command = [sys.executable, str(Path(__file__).resolve()), "child", str(path), *train]
        mine = env | {"JAX_PROCESS_ID": str(i)} | ({"STOP_AT": str(stop_at)} if stop_at and i == hosts - 1 else {})
        made.append(subprocess.Popen(command, cwd=folder, env=mine, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    return made


def child(path: str, argv: list[str]) -> int:
    """The command itself, in this process; the ids of the examples of each step are written to `path`."""
    from mllm_jax.launch.runtime import cluster, supervise

    if cluster(os.environ):
        supervise()
    from mllm_jax import cli
    from mllm_jax.train import checkpoint, feed, log, loop

    checkpoint.LEAST = PATIENCE         # instead of ten minutes that hosts wait for one whose write failed

    file, last, step = open(path, "ab", buffering=0), {"rest": b""}, log.Log.step

    class Recorded(feed.Feed):
        def __next__(self) -> feed.Fed:
            fed = super().__next__()
            last["info"] = fed.info
            return fed

    def recorded(self: log.Log, n: int, *args: Any, **rates: float) -> float | None:
        info = last["info"]
        last["rest"] += json.dumps({"step": n, "ids": info.ids, "images": info.media.get("image", 0)}).encode() + b"\n"
        with contextlib.suppress(OSError):      # storage that fails is meant for the run, and meets this file too
            last["rest"] = last["rest"][file.write(last["rest"]):]
        if n == int(os.environ.get("STOP_AT", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, n, *args, **rates)

    loop.Feed, log.Log.step = Recorded, recorded
    return cli.main(argv)


def ended(hosts: list[subprocess.Popen], seconds: float = 300) -> tuple[list[int], list[str]]:
    """(exit codes, what was said); everything is killed if it takes longer."""
    try:
        errors = [h.communicate(timeout=seconds)[1] for h in hosts]
    finally:
        for h in hosts:
            h.kill()
    return [h.returncode for h in hosts], errors


def steps_of(out: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> what each host had, in the order of the hosts, when the step was made for the last time."""
    starts: dict[int, list[Path]] = {}
    for path in sorted((out.parent / f"{out.name}-ids").iterdir()):
        number, _, host = path.stem.split("-")
        starts.setdefault(int(number) - int(host), []).append(path)
    found: dict[int, list[dict[str, Any]]] = {}
    for _, paths in sorted(starts.items()):
        rows = [[json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] for path in paths]
        for parts in zip(*rows):
            found[parts[0]["step"]] = list(parts)
    return found


def ids_of(out: Path) -> list[list[list[str]]]:
    """The ids of each row of each step."""
    return [[row for part in parts for row in part["ids"]] for _, parts in sorted(steps_of(out).items())]


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "stages" / STAGE / "log.jsonl").read_text().splitlines()]


def made(out: Path) -> int:
    """Steps that the first host made, those included that were made again."""
    return sum(len(p.read_text().splitlines()) for p in (out.parent / f"{out.name}-ids").glob("*-0.jsonl"))


# --- faults ---------------------------------------------------------------------------------------------------------


def inside(process: subprocess.Popen, supervised: bool) -> list[int]:
    """The process that trains, first, and those that read for it.  One of several has a parent that only waits for it."""
    below = lambda pid: [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    try:
        trains = below(process.pid)[0] if supervised else process.pid
        return [trains, *below(trains)]
    except (OSError, IndexError):
        raise ProcessLookupError from None


def is_saving(out: Path) -> bool:
    return any("tmp" in p.name for p in (out / "stages" / STAGE / "checkpoints").glob("*"))


def inject(kind: str, out: Path, hosts: list[subprocess.Popen], rng: random.Random) -> None:
    victim, several = rng.choice(hosts), len(hosts) > 1
    if kind in ("kill", "kill while saving", "corrupt"):
        limit = time.monotonic() + 30
        while kind == "kill while saving" and not is_saving(out) and victim.poll() is None and time.monotonic() < limit:
            time.sleep(0.0005)
        victim.kill()
    elif kind == "SIGTERM":
        victim.send_signal(signal.SIGTERM)
    elif kind == "freeze":
        os.kill(inside(victim, several)[0], signal.SIGSTOP)
    elif kind == "worker":
        for pid in inside(victim, several)[1:]:
            os.kill(pid, signal.SIGKILL)
    elif kind == "storage":
        hosts = rng.sample(hosts, rng.randint(1, len(hosts)))
        for limit in (2_000, resource.RLIM_INFINITY):
            for pid in (p for h in hosts for p in inside(h, several)[:1]):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            time.sleep(3 if limit == 2_000 else 0)


def corrupt(out: Path, rng: random.Random) -> bool:
    """Breaks one file of the newest checkpoint, if there is another one."""
    steps = sorted((p for p in (out / "stages" / STAGE / "checkpoints").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    if len(steps) < 2:
        return False
    files = sorted(p for p in steps[-1].rglob("*") if p.is_file() and p.stat().st_size)
    file = rng.choice(files)
    size = file.stat().st_size
    os.truncate(file, rng.choice((0, size // 2)))
    return True


KINDS = ("kill", "kill while saving", "SIGTERM", "corrupt", "worker", "storage", "freeze")
STAYS = ("worker", "storage")           # the run goes on through these


def disturbed(folder: Path, out: Path, faults: int, rng: random.Random, **run: Any) -> dict[str, Any]:
    """Starts the run until it is done; what was done to it, and what that cost."""
    counts, starts, redone, done = collections.Counter(), 0, [], False
    kinds = [kind for kind in KINDS if kind != "worker" or run["workers"]]
    left = [kinds[i % len(kinds)] for i in range(faults)]
    rng.shuffle(left)
    while not done:
        number = rng.choice((1, 2))
        before, reached = made(out) if starts else 0, max(steps_of(out), default=0) if starts else 0
        hosts = start(folder, out, number, "--storage-patience", str(PATIENCE), devices=4 // number, **run)
        starts += 1
        fatal = None
        while left and fatal is None and all(h.poll() is None for h in hosts):
            target = made(out) + rng.randint(3, 15)
            while made(out) < target and all(h.poll() is None for h in hosts):
                time.sleep(0.002)
            if any(h.poll() is not None for h in hosts):
                break
            kind = left.pop()
            if kind == "freeze" and number == 1:
                kind = "kill"           # nobody would notice but the watchdog of another machine
            try:
                inject(kind, out, hosts, rng)
            except ProcessLookupError:
                left.append(kind)
                break
            counts[kind] += 1
            fatal = None if kind in STAYS else kind
            print(f"  {kind} at {target} steps, on {number} hosts", flush=True)
        if fatal == "freeze":           # the frozen machine is taken away when the others have ended
            limit = time.monotonic() + 120
            while all(h.poll() is None for h in hosts) and time.monotonic() < limit:
                time.sleep(0.05)
            for h in hosts:
                if h.poll() is None:
                    h.kill()            # and what it waits for with it
        codes, errors = ended(hosts)
        if not set(codes) <= {0, RESTART, -signal.SIGKILL}:
            raise SystemExit(f"after {fatal} the codes are {codes}:\n" + "\n".join(errors)[-6000:])
        done = codes[0] == 0 and set(codes) == {0}
        if fatal == "corrupt" and not done:
            counts["corrupt"] -= not corrupt(out, rng)
        if starts > 1:
            redone.append(reached - min(json.loads(line)["step"] for line in _last(out, number)) + 1 if made(out) > before else 0)
    return {"faults": dict(counts), "starts": starts, "steps made again": redone}


def _last(out: Path, hosts: int) -> list[str]:
    """Lines of the first host of the last start."""
    paths = sorted((out.parent / f"{out.name}-ids").glob(f"*-{hosts}-0.jsonl"))
    return paths[-1].read_text().splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="reading processes of each shard; 0: none, and none are killed (default: 1)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    write_records(folder)
    run = {"steps": 14 * args.faults + 20, "save_every": args.save_every, "pack": True, "workers": args.workers}
    codes, errors = ended(start(folder, folder / "whole", 1, **run))
    if codes != [0]:
        raise SystemExit(errors[0])
    began = time.monotonic()
    told = disturbed(folder, folder / "run", args.faults, random.Random(args.seed), **run)
    wanted, got = ids_of(folder / "whole"), ids_of(folder / "run")
    lost = sum(a != b for w, g in zip(wanted, got, strict=True) for a, b in zip(w, g, strict=True))
    losses = [losses_of(folder / name) for name in ("whole", "run")]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    again = told.pop("steps made again")
    print(json.dumps(told | {
        "injected": sum(told["faults"].values()), "steps": run["steps"], "steps made again": sum(again), "most for one fault": max(again),
        "rows whose examples differ": lost, "largest difference of a loss": apart, "seconds": round(time.monotonic() - began)}, indent=1))
    shutil.rmtree(folder)
    return int(lost > 0 or apart > 1e-5)


if __name__ == "__main__":
    sys.exit(child(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["child"] else main())
