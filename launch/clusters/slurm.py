"""A batch script for SLURM, for `sbatch`: GPU machines with a file system that all of them see.

One process a GPU: that is how jax reads SLURM's variables.  When the job's time ends, or a job of more weight wants the machines,
SLURM sends SIGTERM; the run saves and ends with 75, and the script puts the job back into the queue.  What surprises: `srun` ends
with the highest exit code of its processes, so a process that was killed (above 128) hides the 75 of the others; both
mean the same here.
"""

import shlex

from mllm_jax.chips import GPUS
from mllm_jax.config import ConfigError
from mllm_jax.launch.clusters.job import AGAIN, GRACE, Job


def write(job: Job) -> str:
    """The script.

    Raises:
      ConfigError: the layout is not one of GPUs.
    """
    chip, chips, slices = job.machine
    if chip not in GPUS:
        raise ConfigError(f"launch slurm writes files for GPUs ({', '.join(GPUS)}); for {chip} use gke, tpu-vm or skypilot")
    chosen = [f"--{k}={job.options[k]}" for k in ("partition", "account", "time", "constraint") if k in job.options]
    lines = "".join(f"#SBATCH {option}\n" for option in chosen)
    exports = "\n".join(f"export {k}={shlex.quote(v)}" for k, v in job.environment.items())
    return f"""\
#!/usr/bin/env bash
# {job.name}: {slices} x {chips} {chip}.  sbatch FILE; docs/pods/slurm.md is the whole way there and back.
#SBATCH --job-name={job.name}
#SBATCH --nodes={slices}
#SBATCH --ntasks-per-node={chips}
#SBATCH --gpus-per-node={chips}
#SBATCH --exclusive
{lines}#SBATCH --requeue
#SBATCH --signal=TERM@{GRACE}
#SBATCH --open-mode=append
#SBATCH --output={job.name}-%j.log
set -uo pipefail

{exports}

trap : TERM                             # is for the processes of the run; this script waits for them
srun --kill-on-bad-exit=0 --cpu-bind=none --label \\
  {job.shell}
code=$?
echo "attempt ${{SLURM_RESTART_COUNT:-0}} ended with exit code $code"
if [ $code -eq {AGAIN} ] || [ $code -gt 128 ]; then      # saved and left, or lost a process: the same run goes on later
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
fi
exit $code
"""
