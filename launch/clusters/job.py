"""A run to be started somewhere: what the templates of all clusters ask for.

A run keeps everything in one folder, which all processes see: a bucket that is mounted, or a shared file system.  Exit codes say
what is to be done next: 0 done; 1 and 2 a person must look, and starting again would end the same; 75, or killed: start again.
"""

import re
import shlex
from dataclasses import field

from mllm_jax.chips import CHIPS, TPUS, shape_of
from mllm_jax.config import RESTART, ConfigError, config
from mllm_jax.launch.layouts import Machine

FINAL = (1, 2)                          # exit codes that a restart would not mend
AGAIN = RESTART                         # of a run that was asked to stop, or lost a process
GRACE = 300                             # s to save in after SIGTERM; a machine that is taken back may give less
MOUNT = "/bucket"                       # where the bucket is, inside a container
# How it is mounted.  A checkpoint is a folder that gets its name when it is whole, and gcsfuse renames none that is not empty unless it may;
# and what one machine wrote another looks for at once, so nobody may remember that it was not there.
FUSE = {"file-system": {"rename-dir-limit": 200_000}, "metadata-cache": {"ttl-secs": 0, "negative-ttl-secs": 0}}


@config
class Job:
    name: str                           # lower case, digits, dashes
    arguments: tuple[str, ...]          # of `mllm-jax train`, without folders
    machine: Machine
    folder: str = f"{MOUNT}/runs"       # of all runs
    data: str = f"{MOUNT}/data"         # what paths of data sets begin at
    image: str = ""                     # a container with mllm_jax in it
    bucket: str = ""                    # without gs://
    project: str = ""
    zone: str = ""
    service_account: str = ""
    spot: bool = False
    restarts: int = 100
    options: dict[str, str] = field(default_factory=dict)       # of one kind of cluster alone: {"partition": "gpu"}

    @property
    def command(self) -> tuple[str, ...]:
        return ("mllm-jax", "train", *self.arguments, "--out", f"{self.folder}/{self.name}", "--data-root", self.data)

    @property
    def environment(self) -> dict[str, str]:
        """Compiled programs and weights are kept beside the runs, so that a restart finds them.

        The platform is named, or jax would go on with the processors where the chips cannot be opened.
        """
        parent = self.folder.rsplit("/", 1)[0]
        platform = "tpu" if self.machine.chip in TPUS else "cuda"
        return {"JAX_PLATFORMS": f"{platform},cpu", "JAX_COMPILATION_CACHE_DIR": f"{parent}/xla", "HF_HOME": f"{parent}/huggingface",
                "PYTHONUNBUFFERED": "1"}

    @property
    def shell(self) -> str:
        """The command as a shell reads it, an option a line."""
        lines, line = [], []
        for word in self.command:
            if word.startswith("--") and line:
                lines, line = [*lines, shlex.join(line)], []
            line.append(word)
        return " \\\n  ".join([*lines, shlex.join(line)])

    @property
    def shape(self) -> str:
        return shape_of(self.machine.chip, self.machine.chips)

    @property
    def hosts(self) -> int:
        """Machines of one slice."""
        return -(-self.machine.chips // CHIPS[self.machine.chip].per_host)


def check(job: Job) -> None:
    """Raises ConfigError for a name or a bucket that no cluster would take."""
    # Names of pods are NAME-slice-job-0-15-abcde, of at most 63 letters.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", job.name):
        raise ConfigError(f"--name is {job.name!r}; a name has at most 40 lower-case letters, digits and dashes, a letter first")
    if job.bucket and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", job.bucket):
        raise ConfigError(f"--bucket is {job.bucket!r}; give the name of a bucket of Cloud Storage, such as my-training, and no path")
    if job.machine.chip not in CHIPS:
        raise ConfigError(f"a layout of {job.machine.chip} names no machine that can be rented; "
                          f"choose one of {', '.join(CHIPS)}, such as v5e-64")
