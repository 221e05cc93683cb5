"""Hosts that come and go: four, then two, then four go on with one run, and nobody can tell from what was computed."""

from collections import Counter
from pathlib import Path

from benchmarks.faults import RECORDS, RESTART, ended, ids_of, losses_of, start, steps_of, write_records

STEPS, ROWS = 15, 8


def test_four_hosts_then_two_then_four_compute_what_one_does(tmp_path: Path):
    write_records(tmp_path)
    run = {"steps": STEPS, "save_every": 100}
    codes, errors = ended(start(tmp_path, tmp_path / "whole", 1, **run))
    assert codes == [0], errors
    out = tmp_path / "run"
    for hosts, stop_at, layout in ((4, 5, "auto"), (2, 10, "auto:mesh.data=1,mesh.fsdp=4"), (4, 0, "auto")):
        codes, errors = ended(start(tmp_path, out, hosts, "--layout", layout, devices=4 // hosts, stop_at=stop_at, **run))
        assert codes == [RESTART if stop_at else 0] * hosts, "\n".join(errors)[-4000:]

    ids, wanted = ids_of(out), ids_of(tmp_path / "whole")
    assert ids == wanted and len(ids) == STEPS
    # Every record once in each epoch: with as many records as rows of six steps, an epoch ends with a step.
    each, seen = RECORDS // ROWS, [Counter(id for rows in ids for row in rows for id in row)]
    epochs = [Counter(id for rows in ids[k : k + each] for row in rows for id in row) for k in range(0, STEPS - each + 1, each)]
    assert len(epochs) == 2 and all(set(e.values()) == {1} and len(e) == RECORDS for e in epochs) and len(seen[0]) == RECORDS
    # 1e-5: sums over rows in another order.
    assert max(abs(a - b) for a, b in zip(losses_of(out), losses_of(tmp_path / "whole"), strict=True)) < 1e-5

    # One program serves all: hosts with text alone stand beside hosts with pictures, and no dummy picture is counted.
    images = {2: [], 4: []}
    for parts in steps_of(out).values():
        images[len(parts)].append([part["images"] for part in parts])
    assert all(any(0 in step and any(step) for step in steps) for steps in images.values())
