"""Storage that fails: what passes, how often it is tried again, and what is said of it; on all hosts alike."""

import errno
import shutil
import sys
from pathlib import Path
from typing import Any

import jax

from mllm_jax.hosts import agree, gather

# Of a device or a network, which may come back; what is missing or full of nonsense does not.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ECONNRESET, errno.EBUSY,
           errno.EAGAIN, errno.ENOLCK, errno.EMFILE, errno.ENFILE, errno.EREMOTEIO}

WAITED = ("DEADLINE_EXCEEDED", "ChainedFuture")         # what a host says that has waited for another one: jax, and Orbax


def passing(error: BaseException | None) -> bool:
    """Whether somewhere below it is a fault of storage that may pass."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in PASSING:
            return True
        error = error.__cause__ or error.__context__
    return False


def pauses(patience: float) -> list[float]:
    """1, 2, 4 ... 60, 60 seconds, together at most `patience`; a fixed list, so that all hosts try as often."""
    out: list[float] = []
    while sum(out) + (pause := min(2.0 ** len(out), 60.0)) <= patience:
        out.append(pause)
    return out


def anywhere(error: Exception | None) -> str:
    """The reason of the first host that has an error, on all of them; "" if none has.  Having waited for another host is no reason."""
    whys = filter(None, gather("" if error is None else cause(error)))
    return min(whys, key=lambda why: any(word in why for word in WAITED), default="")


def tell(text: str) -> None:
    if jax.process_index() == 0:
        print(f"mllm-jax: {text}", file=sys.stderr, flush=True)


def cause(error: BaseException) -> str:
    """The innermost message: Orbax wraps the reason in several layers that only say that something failed."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def check_room(folder: Path, tree: Any) -> None:
    """Refuses, on all hosts, to begin a checkpoint that the disk of one cannot hold."""
    need = sum(x.nbytes for x in jax.tree.leaves(tree)) // jax.process_count()
    free = shutil.disk_usage(folder).free
    agree(None if free >= need else OSError(errno.ENOSPC, f"{need / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB are free"))
