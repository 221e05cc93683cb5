"""What must be settled before and around a program: environment, compiler cache, other processes, signals.

`start` is called once, before jax is imported: the environment is read when jax and its worker threads come
up.  Nothing here changes what a program computes.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mllm_jax.config import RESTART, Restart
from mllm_jax.launch import layout_file

MEBIBYTE = 1 << 20

# Decoding images allocates and frees a few megabytes each time.  With glibc's defaults that is a system call and
# a page fault for every page; with these the memory is kept (measured: 1.2 to 2 x as many images per second).
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(256 * MEBIBYTE),
    "MALLOC_TRIM_THRESHOLD_": str(512 * MEBIBYTE),
    "PILLOW_BLOCKS_MAX": "64",
    "OMP_NUM_THREADS": "1",             # numpy and OpenCV in workers; XLA has threads of its own
    "TOKENIZERS_PARALLELISM": "false",  # its threads do not survive the fork of a worker
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "GRPC_VERBOSITY": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
# Compiling a step for a CPU takes two thirds of the time without XLA's newer emitters of fused loops (siglip --tiny: 12.7 s and
# 18.9 s; first/digits: 7.9 s and 10.3 s), and the step takes as long.  A jaxlib that does not know a flag refuses to start.
LOOPS, KNOWN_TO = "--xla_cpu_use_fusion_emitters", "0.10."
# Importing and tracing make hundreds of thousands of objects that stay.  Looking through them all after every 700, as Python does,
# takes a fifth of the time that the imports of a training run take (3.1 and 4.0 s).
GARBAGE = (50_000, 20, 20)
HEARTBEAT = 60                          # s without a sign of life until a process is taken for dead, and the others end
PR_SET_PDEATHSIG = 1                    # number of prctl(2)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # numbers of mallopt(3)
QUIET = {
    # Orbax writes each layer of a failure here, tens of lines, and raises it too: then it is told in one.
    "absl": logging.CRITICAL,
    **dict.fromkeys(("orbax", "jax", "transformers", "grain", "tensorboardX"), logging.ERROR),
}


class Runtime(NamedTuple):
    """What was started: this process's place among the others, and whether it was asked to end."""

    process: int
    processes: int
    cluster: str | None
    stop: threading.Event               # set by SIGTERM: save and end


def huge_pages() -> None:
    """Starts this process anew with large memory pages, which glibc gives only from the start.

    A step allocates and frees hundreds of megabytes.  With pages of 4 KiB the system spends as long on page faults
    as the processor on the step: training of first/digits took 1.7 times as long (190 and 111 ms a step).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables or not sys.executable:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def supervise() -> None:
    """Goes on in a child of this process, which waits for it and says how it ended.

    When another process of the run dies, or the coordinator does, jax ends this one by abort, from C++, where no line of ours is
    said and no exit code is ours.  The parent says that line and exits with the code that restarts.
    """
    sys.stdout.flush()
    child = os.fork()
    if not child:
        # Should the parent be killed, the child must not hold the machine's devices.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # a terminal sends it to both
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        why = {signal.SIGABRT: "another process has died or cannot be reached", signal.SIGKILL: "often for want of memory"}
        print(f"mllm-jax: signal {-code} ended this process: {why.get(-code, 'nobody asked it to')}; "
              "run again to go on from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(RESTART if code < 0 else code)


def start(
    platform: str | None = None,
    *,
    cache: bool | Path = True,
    distributed: bool | None = None,
    cpu_devices: int = 1,
    verbose: bool = False,
) -> Runtime:
    """Prepares this process; `platform` ("cpu", "tpu", "cuda") and other settings yield to the environment's own.

    `cache`: compiled programs are kept in ~/.cache/mllm_jax, or in the folder given, and found again by the next
    run.  `distributed`: None means that other processes are joined where a cluster's variables are set.

    Raises:
      Restart: a device cannot be opened, or the other processes do not come.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    keep_memory()
    gc.set_threshold(*GARBAGE)
    if platform is not None:
        os.environ.setdefault("JAX_PLATFORMS", platform)
    flags = os.environ.get("XLA_FLAGS", "")
    if LOOPS not in flags and importlib.metadata.version("jaxlib").startswith(KNOWN_TO):
        flags = os.environ["XLA_FLAGS"] = f"{flags} {LOOPS}=false".strip()
    if cpu_devices > 1 and "host_platform_device_count" not in flags:
        if "jax" in sys.modules and sys.modules["jax"].config.jax_num_cpu_devices < cpu_devices:
            sys.modules["jax"].config.update("jax_num_cpu_devices", cpu_devices)
        else:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={cpu_devices}".strip()
    if not verbose:
        quiet()

    import jax

    if cache:
        folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or (cache_folder() if cache is True else cache))
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    found = cluster(os.environ)
    try:
        if distributed or (distributed is None and found):
            join(found)
        process, processes = jax.process_index(), jax.process_count()           # opens the devices
    except RuntimeError as error:       # no fault of the run: a process that is late, or chips that another one still holds
        raise Restart(f"the devices or the other processes cannot be reached: {' '.join(str(error).split())}") from error
    return Runtime(process=process, processes=processes, cluster=found, stop=on_sigterm())


