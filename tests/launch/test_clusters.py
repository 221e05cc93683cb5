"""Files for clusters: held against what the public tools accept, and the scripts run with stand-ins for what they call."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mllm_jax.config import ConfigError
from mllm_jax.launch.clusters import gke, skypilot, slurm, tpu_vm
from mllm_jax.launch.clusters.job import Job, check
from mllm_jax.launch.layouts import LAYOUTS, machine
from tests.conftest import ROOT
from tests.launch.schema import faults

PUBLIC = json.loads((ROOT / "tests" / "golden" / "clusters.json").read_text())
ARGUMENTS = ("projector/llava_15", "stages.instruct.optimizer.lr=1e-5", "data.words={'a b': 1}", "--layout", "v6e-64")
TPUS = [n for n in LAYOUTS if machine(n).chip in gke.TYPES]
GPUS = [n for n in LAYOUTS if machine(n).chip in slurm.GPUS]


def job(layout: str = "v6e-64", **kw) -> Job:
    return Job(**{"name": "mine", "arguments": ARGUMENTS, "machine": machine(layout), "image": "us-docker.pkg.dev/p/r/mllm:1", "bucket": "my-bucket",
                  "project": "p", "zone": "us-east5-b", **kw})


COMMAND = ["mllm-jax", "train", *ARGUMENTS, "--out", "/bucket/runs/mine", "--data-root", "/bucket/data"]


# --- GKE ------------------------------------------------------------------------------------------------------------


def manifest(layout: str, **kw) -> dict:
    return yaml.safe_load(gke.write(job(layout, **kw)))


@pytest.mark.parametrize("layout", TPUS)
def test_a_jobset_is_one_by_the_public_definition(layout):
    for spot in (False, True):
        assert not list(faults(manifest(layout, spot=spot, service_account="trainer", options={"queue": "q"}), PUBLIC["jobset"]))


@pytest.mark.parametrize(("right", "wrong"), [
    ("maxRestarts", "maxRestart"), ("parallelism", "paralelism"), ("nodeSelector:", "nodeSelectors:"), ("FailJobSet", "FailJobset"),
    ("restartPolicy", "restart_policy"), ("volumeMounts", "mounts"), ("volumeAttributes", "attributes"), ("replicas: 1", "replicas: one"),
    ("onExitCodes", "onExitCode"), ("terminationGracePeriodSeconds: 300", 'terminationGracePeriodSeconds: "300"'),
    ("mountPath: /bucket", "path: /bucket"), ("- name: final\n        action: FailJobSet", "- action: FailJobSet"),
])
def test_a_misspelt_field_is_found(right, wrong):
    text = gke.write(job())
    assert right in text
    assert list(faults(yaml.safe_load(text.replace(right, wrong, 1)), PUBLIC["jobset"]))


@pytest.mark.parametrize(("layout", "kind", "shape", "hosts", "slices"), [
    ("v6e-64", "tpu-v6e-slice", "8x8", 16, 1), ("v5e-256x2", "tpu-v5-lite-podslice", "16x16", 64, 2), ("v5p-512", "tpu-v5p-slice", "8x8x8", 128, 1),
    ("v4-64", "tpu-v4-podslice", "4x4x4", 16, 1), ("v5e-1", "tpu-v5-lite-podslice", "1x1", 1, 1),
])
def test_a_slice_is_a_child_job_and_a_machine_is_a_pod(layout, kind, shape, hosts, slices):
    one = manifest(layout)
    [child] = one["spec"]["replicatedJobs"]
    pod = child["template"]["spec"]["template"]["spec"]
    assert child["replicas"] == slices and child["template"]["spec"]["parallelism"] == child["template"]["spec"]["completions"] == hosts
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": kind, "cloud.google.com/gke-tpu-topology": shape}
    [container] = pod["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == min(4, machine(layout).chips) and container["command"] == COMMAND
    assert pod.get("hostNetwork", False) == (slices > 1)
    options = "implicit-dirs,file-system:rename-dir-limit:200000,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"] == options
    assert one["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert child["template"]["spec"]["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_a_pod_that_was_stopped_starts_the_set_again_and_one_that_failed_ends_it():
    spec = manifest("v6e-64", restarts=7)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7 and spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    child = spec["replicatedJobs"][0]["template"]["spec"]
    [rule] = child["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2] and child["backoffLimit"] == 0
    assert rule["onExitCodes"]["containerName"] == child["template"]["spec"]["containers"][0]["name"]
    assert child["template"]["spec"]["restartPolicy"] == "Never"        # with another, pod failure policies are refused


# --- SkyPilot -------------------------------------------------------------------------------------------------------


def sky_faults(text: str) -> list[str]:
    task = yaml.safe_load(text)
    parts = [(task, "task"), (task["resources"], "resources"), *((m, "storage") for m in task["file_mounts"].values())]
    return [fault for value, name in parts for fault in faults(value, PUBLIC["skypilot"][name], name)]


@pytest.mark.parametrize("layout", [n for n in TPUS + GPUS if machine(n).chip not in gke.TYPES or machine(n).slices == 1])
def test_a_task_is_one_by_the_schema_of_skypilot(layout):
    for kw in ({}, {"spot": True, "zone": ""}):
        assert sky_faults(skypilot.write(job(layout, **kw))) == []


@pytest.mark.parametrize(("right", "wrong"), [
    ("num_nodes", "nodes"), ("use_spot", "spot"), ("recover_on_exit_codes: [75]", "recover_on_exit_codes: [750]"), ("accelerator_args", "args"),
    ("max_restarts_on_errors: 0", "max_restarts_on_errors: none"), ("source:", "src:"), ("setup:", "set_up:"),
])
def test_a_misspelt_field_of_a_task_is_found(right, wrong):
    text = skypilot.write(job("v6e-64"))
    assert right in text and sky_faults(text.replace(right, wrong, 1))


def test_a_task_names_the_accelerator_by_cores_where_google_does():
    wanted = {"v4-64": "tpu-v4-128", "v5p-64": "tpu-v5p-128", "v5e-64": "tpu-v5litepod-64", "v6e-8": "tpu-v6e-8", "h100-8x4": "H100:8"}
    assert {n: yaml.safe_load(skypilot.write(job(n)))["resources"]["accelerators"] for n in wanted} == wanted
    assert yaml.safe_load(skypilot.write(job("h100-8x4")))["num_nodes"] == 4


def test_machines_with_gpus_learn_of_each_other(tmp_path):
    task = yaml.safe_load(skypilot.write(job("h100-8x4")))
    done = bash(tmp_path, task["run"], SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
                commands={"conda": "", "mllm-jax": 'echo $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID; exit 75'})
    assert done.returncode == 75 and "10.0.0.1:8476 2 1" in done.stdout
    assert calls(tmp_path, "mllm-jax") == [COMMAND[1:]]


def test_a_task_has_one_tpu_slice():
    with pytest.raises(ConfigError, match="starts one TPU slice and 2 are asked for; use launch gke or tpu-vm"):
        skypilot.write(job("v5e-16x2"))


# --- SLURM ----------------------------------------------------------------------------------------------------------


def bash(folder: Path, script: str, *args: str, commands: dict[str, str], **env: str) -> subprocess.CompletedProcess:
    """Runs a script with stand-ins: each notes its arguments, and then does what is said."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, body in commands.items():
        path = folder / "bin" / name
        path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >> {folder}/{name}.calls; printf "\\n" >> {folder}/{name}.calls\n{body}\n')
        path.chmod(0o755)
    (folder / "script").write_text(script)
    return subprocess.run(["bash", "script", *args], cwd=folder, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", **env})


def calls(folder: Path, name: str) -> list[list[str]]:
    path = folder / f"{name}.calls"
    return [line.split("\0")[:-1] for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def batch(layout: str = "h100-8x4", **kw) -> str:
    return slurm.write(job(layout, **{"folder": "/scratch/me/runs", "data": "/scratch/me/data", **kw}))


def options(text: str) -> list[str]:
    return re.findall(r"^#SBATCH --([\w-]+)", text, re.M)


@pytest.mark.parametrize("layout", GPUS)
def test_a_batch_script_is_bash_with_options_of_sbatch(layout):
    text = batch(layout, options={"partition": "gpu", "account": "a", "time": "24:00:00", "constraint": "h100"})
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert set(options(text)) <= set(PUBLIC["sbatch"]) and {"requeue", "signal", "partition", "constraint"} <= set(options(text))
    assert f"#SBATCH --nodes={machine(layout).slices}\n" in text and f"#SBATCH --ntasks-per-node={machine(layout).chips}\n" in text
    body = text.splitlines()
    first = next(i for i, line in enumerate(body) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in body[first:])         # SLURM reads none behind the first command


@pytest.mark.parametrize(("code", "count", "ends", "queued"), [
    (0, "0", 0, False), (1, "0", 1, False), (2, "0", 2, False), (75, "0", 0, True), (137, "3", 0, True), (143, "", 0, True), (75, "5", 75, False),
])
def test_a_job_goes_back_into_the_queue_when_it_was_stopped_and_not_when_it_failed(code, count, ends, queued, tmp_path):
    env = {"SLURM_JOB_ID": "42"} | ({"SLURM_RESTART_COUNT": count} if count else {})
    done = bash(tmp_path, batch(restarts=5), commands={"srun": f"exit {code}", "scontrol": ""}, **env)
    assert done.returncode == ends, done.stderr
    assert calls(tmp_path, "scontrol") == ([["requeue", "42"]] if queued else [])
    [given] = calls(tmp_path, "srun")
    at = given.index("mllm-jax")
    assert {word.partition("=")[0].removeprefix("--") for word in given[:at]} <= set(PUBLIC["srun"])
    assert given[at:] == ["mllm-jax", "train", *ARGUMENTS, "--out", "/scratch/me/runs/mine", "--data-root", "/scratch/me/data"]


def test_the_script_outlives_the_signal_that_is_for_the_run(tmp_path):
    done = bash(tmp_path, batch(), commands={"srun": "kill -TERM $PPID; sleep 0.2; exit 75", "scontrol": ""}, SLURM_JOB_ID="42")
    assert done.returncode == 0 and calls(tmp_path, "scontrol") == [["requeue", "42"]]


# --- queued resources -----------------------------------------------------------------------------------------------


def gcloud_faults(given: list[str]) -> list[str]:
    """Words of a call of gcloud that its reference does not know."""
    command = next((c for c in PUBLIC["gcloud"] if given[: len(c.split())] == c.split()), None)
    if command is None:
        return [" ".join(given)]
    words = [w for w in given if w.startswith("--")]
    return [w for w in words if w.partition("=")[0].removeprefix("--") not in PUBLIC["gcloud"][command]]


@pytest.mark.parametrize("layout", TPUS)
def test_a_queued_resource_is_asked_for_as_the_reference_says(layout, tmp_path):
    text = tpu_vm.write(job(layout, spot=True, service_account="a@b"))
    show = 'for w in "$@"; do case $w in *startup-script=*) cat "${w##*startup-script=}" ;; esac; done'
    done = bash(tmp_path, text, "create", commands={"gcloud": show})
    assert done.returncode == 0, done.stderr
    rm, create = calls(tmp_path, "gcloud")
    assert rm == ["storage", "rm", "gs://my-bucket/runs/mine.ended"] and not gcloud_faults(rm) + gcloud_faults(create)
    chip, chips, slices = machine(layout)
    assert f"--accelerator-type={tpu_vm.accelerator(chip, chips)}" in create and "--spot" in create and "--zone=us-east5-b" in create
    assert ("--node-id=mine" in create) == (slices == 1) and (f"--node-count={slices}" in create) == (slices > 1)
    assert done.stdout == bash(tmp_path, text, "startup", commands={}).stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert ("MLLM_JAX_CLUSTER=tpu" in done.stdout) == (job(layout).hosts * slices > 1)


def test_a_misspelt_flag_of_gcloud_is_found():
    right = ["compute", "tpus", "queued-resources", "create", "x", "--node-id=a", "--spot"]
    assert not gcloud_faults(right) and gcloud_faults([*right, "--nodeid=a"]) == ["--nodeid=a"] and gcloud_faults(["compute", "tpu", "create"])


@pytest.mark.parametrize(("codes", "ended"), [((0,), 0), ((75, 137, 0), 0), ((75, 2), 2), ((1,), 1), ((75,) * 4, 75)])
def test_a_machine_runs_the_container_until_its_exit_code_is_final(codes, ended, tmp_path):
    text = bash(tmp_path, tpu_vm.write(job("v5e-16x2", restarts=3)), "startup", commands={}).stdout.replace("/bucket", f"{tmp_path}/bucket")
    count = f'n=$(grep -c "^run" {tmp_path}/docker.calls); codes=({" ".join(map(str, codes))})'
    stand_ins = {"docker": f'[ "$1" = run ] || exit 0\n{count}\nexit ${{codes[$((n-1))]}}', "gcsfuse": "", "mountpoint": "exit 1", "gcloud": "",
                 "sleep": ""}
    done = bash(tmp_path, text, commands=stand_ins)
    assert (tmp_path / "bucket" / "runs" / "mine.ended").read_text() == f"{ended}\n", done.stderr
    ran = [c for c in calls(tmp_path, "docker") if c[0] == "run"]
    assert len(ran) == len(codes) and all(c == ran[0] for c in ran)
    assert ran[0][ran[0].index("us-docker.pkg.dev/p/r/mllm:1") + 1:] == [w.replace("/bucket", f"{tmp_path}/bucket") for w in COMMAND]
    assert calls(tmp_path, "gcsfuse") == [
        ["--implicit-dirs", "--rename-dir-limit=200000", "--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0",
         "-o", "allow_other", "my-bucket", f"{tmp_path}/bucket"]]
    assert not [f for c in calls(tmp_path, "gcloud") for f in gcloud_faults(c)]
    again = bash(tmp_path, text, commands=stand_ins)                # booted again after the end
    assert again.returncode == 0 and len([c for c in calls(tmp_path, "docker") if c[0] == "run"]) == len(codes)


def test_a_slice_that_was_taken_back_is_asked_for_again_and_an_ended_run_gives_it_back(tmp_path):
    states = "ACTIVE SUSPENDED WAITING_FOR_RESOURCES ACTIVE"
    body = f"""
case "$*" in
  *describe*) s=({states}); n=$(grep -c describe {tmp_path}/gcloud.calls); echo "${{s[$((n-1))]}}" ;;
  *"storage cat"*) [ $(grep -c describe {tmp_path}/gcloud.calls) -ge 4 ] && echo 0 || exit 1 ;;
esac"""
    done = bash(tmp_path, tpu_vm.write(job(spot=True)), "watch", commands={"gcloud": body}, EVERY="0")
    assert done.returncode == 0 and "mine ended with exit code 0" in done.stdout, done.stderr
    made = calls(tmp_path, "gcloud")
    assert not [f for c in made for f in gcloud_faults(c)]
    what = [c[3] if c[0] == "compute" else c[1] for c in made]
    assert what == ["describe", "cat", "describe", "cat", "delete", "create", "describe", "cat", "describe", "cat", "delete"]


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [gke.write, tpu_vm.write, slurm.write])
def test_machines_of_another_kind_are_refused_with_a_way_out(write):
    with pytest.raises(ConfigError, match="skypilot"):
        write(job("h100-8" if write is not slurm.write else "v5e-64"))


@pytest.mark.parametrize(("change", "says"), [
    ({"name": "Mine"}, "--name is 'Mine'; a name has at most 40"), ({"name": "a" * 41}, "at most 40"), ({"bucket": "a/b"}, "and no path"),
    ({"machine": machine("cpu-8")}, "names no machine that can be rented"),
])
def test_what_no_cluster_would_take_is_one_line(change, says):
    check(job())
    with pytest.raises(ConfigError, match=says):
        check(replace(job(), **change))


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "pods").glob("*.md")), ids=lambda p: p.name)
def test_commands_of_google_on_a_page_are_in_the_reference(page):
    blocks = re.findall(r"^```text\n(.*?)^```", page.read_text().replace("\\\n", " "), re.M | re.S)
    found = [shlex.split(c) for c in re.findall(r"^gcloud .*?(?=&&|$)|(?<=&& )gcloud .*?(?=&&|$)", "\n".join(blocks), re.M)]
    found = [words[: words.index("#")] if "#" in words else words for words in found]
    assert not [fault for words in found for fault in gcloud_faults(words[1:])]
    assert found or page.name in ("README.md", "slurm.md")
