"""Seconds that a training step takes to be traced and compiled, for every stage of every recipe in miniature, on one core.

    python benchmarks/compile_time.py                     all recipes
    python benchmarks/compile_time.py experts/moe_llava   some

Each recipe has a process of its own, bound to one core, without a cache of compiled programs.  What is printed is processor
time, which on one core is what a clock shows where nothing else runs.  Exits non-zero above 15 s.
"""

import argparse
import json
import os
import subprocess
import sys
import time

WANTED = 15.0


def stages(name: str) -> dict[str, tuple[float, float]]:
    """{stage: seconds of tracing, seconds of compiling} in this process."""
    from mllm_jax.launch import runtime

    runtime.start("cpu", cache=False)

    import jax

    from mllm_jax import sharding
    from mllm_jax.commands.describe import Planned, batch_of
    from mllm_jax.config import load
    from mllm_jax.sharding import Layout
    from mllm_jax.train.optimizer import build
    from mllm_jax.train.state import abstract_state
    from mllm_jax.train.step import make_step

    recipe, layout, out = load(name).tiny(), Layout(mesh={"data": 1}), {}
    jax.jit(lambda x: x + 1).lower(1.0).compile()               # what the first program pays for all
    for title, stage in recipe.stages.items():
        with sharding.use(layout, layout.make_mesh(jax.devices()[:1])):
            planned = Planned(recipe, title)
            optimizer = build(stage.optimizer, stage.steps, sorted(planned.trained))
            state = abstract_state(planned.blueprint, planned.trained, optimizer, ema=stage.ema is not None)
            step = jax.jit(make_step(planned.blueprint.graph, stage.objectives, optimizer, ema=stage.ema), donate_argnums=0)
            batch = batch_of(planned)                           # the first one imports the tokenizers
            began = time.process_time()
            lowered = step.lower(state, batch, jax.random.key(0))
            traced = time.process_time()
            lowered.compile()
            out[title] = traced - began, time.process_time() - traced
    return out


def child(name: str, core: int) -> dict[str, tuple[float, float]]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = ["taskset", "-c", str(core), sys.executable, __file__, "--here", name]
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    from mllm_jax.config import recipe_names

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="chapter/system, with knobs after a colon; all by default")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="number of the core; the first by default")
    parser.add_argument("--here", action="store_true", help="in this process, as JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(stages(args.recipes[0])))
        return
    print("| recipe | stage | traced | compiled | together |\n| --- | --- | ---: | ---: | ---: |")
    worst = 0.0
    for name in args.recipes or recipe_names():
        for title, (trace, compiled) in child(name, args.core).items():
            worst = max(worst, trace + compiled)
            print(f"| {name} | {title} | {trace:.1f} s | {compiled:.1f} s | {trace + compiled:.1f} s |", flush=True)
    sys.exit(worst > WANTED)


if __name__ == "__main__":
    main()
