"""The launch verb: a file on the output, or one line that says what to change."""

from dataclasses import replace

import pytest
import yaml

from mllm_jax.cli import main
from mllm_jax.launch import layouts
from mllm_jax.launch.layouts import LAYOUTS

BASE = ["projector/llava_15", "--layout", "v6e-64", "--image", "i/m", "--bucket", "gs://my-bucket"]


def test_the_file_is_printed_and_nothing_else(capsys):
    assert main(["launch", "gke", *BASE, "--spot", "stages.instruct.optimizer.lr=1e-5", "--stages", "instruct", "--save-every", "50",
                 "--profile", "20:5"]) == 0
    out = capsys.readouterr()
    made = yaml.safe_load(out.out)
    assert made["metadata"]["name"] == "projector-llava-15" and not out.err
    [container] = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == [
        "mllm-jax", "train", "projector/llava_15", "stages.instruct.optimizer.lr=1e-5", "--layout", "v6e-64", "--stages", "instruct",
        "--save-every", "50", "--profile", "20:5", "--out", "/bucket/runs/projector-llava-15", "--data-root", "/bucket/data"]


def test_a_layout_of_a_file_is_written_out(capsys, tmp_path):
    """The file is here, and not on the machines."""
    path = tmp_path / "found.json"
    layouts.write(path, replace(layouts.LAYOUTS["v6e-64"], remat="qkv+attention"), layouts.machine("v6e-64"), "projector/llava_15",
                  ("stages.align.data.seq_len=1024",))
    assert main(["launch", "gke", "projector/llava_15", "--layout", str(path), *BASE[3:]]) == 0
    out = capsys.readouterr().out
    assert '"stages.align.data.seq_len=1024"' in out and "found" not in out
    said = next(word.strip(' -"') for word in out.splitlines() if '"auto:' in word)
    assert layouts.find(said, "tpu") == layouts.find(str(path), "tpu")


def test_folders_of_slurm_are_where_they_are_asked_for(capsys):
    assert main(["launch", "slurm", "projector/llava_15", "--layout", "h100-8x4", "--folder", "/scratch/me/", "--partition", "gpu"]) == 0
    out = capsys.readouterr().out
    assert "--out /scratch/me/runs/projector-llava-15" in out and "#SBATCH --partition=gpu\n" in out
    assert "JAX_COMPILATION_CACHE_DIR=/scratch/me/xla" in out


@pytest.mark.parametrize(("argv", "says"), [
    (["launch", "gk", *BASE], "no kind of cluster is called 'gk'; nearest: gke"),
    (["launch", "gke", "projector/llava_15", "--layout", "v6e-64"], "launch gke needs --image and --bucket"),
    (["launch", "gke", *BASE, "--partition", "x"], "launch gke has no use for --partition; it takes --image, --bucket, --spot"),
    (["launch", "gke", *BASE[:2], "v6-64", *BASE[3:]], "no layout is called 'v6-64'; nearest: v6e-64"),
    (["launch", "gke", "projector/lava_15", *BASE[1:]], "llava_15"),
    (["launch", "gke", *BASE, "stages.instruct.optimizer.lrr=1"], "nearest: lr"),
    (["launch", "gke", *BASE, "--stages", "instrct"], "nearest: instruct"),
    (["launch", "gke", *BASE[:2], "v6e-256", *BASE[3:]], "data.batch_size=256, or a smaller layout"),
    (["launch", "gke", *BASE[:2], "v6e-64:mesh.tensor=2", *BASE[3:]], "does not fit 64 devices; change the layout's mesh sizes so that they"),
    (["launch", "gke", *BASE[:2], "cpu-8", *BASE[3:]], "a layout of cpu names no machine that can be rented"),
    (["launch", "gke", *BASE, "--profile", "20"], "--profile is '20'; write STEP:N"),
    (["launch", "gke", *BASE, "--name", "My_Run"], "--name is 'My_Run'"),
    (["launch", "gke", *BASE, "--spt"], "nearest: --spot"),
])
def test_a_mistake_is_one_line_and_exit_code_2(argv, says, capsys):
    assert main(argv) == 2
    out = capsys.readouterr()
    assert says in out.err and out.err.count("\n") == 1 and not out.out


def test_a_mesh_that_takes_the_rest_is_counted(capsys):
    argv = ["launch", "gke", *BASE[:2], "v6e-64:mesh.tensor=2,mesh.fsdp=-1", *BASE[3:]]
    assert main(argv) == 0 and "v6e-64" in LAYOUTS
    assert '"v6e-64:mesh.tensor=2,mesh.fsdp=-1"' in capsys.readouterr().out
