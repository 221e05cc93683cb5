"""Checkpoints: what is loaded is what was saved, on any mesh; what is broken is named, and what was whole stays whole."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mllm_jax.recipe import Adam
from mllm_jax.sharding import Layout
from mllm_jax.train import checkpoint, storage
from mllm_jax.train.checkpoint import CheckpointError, Checkpoints, read_params
from mllm_jax.train.optimizer import build
from mllm_jax.train.state import Blueprint, TrainState, abstract_state, make_state, trained_paths
from tests.conftest import ROOT
from tests.synthetic import llava

LAYOUTS = {
    "fsdp": Layout(mesh={"fsdp": 8}),
    "data-fsdp-tensor": Layout(mesh={"data": 2, "fsdp": 2, "tensor": 2}),
    "one device": Layout(mesh={"data": 1}),
}
TRAIN = ("inputs/image/connector/*", "decoder/blocks/*/attn/*")
DATA_STATE = {"workers": 0, "stream": {"entries": [1, {"a": "b"}], "next": 3}, "dropped": [["x", "bomb", 2]]}


def make(layout: Layout, train: tuple[str, ...] = TRAIN, ema: bool = True):
    mesh = layout.make_mesh(jax.devices()[: int(np.prod(list(layout.mesh.values())))])
    blueprint = Blueprint(llava(), layout, mesh)
    trained = trained_paths(blueprint.shapes, train)
    optimizer = build(Adam(lr=1e-3), 10, sorted(trained))
    return blueprint, trained, optimizer, abstract_state(blueprint, trained, optimizer, ema=ema)


def noise(abstract: TrainState, seed: int = 0) -> TrainState:
    """A state with random numbers in every leaf, whatever its type, and its sharding."""
    rng = np.random.default_rng(seed)
    leaf = lambda a: jax.device_put(
        (rng.standard_normal(a.shape) * 1e3).astype(a.dtype), a.sharding)
    return jax.tree.map(leaf, abstract)


def bits(tree) -> dict[str, bytes]:
    return {jax.tree_util.keystr(k): np.asarray(v).tobytes() for k, v in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, TrainState]:
    """A stage's folder with the checkpoints of steps 3 and 7, written from eight devices; the state of step 7."""
    folder = tmp_path_factory.mktemp("stage")
    _, _, _, abstract = make(LAYOUTS["fsdp"])
    state = noise(abstract)
    checkpoints = Checkpoints(folder)
    checkpoints.save_frozen(state.frozen)
    checkpoints.save(3, noise(abstract, 3), DATA_STATE, {"recipe": "r", "stage": "s"})
    checkpoints.save(7, state, DATA_STATE, {"recipe": "r", "stage": "s"})
    checkpoints.close()
    return folder, state


@pytest.fixture
def mine(saved: tuple, tmp_path: Path) -> Path:
    """A copy of that folder, to break."""
    return shutil.copytree(saved[0], tmp_path / "stage")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_loaded_is_what_was_saved_on_any_mesh(layout: str, saved: tuple):
    folder, state = saved
    blueprint, _, _, abstract = make(LAYOUTS[layout])
    checkpoints = Checkpoints(folder)
    again, data_state, meta = checkpoints.restore(abstract)
    checkpoints.close()
    assert bits(again) == bits(state)
    assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, abstract)
    assert data_state == [DATA_STATE]
    assert (meta["recipe"], meta["stage"], meta["step"]) == ("r", "s", 7) and meta["versions"]["jax"] == jax.__version__
    params = read_params(folder, blueprint.shapes)
    assert bits(params) == bits(state.all_params(ema=True))
    assert all(params[k].sharding == blueprint.shapes[k].sharding for k in params)


def test_a_real_state_is_sharded_as_its_abstract_one():
    blueprint, trained, optimizer, abstract = make(LAYOUTS["data-fsdp-tensor"])
    state = make_state(blueprint.init(0), trained, optimizer, blueprint, ema=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract)


def test_frozen_parameters_are_written_once(saved: tuple, tmp_path: Path):
    folder, state = saved
    names = set(ocp.metadata(folder / "checkpoints" / "7", checkpointable_name="state").metadata["params"])
    assert names == set(state.params) and not names & set(state.frozen)
    assert set(ocp.metadata(folder / "frozen").metadata) == set(state.frozen)
    stamps = lambda: {p: p.stat().st_mtime_ns for p in (folder / "frozen").rglob("*")}
    before = stamps()
    checkpoints = Checkpoints(folder)
    checkpoints.save_frozen(state.frozen)
    checkpoints.close()
    assert stamps() == before


def test_the_two_newest_are_kept_and_the_state_may_be_changed_at_once(tmp_path: Path):
    _, _, _, abstract = make(LAYOUTS["one device"], ema=False)
    checkpoints = Checkpoints(tmp_path)
    state = noise(abstract)
    checkpoints.save_frozen(state.frozen)
    wanted = bits(state)
    for step in (1, 2, 3):
        checkpoints.save(step, state, DATA_STATE, {})
        # What the next step does with a donated state, while the checkpoint is being written.
        state = replace(state, params=jax.jit(lambda p: jax.tree.map(lambda x: x * 0, p), donate_argnums=0)(state.params))
        state = noise(abstract) if step < 3 else state
    checkpoints.wait()
    again, _, _ = checkpoints.restore(abstract)
    checkpoints.close()
    assert bits(again) == wanted
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]


