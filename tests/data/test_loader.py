"""The stream of batches: exact to the bit, whatever the workers, restarts and hosts."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data import entries as entries_module
from mllm_jax.data import loader as loader_module
from mllm_jax.data.augment import HorizontalFlip, RandomResizedCrop
from mllm_jax.data.entries import WorkersLost, share
from mllm_jax.data.errors import BadExample
from mllm_jax.data.loader import Loader, dropped, merge
from mllm_jax.data.sources.shapes import Shapes
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.data.views import Square
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.recipe import Data
from mllm_jax.types import Blob, Example, Part, Turn

VIT = ViTConfig(width=8, heads=1, mlp=8, patch=8, grid=2, depth=1)
TOWERS = {"image": TowerConfig(view=Square(size=16), encoder=VIT, connector=MLPConfig())}
PAIRS = {"image": TowerConfig(view=Square(size=16), encoder=VIT, route="pool")}
TOKENIZER = load_tokenizer("bytes")


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (value % 256, value // 256, 0)).save(out, "PNG")
    return out.getvalue()


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def text(name: str, i: int, answer: str = "yes") -> Example:
    turns = (Turn(role="user", parts=(Part(text=f"{name} {i}"),)), Turn(role="assistant", parts=(Part(text=answer),)))
    return Example(id=f"{name}/{i}", turns=turns)


def picture(i: int, data: bytes) -> Example:
    turns = (Turn(role="user", parts=(Part(kind="image", media=0),)), Turn(role="assistant", parts=(Part(text="yes"),)))
    return Example(id=f"picture/{i}", turns=turns, media=(Blob(kind="image", data=data),))


def data(sources: dict[str, float], **more) -> Data:
    return Data(**{"sources": sources, "batch_size": 4, "seq_len": 192, "items": {"image": 4}, "on_bad_example": "skip"} | more)


def loader(data: Data, sources: dict, towers=TOWERS, rows: int = 4, **more) -> Loader:
    return Loader(data, towers, TOKENIZER, rows=rows, open=lambda name, root: sources[name], **more)


def digest(rows) -> str:
    """Of every array and of what is said about the batch."""
    batch, out = rows.batch, hashlib.sha256(repr(rows.info).encode())
    for array in (batch.tokens, batch.targets, batch.weights, batch.segments, batch.positions, batch.kinds):
        out.update(array.tobytes())
    for media in batch.media.values():
        for array in (media.values, media.coords, media.mask, media.slot):
            out.update(array.tobytes())
    return out.hexdigest()


def take(loader: Loader, count: int) -> list:
    with iter(loader) as batches:
        return [next(batches) for _ in range(count)]


# Three sources with images, text alone, and faults of every stage: header, text, and (jpeg) behind the header.
MIXED = {
    "shapes": Shapes(200),
    "text": [text("text", i, "" if i % 5 == 0 else "yes") for i in range(40)],
    "broken": [picture(i, jpeg()[:-900] if i % 3 == 0 else b"<html>" if i % 3 == 1 else png(i)) for i in range(30)],
}
MIX = data({"shapes": 0.6, "text": 0.3, "broken": 0.1}, augment=(RandomResizedCrop(), HorizontalFlip()))


@pytest.fixture(scope="module")
def whole():
    """The first ten batches without workers or interruption."""
    return [digest(rows) for rows in take(loader(MIX, MIXED), 10)]


def test_the_stream_goes_on_from_any_state_bit_for_bit(whole):
    with iter(loader(MIX, MIXED)) as batches:
        states = []
        for _ in range(10):
            states.append(json.loads(json.dumps(batches.get_state())))
            next(batches)
    for start in (0, 1, 4, 9):
        with iter(loader(MIX, MIXED)) as batches:
            batches.set_state(states[start])
            assert [digest(next(batches)) for _ in range(start, 10)] == whole[start:]


def test_an_iterator_can_be_set_back(whole):
    with iter(loader(MIX, MIXED)) as batches:
        state = batches.get_state()
        assert [digest(next(batches)) for _ in range(3)] == whole[:3]
        batches.set_state(state)
        assert [digest(next(batches)) for _ in range(3)] == whole[:3]


def test_worker_processes_do_not_change_the_stream_whether_they_live_or_die(whole, capfd):
    many = loader(replace(MIX, workers=3), MIXED)
    assert share(3, many.weights) == {"shapes": 2, "text": 1, "broken": 0}
    with iter(many) as batches:
        assert [digest(next(batches)) for _ in range(2)] == whole[:2]
        state = json.loads(json.dumps(batches.get_state()))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        assert [digest(next(batches)) for _ in range(8)] == whole[2:]
    said = capfd.readouterr().err
    assert re.search(r"a worker that reads '\w+' has died \(1 of 3 times at this record\); reading goes on with new ones", said)
    with iter(loader(MIX, MIXED)) as batches:       # the state does not know who read
        batches.set_state(state)
        assert [digest(next(batches)) for _ in range(4)] == whole[2:6]


def row_digests(rows) -> list[str]:
    batch, media = rows.batch, rows.batch.media["image"]
    arrays = (batch.tokens, batch.targets, batch.weights, batch.segments, batch.positions, media.values, media.coords, media.mask, media.slot)
    return [hashlib.sha256(b"".join(a[r].tobytes() for a in arrays) + repr(ids).encode()).hexdigest() for r, ids in enumerate(rows.info.ids)]


def on(hosts: int, batches: int, state=None, rows: int = 8, mix=MIX, shards: int = 4) -> tuple[list[list[str]], dict]:
    """What so many hosts make of the stream from this state on: the rows of each batch, and the merged state behind them."""
    out, states = [[""] * rows for _ in range(batches)], []
    for host in range(hosts):
        mine = range(host * rows // hosts, (host + 1) * rows // hosts)
        # The number of shards that a host would begin with does not count when a state has its own.
        with iter(loader(mix, MIXED, rows=rows, mine=mine, shards=hosts if state else shards)) as stream:
            if state:
                stream.set_state(state)
            for batch in out:
                batch[mine.start : mine.stop] = row_digests(next(stream))
            states.append(json.loads(json.dumps(stream.get_state())))
    return out, merge(states)


def test_a_batch_is_the_same_whoever_reads_it_and_whoever_read_the_one_before():
    wanted, end = on(1, 7)
    first, state = on(4, 2)
    then, state = on(2, 2, state)       # four shards on two hosts,
    more, state = on(8, 2, state)       # and two hosts a shard
    last, state = on(1, 1, state)
    assert first + then + more + last == wanted and state == end
    assert len({row for batch in wanted for row in batch}) == 7 * 8 and dropped(state)["broken/decode"]


def test_a_host_decodes_only_its_rows_of_a_shard_where_a_broken_one_would_stop_the_run(monkeypatch):
    sources, decoded = {"p": [picture(i, png(i)) for i in range(40)]}, []
    real = loader_module.decode_items
    monkeypatch.setattr(loader_module, "decode_items", lambda placed, *a, **k: decoded.append(len(placed)) or real(placed, *a, **k))
    strict = data({"p": 1.0}, on_bad_example="raise", pack=False)
    rows = [take(loader(strict, sources, rows=8, mine=mine), 1)[0] for mine in (range(4), range(4, 8), range(8))]
    assert [r for half in rows[:2] for r in row_digests(half)] == row_digests(rows[2])
    assert set(decoded[:2]) == {4} and decoded[-1] == 8


def test_shards_must_divide_a_batch():
    with pytest.raises(ConfigError, match="data.shards is 3 and must divide the 4 rows of a batch; choose one of 1, 2, 4"):
        loader(MIX, MIXED, shards=3)


class Deadly(list):
    """Ends the worker that reads it; who begins the stream looks at a few records, too."""

    def __getitem__(self, i):
        if multiprocessing.parent_process() is None:
            return super().__getitem__(i)
        os._exit(7)


def test_a_record_that_ends_every_worker_ends_the_run(monkeypatch):
    monkeypatch.setattr(entries_module, "LIVES", 1)
    with iter(loader(data({"text": 1.0}, workers=1), {"text": Deadly([text("text", 0)])})) as batches:
        with pytest.raises(WorkersLost, match="the workers that read 'text' die at its record 0, the last with exit code 7 .*lower data.workers"):
            next(batches)


def test_seeds_change_the_order_and_epochs_do_too():
    sources = {"text": [text("text", i) for i in range(32)]}
    ids = lambda **more: [row[0] for rows in take(loader(data({"text": 1.0}, pack=False), sources, **more), 16) for row in rows.info.ids]
    first = ids(seed=1)
    assert sorted(first[:32]) == sorted(first[32:]) == sorted(e.id for e in sources["text"])
    assert first[:32] != first[32:]
    # The second epoch of a seed is not the first of the next one.
    assert first[32:] != ids(seed=2)[:32]


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_an_epoch_without_overlap(hosts):
    sources = {"text": [text("text", i) for i in range(24)]}
    seen = []
    for host in range(hosts):
        mine = range(host * 24 // hosts, (host + 1) * 24 // hosts)
        rows = take(loader(data({"text": 1.0}, pack=False), sources, rows=24, mine=mine, shards=hosts), 1)[0]
        seen += [row[0] for row in rows.info.ids]
    assert sorted(seen) == sorted(e.id for e in sources["text"])


def test_every_host_sees_every_source():
    sources = {name: [text(name, i) for i in range(50)] for name in "ab"}
    for host in range(2):
        mixed = loader(data({"a": 0.5, "b": 0.5}, pack=False), sources, mine=range(20 * host, 20 * host + 20), shards=2, rows=40)
        counts = Counter(row[0][0] for row in take(mixed, 1)[0].info.ids)
        assert counts == {"a": 10, "b": 10}


def test_weights_are_of_what_survives():
    sources = {
        "good": [text("good", i) for i in range(50)],
        "half": [text("half", i, "" if i % 2 else "yes") for i in range(50)],
        "rare": [text("rare", i) for i in range(50)],
    }
    rows = take(loader(data({"good": 0.45, "half": 0.45, "rare": 0.1}, pack=False), sources, rows=100), 10)[-1]
    examples = rows.info.examples
    assert sum(examples.values()) == 1000
    for name, weight in (("good", 0.45), ("half", 0.45), ("rare", 0.1)):
        assert examples[name] / 1000 == pytest.approx(weight, abs=0.01)
    assert rows.info.dropped[("half", "empty_answer")] == pytest.approx(450, abs=50)


def test_a_medium_broken_behind_its_header_takes_its_example_along():
    sources = {"p": [picture(i, jpeg()[:-900] if i == 0 else png(i)) for i in range(8)]}
    rows = take(loader(data({"p": 1.0}), sources), 6)
    assert ("p", "decode") in rows[-1].info.dropped
    for r in rows:
        media = r.batch.media["image"]
        slots = media.slot
        for b, ids in enumerate(r.info.ids):
            assert "picture/0" not in ids
            # As many images as examples, each with its four positions, and no position of an image that is gone.
            assert media.mask[b].sum() == len(ids)
            assert np.sum(slots[b] >= 0) == 4 * len(ids)
            assert len(set(r.batch.segments[b]) - {0}) == len(ids)
            assert media.mask[b][slots[b][slots[b] >= 0] // 4].all()


def test_pixels_after_packing_are_those_of_the_example_itself():
    sources = {"p": [picture(i, png(i)) for i in range(40)]}
    for rows in take(loader(data({"p": 1.0}), sources), 3):
        media = rows.batch.media["image"]
        for b, ids in enumerate(rows.info.ids):
            for item, id in enumerate(ids):
                red, green = int(id.split("/")[1]) % 256, 0
                values = media.values[b, item].reshape(-1, 3)
                assert (values == (red, green, 0)).all()
                assert media.coords[b, item].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


def test_augmentation_follows_the_example_and_not_its_place():
    """Two hosts draw the same crop of the same example in the same epoch as one host does."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    sources = {"p": [picture(i, out.getvalue()) for i in range(8)]}
    crops = lambda **more: {
        ids[0]: rows.batch.media["image"].values[b, 0].tobytes()
        for rows in take(loader(data({"p": 1.0}, pack=False, augment=(RandomResizedCrop(),)), sources, **more), 1)
        for b, ids in enumerate(rows.info.ids)
    }
    one = crops(rows=8)
    two = crops(rows=8, mine=range(4), shards=2) | crops(rows=8, mine=range(4, 8), shards=2)
    assert one == two and len(set(one.values())) == 8


