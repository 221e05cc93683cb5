"""A plan without machine code: what XLA's passes make of a step, which is all that memory and schedule depend on.

Nine tenths of a compile are spent on the instructions of each fusion, after buffers have their places and operations their
order.  The compiler writes both down where it is asked for a dump; from there on this process has no use for it.  It cannot be
stopped, so the passes run in a process of their own, which ends once it has read them.  What is missed: the cycles that the
compiler expects of each product (plan/estimate.py takes a part of the peak), and the size of the code.
"""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

from mllm_jax.config import ConfigError
from mllm_jax.plan import program as programs
from mllm_jax.plan.executable import Sizes
from mllm_jax.plan.report import Options, Plan, plan_of
from mllm_jax.plan.topology import Topology, topology
from mllm_jax.recipe import Recipe
from mllm_jax.sharding import Layout

LAST = "*.jit_*.after_optimizations_after_buffer_assignment.txt"          # of what is written before machine code is made
BUFFERS = "*.jit_*.after_optimizations-buffer-assignment.txt"
PAUSE = 0.05                            # s between two looks


def quick(name: str, recipe: Recipe, stage: str | None, on: Topology, layout: Layout, options: Options = Options()) -> Plan:
    """`plan`, in seconds.

    Raises:
      ConfigError: as `plan` does.
      RuntimeError: the compiler gave up, for another reason than memory.
    """
    asked = pickle.dumps((name, recipe, recipe.stage_name(stage), (on.name, on.slices), layout, options))
    env = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "mllm_jax.plan.passes"], input=asked, capture_output=True, env=env)
    said = done.stderr.decode(errors="replace")
    if done.returncode:
        raise RuntimeError("\n".join([f"the compiler ended with code {done.returncode}:", *said.strip().splitlines()[-8:]]))
    print(said, end="", file=sys.stderr)
    answer = pickle.loads(done.stdout)
    if isinstance(answer, str):
        raise ConfigError(answer)
    return replace(answer, on=on)


def passes(program: programs.Program) -> programs.Compiled:
    """What `compile` gives but for the executable.  The compiler goes on in a thread: end the process soon."""
    began, folder, failed = time.monotonic(), Path(tempfile.mkdtemp(prefix="passes-")), []
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    lowered = program.lowered

    def run() -> None:
        try:
            lowered.compile(compiler_options=options)
        except BaseException as error:
            failed.append(error)

    compiler = Thread(target=run, name="compiler", daemon=True)
    compiler.start()
    try:
        ended, text = False, ""
        while not text and not ended:
            time.sleep(PAUSE)
            ended, text = not compiler.is_alive(), _read(folder)        # in this order: what was written before the end is read
        refusal = programs.refused(failed[0]) if failed and not text else ""
        sizes = None if refusal else Sizes.of_dump(next(folder.glob(BUFFERS)).read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return programs.Compiled(program=program, executable=None, text=text, sizes=sizes, refusal=refusal, seconds=time.monotonic() - began)


def _read(folder: Path) -> str:
    """The module, once it is there to its end."""
    text = next((f.read_text() for f in folder.glob(LAST)), "")
    return text if "\nENTRY " in text and text.rstrip().endswith("\n}") else ""


def main() -> None:
    """Answers one `quick`, and ends with the compiler under way."""
    asked, answers = sys.stdin.buffer.read(), os.dup(1)
    os.dup2(2, 1)                       # nothing else is printed among the answer
    name, recipe, stage, where, layout, options = pickle.loads(asked)
    try:
        on = topology(*where)
        program = programs.lower(recipe, stage, layout, list(on.devices))
        answer: Plan | str = replace(plan_of(name, stage, on, program, options, passes(program)), on=None)
    except ConfigError as error:
        answer = str(error)
    with os.fdopen(answers, "wb") as out:
        pickle.dump(answer, out)
    os._exit(0)


if __name__ == "__main__":
    main()