def truncate(folder: Path) -> None:
    for file in (p for p in folder.rglob("*") if p.is_file() and p.stat().st_size):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("hurt", ["metadata truncated", "data missing", "data truncated", "meta missing", "file empty", "empty"])
def test_a_corrupt_checkpoint_is_named_and_put_aside_and_the_one_before_is_used(hurt: str, mine: Path, capfd):
    target = mine / "checkpoints" / "7"
    state = target / "state"
    match hurt:
        case "metadata truncated":
            for file in (p for p in state.iterdir() if p.is_file() and p.stat().st_size):
                file.write_bytes(file.read_bytes()[:10])
        case "data missing":
            gone = [p for p in state.iterdir() if p.is_dir()]
            assert gone
            for p in gone:
                shutil.rmtree(p)
        case "data truncated":
            for p in (p for p in state.iterdir() if p.is_dir()):
                truncate(p)
        case "file empty":
            max((p for p in state.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size).write_bytes(b"")
        case "meta missing":
            shutil.rmtree(target / "meta")
        case "empty":
            for p in target.iterdir():
                shutil.rmtree(p) if p.is_dir() else p.unlink()
    _, _, _, abstract = make(LAYOUTS["one device"])
    checkpoints = Checkpoints(mine)
    again, _, meta = checkpoints.restore(abstract)
    assert meta["step"] == checkpoints.latest() == 3 and bits(again.params) == bits(noise(abstract, 3).params)
    [line] = capfd.readouterr().err.splitlines()
    aside = mine / "broken" / "7"
    assert re.fullmatch(f"mllm-jax: the checkpoint {target} cannot be read: .*; it is put aside as {aside}, and the run goes on from step 3", line)
    assert len(line) < 800 and aside.exists() and not target.exists()
    checkpoints.save(7, again, DATA_STATE, {}, wait=True)       # its number is free again
    checkpoints.close()
    assert Checkpoints(mine).restore(abstract)[2]["step"] == 7


def test_if_no_checkpoint_can_be_read_nothing_is_moved(mine: Path):
    """As like as not the fault is elsewhere."""
    for step in ("3", "7"):
        shutil.rmtree(mine / "checkpoints" / step / "meta")
    checkpoints = Checkpoints(mine)
    with pytest.raises(CheckpointError, match=f"the checkpoint {mine / 'checkpoints' / '7'} cannot be read: .*; delete it, or start anew"):
        checkpoints.restore(make(LAYOUTS["one device"])[3])
    checkpoints.close()
    assert sorted(p.name for p in (mine / "checkpoints").iterdir()) == ["3", "7"]


def test_storage_that_fails_for_a_while_is_tried_again(mine: Path, capfd):
    """The folder of checkpoints is away, as when a file system is not mounted; then it is back."""
    _, _, _, abstract = make(LAYOUTS["one device"])
    checkpoints = Checkpoints(mine, patience=40)
    where, away = mine / "checkpoints", mine / "away"
    where.rename(away)
    where.write_text("")                # where a folder should be, so that nothing can be made in it

    def mend() -> None:
        where.unlink()
        away.rename(where)

    timer = threading.Timer(2.5, mend)
    timer.start()
    checkpoints.save(9, noise(abstract, 9), DATA_STATE, {}, wait=True)
    timer.join()
    checkpoints.close()
    assert "could not save step 9" in (said := capfd.readouterr().err) and "trying again in 1 s" in said
    assert bits(Checkpoints(mine).restore(abstract)[0].params) == bits(noise(abstract, 9).params)


def test_a_checkpoint_that_failed_in_the_background_is_told_and_the_next_one_is_written(mine: Path, capfd):
    _, _, _, abstract = make(LAYOUTS["one device"])
    checkpoints = Checkpoints(mine, patience=10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))     # as a quota
    try:
        checkpoints.save(9, noise(abstract, 9), DATA_STATE, {})
        assert not checkpoints.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search("could not save step 9 in .*; the next checkpoint is tried when it is due", capfd.readouterr().err)
    assert checkpoints.latest() == 7
    checkpoints.save(10, noise(abstract, 10), DATA_STATE, {})
    assert checkpoints.settle() and checkpoints.restore(abstract)[2]["step"] == 10
    checkpoints.close()


@pytest.mark.parametrize(("patience", "pauses"), [(0, []), (1, [1]), (10, [1, 2, 4]), (200, [1, 2, 4, 8, 16, 32, 60, 60])])
def test_pauses_grow_and_are_together_no_longer_than_patience(patience: float, pauses: list[float]):
    assert storage.pauses(patience) == pauses