def test_pairs_fill_a_row_each():
    rows = take(loader(data({"shapes": 1.0}, template="clip", seq_len=24, items={}), MIXED, PAIRS), 1)[0]
    assert all(len(ids) == 1 for ids in rows.info.ids)
    media = rows.batch.media["image"]
    assert media.values.shape == (4, 1, 4, 192) and media.mask.all() and (media.slot == -1).all()
    assert media.values.dtype == np.uint8


def test_a_model_of_text_has_batches_without_media():
    rows = take(loader(data({"text": 1.0}, items={}), MIXED, towers={}), 1)[0]
    assert rows.batch.media == {} and rows.info.tokens == np.sum(rows.batch.segments > 0)


def test_what_is_said_about_a_batch_is_what_is_in_it():
    rows = take(loader(MIX, MIXED), 2)[1]
    batch, info = rows.batch, rows.info
    lengths = [np.sum(row == s) for row in batch.segments for s in set(row.tolist()) - {0}]
    assert info.tokens == sum(lengths) and info.squares == sum(int(n) ** 2 for n in lengths)
    assert info.trained == np.sum(batch.weights > 0)
    assert info.media.get("image", 0) == batch.media["image"].mask.sum()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([text("t", 0, "")], "record 't/0' is bad .empty_answer."),
        ([picture(0, b"<html>")], "record 'picture/0' is bad .decode."),
        ([picture(0, jpeg()[:-900])], "record 'picture/0' is bad .decode."),
        ([text("t", 0, "x" * 300)], "record 't/0' is bad .overlong."),
    ],
)
def test_by_default_a_bad_example_stops_the_run_with_its_id(source, message):
    with iter(loader(data({"s": 1.0}, on_bad_example="raise"), {"s": source})) as batches:
        with pytest.raises(BadExample, match=message):
            next(batches)
        with pytest.raises(ValueError, match="stopped by a bad example"):
            next(batches)


