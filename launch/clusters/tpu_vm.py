"""A shell script around queued resources of Cloud TPU: `create`, `watch`, `log`, `delete`, all with `gcloud`.

Each machine runs a start-up script, on every boot: it mounts the bucket, and runs the container until that ends with a final exit
code, which it leaves in the bucket.  `watch` looks there every minute: a run that has ended is deleted with its machines, for they
cost as long as they stand; a spot slice that was taken back leaves its queued resource SUSPENDED, which is deleted and asked for
again, and the run goes on from its checkpoint.  What surprises: when `watch` itself is stopped, nobody deletes the machines.
"""

import shlex
from textwrap import indent

from mllm_jax.config import ConfigError
from mllm_jax.launch.clusters.job import FINAL, FUSE, GRACE, MOUNT, Job

# chip -> (accelerator type, with the number in its name; software of the machine)
TYPES = {
    "v4": (lambda chips: f"v4-{2 * chips}", "tpu-ubuntu2204-base"),
    "v5e": (lambda chips: f"v5litepod-{chips}", "v2-alpha-tpuv5-lite"),
    "v5p": (lambda chips: f"v5p-{2 * chips}", "v2-alpha-tpuv5"),
    "v6e": (lambda chips: f"v6e-{chips}", "v2-alpha-tpuv6e"),
}


def accelerator(chip: str, chips: int) -> str:
    """The accelerator type of a slice; v4 and v5p count cores, of which a chip has two."""
    return TYPES[chip][0](chips)


def environment(job: Job) -> dict[str, str]:
    """TPU machines say who they are in their metadata and not in the environment; several are told to look there."""
    return job.environment | ({"MLLM_JAX_CLUSTER": "tpu"} if job.hosts * job.machine.slices > 1 else {})


def write(job: Job) -> str:
    """The script, for `bash`.

    Raises:
      ConfigError: the layout is not one of TPUs.
    """
    chip, chips, slices = job.machine
    if chip not in TYPES:
        raise ConfigError(f"launch tpu-vm writes files for TPUs ({', '.join(TYPES)}); for {chip} use skypilot or slurm")
    nodes = '--node-id="$NAME"' if slices == 1 else f'--node-count={slices} --node-prefix="$NAME"'
    more = [*(["--spot"] if job.spot else []), *([f"--service-account={job.service_account}"] if job.service_account else [])]
    # As flags, groups are a part of the name, but for the oldest one.
    mount = " ".join(f"--{k if group == 'file-system' else f'{group}-{k}'}={v}" for group, of in FUSE.items() for k, v in of.items())
    given = " \\\n    ".join(f"--env={shlex.quote(f'{k}={v}')}" for k, v in environment(job).items())
    return f"""\
#!/usr/bin/env bash
# {job.name}: {slices} x {chip} {job.shape} ({chips} chips each) as a queued resource.
#   bash FILE create | watch | log | delete        docs/pods/tpu-vm.md is the whole way there and back
set -euo pipefail

NAME={shlex.quote(job.name)}
WHERE=(--project={shlex.quote(job.project)} --zone={shlex.quote(job.zone)})
ENDED={shlex.quote(f"gs://{job.bucket}/runs/{job.name}.ended")}

startup() {{
  cat <<'STARTUP'
#!/usr/bin/env bash
# On every machine, on every boot, as root.
set -uo pipefail

if ! command -v gcsfuse; then
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \\
    > /etc/apt/sources.list.d/gcsfuse.list
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg > /usr/share/keyrings/cloud.google.asc
  apt-get update && apt-get install -y gcsfuse
fi
mkdir -p {MOUNT}
mountpoint -q {MOUNT} || gcsfuse --implicit-dirs {mount} -o allow_other {shlex.quote(job.bucket)} {MOUNT} || exit 1
mkdir -p {MOUNT}/runs
[ -e {MOUNT}/runs/{job.name}.ended ] && exit 0       # this boot came after the end

gcloud auth configure-docker --quiet {shlex.quote(job.image.split("/")[0])}
for attempt in $(seq 0 {job.restarts}); do
  docker rm -f {job.name} 2>/dev/null
  # SIGTERM comes when the machine is taken back; then there is time to save.
  docker run --name {job.name} --privileged --net=host --shm-size=16g --stop-timeout={GRACE} -v {MOUNT}:{MOUNT} \\
    {given} \\
    {shlex.quote(job.image)} \\
{indent(job.shell, "  ")}
  code=$?
  echo "attempt $attempt ended with exit code $code"
  case $code in
    0|{"|".join(map(str, FINAL))}) break ;;             # done, or a person must look
  esac
  sleep 10
done
echo $code > {MOUNT}/runs/{job.name}.ended
STARTUP
}}

create() {{
  gcloud storage rm "$ENDED" 2>/dev/null || true
  request
}}

request() {{
  local script
  script=$(mktemp)
  startup > "$script"
  gcloud compute tpus queued-resources create "$NAME" "${{WHERE[@]}}" {nodes} \\
    --accelerator-type={accelerator(chip, chips)} --runtime-version={TYPES[chip][1]} \\
    {" ".join([*more, '--metadata-from-file=startup-script="$script"'])}
  rm "$script"
}}

state() {{
  gcloud compute tpus queued-resources describe "$NAME" "${{WHERE[@]}}" --format="value(state.state)"
}}

delete() {{
  gcloud compute tpus queued-resources delete "$NAME" "${{WHERE[@]}}" --force --quiet
}}

watch() {{
  while true; do
    now=$(state)
    echo "$(date -u +%FT%TZ) $NAME $now"
    if code=$(gcloud storage cat "$ENDED" 2>/dev/null); then
      echo "$NAME ended with exit code $code"
      delete
      exit "$code"
    fi
    case $now in
      SUSPENDED|FAILED) delete; request ;;
    esac
    sleep "${{EVERY:-60}}"
  done
}}

log() {{
  gcloud compute tpus queued-resources ssh "$NAME" "${{WHERE[@]}}" --node=0 --worker=0 --command="sudo docker logs -f --tail=100 $NAME"
}}

case "${{1:-}}" in
  create|state|watch|log|delete|startup) "$1" ;;
  *) echo "usage: bash $0 create | state | watch | log | delete | startup" >&2; exit 2 ;;
esac
"""
