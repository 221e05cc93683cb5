"""A task for SkyPilot (https://docs.skypilot.co), for `sky jobs launch`: it finds machines, and finds others when they are taken.

The project is copied from the working directory and installed on each machine.  TPU slices are one "node" to SkyPilot, however
many machines they have; GPU machines are a node each.  What surprises: it starts one TPU slice, not several.
"""

import json
from textwrap import indent

from mllm_jax.config import ConfigError
from mllm_jax.launch.clusters import tpu_vm
from mllm_jax.launch.clusters.job import AGAIN, MOUNT, Job

GPUS = {"a100": "A100-80GB", "h100": "H100", "h200": "H200"}
PORT = 8476

# Each machine is one process of jax, which sees all of its devices.
JOIN = f"""\
  export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"
  export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""


def write(job: Job) -> str:
    """The task.

    Raises:
      ConfigError: several TPU slices.
    """
    chip, chips, slices = job.machine
    tpu = chip in tpu_vm.TYPES
    if tpu and slices > 1:
        raise ConfigError(f"SkyPilot starts one TPU slice and {slices} are asked for; use launch gke or tpu-vm")
    environment = tpu_vm.environment(job) if tpu else job.environment
    where = "gcp" + (f"/{job.zone.rsplit('-', 1)[0]}/{job.zone}" if job.zone else "") if tpu or job.zone else "*"
    if tpu:
        wanted = (f"accelerators: tpu-{tpu_vm.accelerator(chip, chips)}\n"
                  f"  accelerator_args: {{tpu_vm: true, runtime_version: {tpu_vm.TYPES[chip][1]}}}")
    else:
        wanted = f"accelerators: {GPUS[chip]}:{chips}"
    lines = "\n".join(f"  {k}: {json.dumps(v)}" for k, v in environment.items())
    join = JOIN if not tpu and slices > 1 else ""
    return f"""\
# {job.name}: {slices} x {chip}-{chips}.  sky jobs launch FILE; docs/pods/skypilot.md is the whole way there and back.
name: {job.name}
num_nodes: {1 if tpu else slices}
workdir: .                              # the project itself

resources:
  infra: {json.dumps(where)}
  {wanted}
  use_spot: {json.dumps(job.spot)}
  disk_size: 200
  job_recovery:
    recover_on_exit_codes: [{AGAIN}]            # asked to stop, or a process was lost: new machines, same run
    max_restarts_on_errors: 0           # any other error is looked at by a person

file_mounts:
  {MOUNT}:
    source: gs://{job.bucket}
    mode: MOUNT

envs:
{lines}

setup: |
  conda activate mllm_jax || {{ conda create --quiet --yes --name mllm_jax python=3.11 && conda activate mllm_jax; }}
  pip install --quiet -e ".[{'tpu' if tpu else 'gpu'}]"

run: |
  conda activate mllm_jax
{join}{indent(job.shell, "  ")}
"""