def test_broken_frozen_parameters_are_named(mine: Path):
    truncate(mine / "frozen")
    blueprint, _, _, abstract = make(LAYOUTS["one device"])
    checkpoints = Checkpoints(mine)
    with pytest.raises(CheckpointError, match=f"the checkpoint {mine / 'frozen'} cannot be read: .*; start anew with --fresh"):
        checkpoints.restore(abstract)
    checkpoints.close()
    with pytest.raises(CheckpointError, match=f"{mine / 'frozen'} cannot be read"):
        read_params(mine, blueprint.shapes)


def test_a_checkpoint_of_another_model_is_refused(saved: tuple):
    blueprint, *_ = make(LAYOUTS["one device"])
    name = "inputs/image/connector/layers/0/kernel"
    wrong = jax.ShapeDtypeStruct((3, 3), np.float32, sharding=blueprint.shapes[name].sharding)
    with pytest.raises(CheckpointError, match=rf"7: {name} has shape \(\d+, \d+\); the model wants \(3, 3\)"):
        read_params(saved[0], {name: wrong})
    with pytest.raises(CheckpointError, match="has no parameter 'inputs/image/connector/layers/0/kernels'; nearest: .*layers/0/kernel"):
        read_params(saved[0], {name + "s": wrong})


def test_what_a_killed_process_left_is_not_read(mine: Path):
    """Orbax writes under another name and renames at the end; and a folder without a checkpoint says so."""
    shutil.copytree(mine / "checkpoints" / "7", mine / "checkpoints" / "9.orbax-checkpoint-tmp-1")
    _, _, _, abstract = make(LAYOUTS["one device"])
    checkpoints = Checkpoints(mine)
    assert checkpoints.latest() == 7 and checkpoints.restore(abstract)[2]["step"] == 7
    checkpoints.close()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; run that stage first"):
        read_params(mine / "nothing", {})


def test_the_disk_is_looked_at_before_a_checkpoint_is_begun(mine: Path, monkeypatch):
    _, _, _, abstract = make(LAYOUTS["one device"])
    checkpoints = Checkpoints(mine)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"could not save step 9 in .*MiB are needed and 0.0 MiB are free; the checkpoint of step 7 is intact; "
                                              "free space or choose another --out, and run again to resume"):
        checkpoints.save(9, noise(abstract, 9), DATA_STATE, {})
    checkpoints.close()
    assert sorted(p.name for p in (mine / "checkpoints").iterdir()) == ["3", "7"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 24 MB, or None where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_while_saving_leaves_the_checkpoint_before(small_disk: Path | None, mine: Path, monkeypatch):
    """The check before is switched off, for another program may take the space meanwhile."""
    if small_disk is None:
        pytest.skip("no file system can be mounted here; the limit on files is tested below")
    stage = shutil.copytree(mine, small_disk / "stage")
    _, _, _, abstract = make(LAYOUTS["one device"])
    monkeypatch.setattr(checkpoint, "check_room", lambda *_: None)
    checkpoints = Checkpoints(stage)
    free = shutil.disk_usage(small_disk).free
    need = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((abstract.params, abstract.opt_state)))
    with open(small_disk / "other", "wb") as file:
        file.write(bytes(free - need // 4))
    with pytest.raises(CheckpointError, match="could not save step 9 .*the checkpoint of step 7 is intact; free space") as error:
        checkpoints.save(9, noise(abstract, 9), DATA_STATE, {})
        checkpoints.wait()
    assert os.strerror(errno.ENOSPC).lower() in str(error.value).lower() or "RESOURCE_EXHAUSTED" in str(error.value)
    (small_disk / "other").unlink()     # what the line says to do
    checkpoints = Checkpoints(stage)
    assert checkpoints.restore(abstract)[2]["step"] == 7
    checkpoints.save(9, noise(abstract, 9), DATA_STATE, {})
    checkpoints.wait()
    assert bits(checkpoints.restore(abstract)[0].params) == bits(noise(abstract, 9).params)
    checkpoints.close()


LIMITED = """
import resource, sys
from pathlib import Path
import jax
from tests.train.test_checkpoint import DATA_STATE, LAYOUTS, make, noise
from mllm_jax.launch.runtime import quiet
from mllm_jax.train.checkpoint import CheckpointError, Checkpoints
quiet()
_, _, _, abstract = make(LAYOUTS["one device"])
checkpoints = Checkpoints(Path(sys.argv[1]))
state = noise(abstract, 9)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    try:
        checkpoints.save(9, state, DATA_STATE, {})
        checkpoints.wait()
    finally:
        checkpoints.close()
except CheckpointError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before(mine: Path):
    """As a quota does; without the right to mount anything.  What Orbax has to say of it is that one line."""
    out = subprocess.run([sys.executable, "-c", LIMITED, str(mine)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True, timeout=120)
    assert out.stdout.startswith("could not save step 9 in ") and "the checkpoint of step 7 is intact" in out.stdout, out.stdout + out.stderr
    assert not out.stderr
    _, _, _, abstract = make(LAYOUTS["one device"])
    checkpoints = Checkpoints(mine)
    assert checkpoints.restore(abstract)[2]["step"] == 7
    checkpoints.close()


def test_random_is_not_zero():
    """What the comparisons above rest on."""
    assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(noise(make(LAYOUTS["one device"])[3])))