def pretended_devices(layout: str) -> int:
    """How many CPU devices a layout of this name or file asks for: 8 if it is "cpu-8" or "cpu-4x2", 0 if it is one of real ones.

    Found without jax, which must not be imported before its environment is set.
    """
    if path := layout_file.path_of(layout):
        on = layout_file.read(path)["machine"]
        return on["chips"] * on.get("slices", 1) if on["chip"] == "cpu" else 0
    of = re.match(r"cpu-(\d+)(?:x(\d+))?", layout)
    return int(of[1]) * int(of[2] or 1) if of else 0


def age() -> float:
    """Seconds since this process began, before Python could look at a clock; 0 where the system does not say."""
    try:
        after_boot = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]     # field 22, in ticks
        return float(Path("/proc/uptime").read_text().split()[0]) - int(after_boot) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):       # not Linux
        return 0.0


def quiet() -> None:
    """Leaves to libraries only what no other line will say."""
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")            # it sets its level when it is imported
    # The Hub says what it waits for when the network is gone, a minute long; once is enough.
    logging.getLogger("huggingface_hub").propagate = False
    warnings.filterwarnings("ignore", module=r"(jax|flax|orbax|grain|transformers|tensorboardX)\b")
    # What is under way when a checkpoint cannot be read or written is dropped half done.
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    tell = sys.unraisablehook
    late = lambda error: str(error) == "Event loop is closed" or isinstance(getattr(error, "__cause__", None), GeneratorExit)
    sys.unraisablehook = lambda args: None if late(args.exc_value) else tell(args)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_jax" / "xla"


def keep_memory() -> bool:
    """The MALLOC_* settings for this very process, which read its environment before Python ran."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):        # not glibc
        return False
    done = mallopt(M_MMAP_THRESHOLD, int(os.environ["MALLOC_MMAP_THRESHOLD_"]))
    return bool(mallopt(M_TRIM_THRESHOLD, int(os.environ["MALLOC_TRIM_THRESHOLD_"])) and done)


def cluster(env: Mapping[str, str]) -> str | None:
    """Which launcher started several processes, by the variables that it sets; None for a single process.

    MLLM_JAX_CLUSTER=tpu says it of TPU machines without a cluster, which know each other from their metadata server alone.
    """
    if env.get("MLLM_JAX_CLUSTER"):
        return env["MLLM_JAX_CLUSTER"]
    many = lambda name: env.get(name, "").isdigit() and int(env[name]) > 1
    if env.get("JAX_COORDINATOR_ADDRESS") and many("JAX_NUM_PROCESSES"):
        return "jax"
    if env.get("SLURM_JOB_ID") and many("SLURM_NTASKS") and env.get("SLURM_PROCID"):
        return "slurm"
    if many("OMPI_COMM_WORLD_SIZE"):
        return "mpi"
    if env.get("MEGASCALE_COORDINATOR_ADDRESS") or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return "tpu"
    return None


def join(found: str | None) -> None:
    """Joins the other processes; jax knows Slurm, MPI and TPU pods by itself.

    MLLM_JAX_HEARTBEAT: seconds without a sign of life until a process is taken for dead.
    """
    import jax

    seconds = int(os.environ.get("MLLM_JAX_HEARTBEAT", HEARTBEAT))
    if found == "jax":
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
            heartbeat_timeout_seconds=seconds,
        )
    else:
        jax.distributed.initialize(heartbeat_timeout_seconds=seconds)


def on_sigterm() -> threading.Event:
    """An event that SIGTERM sets, the polite way in which machines are taken back; another one ends the process.

    A launcher that signals every process and a parent that passes it on make two at once, which count as one.
    """
    stop, first = threading.Event(), []
    if threading.current_thread() is not threading.main_thread():
        return stop

    def handler(*_: object) -> None:
        stop.set()
        first.append(time.monotonic())
        if first[-1] - first[0] > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, handler)
    return stop
