"""The benchmarks that plan for hours: what is there is not made again, failures are rows, and tables say what is missing."""

import json
import re
from xml.etree import ElementTree

import pytest

from benchmarks import plan_recipes, plans, scaling

SCRIPT = """
import json, os, sys, time
job = json.loads(sys.argv[2])
open(job["log"], "a").write(job["name"])
print("W0000 spmd_partitioner.cc:1] [SPMD] Involuntary full rematerialization of %x", file=sys.stderr)
if job["name"] == "b":
    sys.exit("no chip is called v9")
if job["name"] == "c":
    os.abort()
time.sleep(60 * (job["name"] == "d"))
print("said before")
print(json.dumps({"fits": True, "mesh": {}, "remat": "full", "microbatches": 1, "replicated": [],
                  "hbm_gib": 1.0, "hbm_of": 16, "step": 1.0, "mfu": 0.5, "bound": "compute"}))
"""


def test_rows_are_made_once_and_failures_are_rows(tmp_path, capsys):
    script, file, log = tmp_path / "s.py", tmp_path / "rows.jsonl", tmp_path / "log"
    script.write_text(SCRIPT)
    jobs = [{"name": name, "log": str(log)} for name in "abcda"]
    plans.make(script, jobs, file, limit=2)
    assert log.read_text() == "abcd"
    found = {row["job"]["name"]: row for row in plans.read(file).values()}
    assert found["a"]["step"] == 1.0 and found["a"]["warnings"] == ["[SPMD] Involuntary full rematerialization of %x"]
    assert found["b"]["error"] == "no chip is called v9"
    assert found["c"]["error"].startswith("signal 6 ended it")
    assert found["d"]["error"].startswith("not compiled in")
    with file.open("a") as out:                 # as of a run that was ended while it wrote
        out.write('{"job": {"name"')
    plans.make(script, jobs, file, limit=2)
    assert log.read_text() == "abcd"
    plans.make(script, jobs[1:2], file, again=True)
    assert log.read_text() == "abcdb"
    plans.make(script, jobs[:1], file, anew={plans.key(jobs[0]): {"name": "new"}})
    assert log.read_text() == "abcdbnew" and next(iter(plans.read(file).values()))["job"] == jobs[0]
    assert "a " in (said := capsys.readouterr().err) and "MFU 50.0 %" in said and "1 warnings" in said


@pytest.fixture(scope="module")
def row(tpu):
    job = plan_recipes.job_of("projector/mobilevlm", "v5e:2x2", tiny=True)
    return json.loads(json.dumps({"job": job, "jax": "1", "libtpu": "2", "seconds": 1, "warnings": []} | plan_recipes.one(job)))


def test_the_heaviest_stage_is_planned_with_rows_that_divide(row):
    """Of two stages with rows of one length the second trains the decoder too; 8 rows are 2 for each chip."""
    assert (row["stage"], row["rows"], row["paper_rows"], row["fits"]) == ("instruct", 8, 8, True)
    assert sum(row["units"].values()) == pytest.approx(row["step"], rel=0.01)           # rounded
    assert row["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and row["bound"] in row["units"]


def test_machine_code_is_made_for_the_layout_that_was_found(row):
    coded = plan_recipes.one(row["job"] | {"found": row})
    same = ("stage", "mesh", "remat", "microbatches", "rows", "paper_rows", "fits")
    assert not row["machine_code"] and coded["machine_code"] and [coded[k] for k in same] == [row[k] for k in same]
    assert coded["hbm_gib"] == pytest.approx(row["hbm_gib"], abs=0.02)          # of code


def test_tables_say_what_is_there_and_what_is_missing(row):
    other = {k: row[k] for k in ("jax", "libtpu")} | {
        "job": plan_recipes.job_of("projector/mobilevlm", "2*v5e:2x2", tiny=True), "error": "no|room", "warnings": ["x f32[4]"]}
    rows = {plans.key(r["job"]): r for r in (row, other)}
    lines = list(plan_recipes.tables(rows, ["projector/mobilevlm"], ["v5e:2x2", "2*v5e:2x2", "v6e:2x2"], tiny=True))
    assert lines[0].startswith("2 of 3 pairs were compiled (jax 1, libtpu 2), 0 of them to machine code; 1 fit.")
    assert lines[4] == f"| projector/mobilevlm instruct | {100 * row['mfu']:.0f} %, {row['hbm_gib']:.1f} | error | – |"
    widths = {line.count("|") for line in lines if line.startswith("| projector/mobilevlm |")}
    assert widths == {10}                       # as many cells as the head has
    assert lines[-1] == "- projector/mobilevlm, 2*v5e:2x2: x f32[4]"


def test_tables_take_the_place_of_those_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Words\n\n{plans.MADE}\n\nold\n")
    for _ in range(2):
        plans.put(page, ["| new |"])
    assert page.read_text() == f"# Words\n\n{plans.MADE}\n\n| new |\n"


def test_a_chip_keeps_of_a_position_what_its_layers_name():
    """Vicuna 7B: 32 layers of queries, keys and values, attention's output, and two products of 11,008, in two bytes."""
    from mllm_jax.config import load

    assert plan_recipes.kept(load("projector/llava_15").model) == 2 * 32 * (4 * 4096 + 2 * 11_008)


def test_meshes_of_the_scaling_study_use_all_chips_and_split_the_width():
    todo = list(scaling.jobs(list(scaling.SLICES)))
    for n, _, job in todo:
        sizes = job["mesh"]
        assert n == sizes["data"] * sizes["fsdp"] * sizes["tensor"] and scaling.WIDTH % sizes["fsdp"] == 0
    assert {n for n, *_ in todo} == set(scaling.SLICES)


def test_bytes_are_summed_by_axis_and_drawn():
    todo = [x for x in scaling.jobs([16, 64]) if x[1] == "fsdp"]
    sent = [["all-gather", "fsdp", False, 2.0, 0.5, 0.25], ["all-reduce", "data+fsdp", False, 3.0, 0.5, 0.25],
            ["all-reduce", "data", False, 1.0, 0.5, 0.0]]
    rows = {plans.key(job): {"fits": True, "hbm_gib": 9.0, "step": 2.0, "mfu": 0.6 - n / 1000, "sent": sent} for n, _, job in todo}
    lines = list(scaling.table(rows, todo))
    assert lines[2] == "| 16 | fsdp=16 | 9.0 | 1.0, 5.0, 0.0 | 1500 ms | 500 ms | 2000 ms | 58.4 % |"
    assert "not compiled yet" in list(scaling.table({}, todo))[2]
    picture = scaling.plot(rows, todo)
    ElementTree.fromstring(picture)
    [(x1, y1), (x2, y2)] = [tuple(map(float, p)) for p in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', picture)]
    assert x1 < x2 and y1 < y2                  # more chips to the right, slower ones below