def test_overlong_examples_may_be_dropped_while_faults_still_stop():
    sources = {"s": [text("t", i, "x" * (300 if i % 2 else 3)) for i in range(10)]}
    rows = take(loader(data({"s": 1.0}, on_bad_example="raise", overlong="drop"), sources), 1)[0]
    assert rows.info.dropped[("s", "overlong")] > 0


def test_a_source_with_nothing_usable_stops_instead_of_searching_for_ever():
    message = "the last 1000 records of 's' were all bad; the last: record 't/0'"
    with pytest.raises(ConfigError, match=message):
        take(loader(data({"s": 1.0}), {"s": [text("t", 0, "")]}), 1)


@pytest.mark.parametrize(
    ("sources", "message"),
    [({"s": 0.0}, "weights of at least 0, and one above"), ({"s": -1.0}, "weights of at least 0"), ({"s": 1.0}, "'s' has no records")],
)
def test_sources_that_give_nothing_are_refused(sources, message):
    with pytest.raises(ConfigError, match=message):
        loader(data(sources), {"s": []})


SCRIPT = """
import multiprocessing
import os
import signal
import sys
from mllm_jax.data.loader import Loader
from mllm_jax.data.tokenizer import load_tokenizer
from mllm_jax.recipe import Data
from mllm_jax.types import Example, Part, Turn

def open_text(name, root):
    turns = (Turn(role="user", parts=(Part(text="q"),)), Turn(role="assistant", parts=(Part(text="a"),)))
    return [Example(id=str(i), turns=turns) for i in range(100)]

if __name__ == "__main__":
    data = Data(sources={"t": 1.0}, batch_size=2, seq_len=32, workers=int(sys.argv[1]))
    batches = iter(Loader(data, {}, load_tokenizer("bytes"), rows=2, open=open_text))
    next(batches)
    if sys.argv[2:]:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    print("done")
"""


def test_workers_do_not_outlive_a_program_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    out = subprocess.run([sys.executable, "script.py", "1", "kill"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=120, check=False,
                         stderr=subprocess.DEVNULL, env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "PYTHONPATH": root})
    workers = out.stdout.split()
    assert out.returncode == -signal.SIGKILL and workers
    limit = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_program_that_forgets_to_close_ends_quietly(workers, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, str(script), str(workers)], cwd=root, capture_output=True, text=True, timeout=120,
        check=False,
        env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout == "done\n"
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr, run.stderr
