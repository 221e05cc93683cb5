"""From a fresh machine to a result, with nothing but Python: makes an environment, installs, runs.

    python3 launch/fresh.py first           trains first/digits, in .venv-first
    python3 launch/fresh.py test            runs the tests, in .venv-test

Neither needs the other.  What follows is passed on: `first --out runs/mine`, `test tests/nn -k rotary`.
Only the standard library is used here, and nothing newer than Python 3.8, which may start it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDS = (3, 11)
VERBS = {
    # name: (environment, extras, command inside it)
    "first": (".venv-first", "", ["-m", "mllm_jax.cli", "train", "first/digits"]),
    "test": (".venv-test", "[test]", ["-m", "pytest", "-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]),
}


def main(argv):
    if not argv or argv[0] not in VERBS:
        print(__doc__.strip())
        return 0 if argv[:1] in ([], ["-h"], ["--help"]) else 2
    folder, extras, command = VERBS[argv[0]]
    python = environment(ROOT / folder, extras)
    return subprocess.call([str(python), *command, *argv[1:]], cwd=str(ROOT))


def environment(folder, extras):
    """The Python of an environment that has the package and its extras; made only if it is not there yet."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = folder / "installed"
    wanted = hashlib.sha256((ROOT / "setup.py").read_bytes() + extras.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing into {folder.name} (once; some minutes)", file=sys.stderr, flush=True)
    if folder.exists():
        shutil.rmtree(str(folder))
    subprocess.check_call([suitable_python(), "-m", "venv", str(folder)])
    subprocess.check_call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", str(ROOT) + extras])
    stamp.write_text(wanted)
    return python


def suitable_python():
    """This Python if it is new enough, otherwise the newest one on the path that is."""
    if sys.version_info[:2] >= NEEDS:
        return sys.executable
    for minor in range(14, NEEDS[1] - 1, -1):
        if found := shutil.which(f"python3.{minor}"):
            return found
    needed, have = (".".join(map(str, v)) for v in (NEEDS, sys.version_info[:2]))
    sys.exit(f"fresh.py: Python {needed} or later is needed; this is {have} and there is no other on the path")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit("fresh.py: this command failed: {}".format(" ".join(error.cmd)))
