"""Hosts that come and go: four, then two, then four go on with one run, and nobody can tell from what was computed."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.faults import RECORDS, RESTART, ended, ids_of, losses_of, start, steps_of, write_records

STEPS, ROWS = 15, 8
RUN = {"steps": STEPS, "save_every": 100}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What one process computes, beside its records."""
    folder = tmp_path_factory.mktemp("elastic")
    write_records(folder)
    codes, errors = ended(start(folder, folder / "whole", 1, **RUN))
    assert codes == [0], errors
    return folder / "whole"


def test_four_hosts_then_two_then_four_compute_what_one_does(whole: Path):
    out = whole.parent / "run"
    for hosts, stop_at, layout in ((4, 5, "auto"), (2, 10, "auto:mesh.data=1,mesh.fsdp=4"), (4, 0, "auto")):
        codes, errors = ended(start(whole.parent, out, hosts, "--layout", layout, devices=4 // hosts, stop_at=stop_at, **RUN))
        assert codes == [RESTART if stop_at else 0] * hosts, "\n".join(errors)[-4000:]

    ids, wanted = ids_of(out), ids_of(whole)
    assert ids == wanted and len(ids) == STEPS
    # Every record once in each epoch: with as many records as rows of six steps, an epoch ends with a step.
    each, seen = RECORDS // ROWS, [Counter(id for rows in ids for row in rows for id in row)]
    epochs = [Counter(id for rows in ids[k : k + each] for row in rows for id in row) for k in range(0, STEPS - each + 1, each)]
    assert len(epochs) == 2 and all(set(e.values()) == {1} and len(e) == RECORDS for e in epochs) and len(seen[0]) == RECORDS
    # 1e-5: sums over rows in another order.
    assert max(abs(a - b) for a, b in zip(losses_of(out), losses_of(whole), strict=True)) < 1e-5

    # One program serves all: hosts with text alone stand beside hosts with pictures, and no dummy picture is counted.
    images = {2: [], 4: []}
    for parts in steps_of(out).values():
        images[len(parts)].append([part["images"] for part in parts])
    assert all(any(0 in step and any(step) for step in steps) for steps in images.values())


def test_hosts_that_have_half_of_each_row_compute_what_one_does(whole: Path):
    out, last = whole.parent / "halves", 4
    codes, errors = ended(start(whole.parent, out, 2, "--layout", "auto:mesh.data=1,mesh.context=2", stop_at=last, **RUN))
    assert codes == [RESTART] * 2, "\n".join(errors)[-4000:]
    for parts, rows in zip(steps_of(out).values(), ids_of(whole)[:last], strict=True):
        assert [part["ids"] for part in parts] == [rows, rows]          # both read them all
    assert max(abs(a - b) for a, b in zip(losses_of(out), losses_of(whole)[:last], strict=True)) < 1e-5
