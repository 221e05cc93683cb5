"""Cycles of the attention kernels on TPU chips, counted in the instructions that the compiler schedules.

    python benchmarks/flash_cycles.py --topology v5e:2x2 v6e:2x2 --width 128

For a pair of blocks of queries and keys: instructions where all is seen, where a mask is made, and in brackets the cycles of its
products at the peak of the chip, below which no pair comes, since the matrix units make instructions wait; then the instructions
around the pairs, which run for each block of queries, and those for each block of keys, which run once for a head: rotations are
among both.  With these, the cycles of one head of a causal row.  No TPU is needed, but `pip install mllm_jax[plan]`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from mllm_jax.chips import CHIPS
from mllm_jax.nn.flash import block_of
from mllm_jax.plan.topology import topology

PRODUCTS = {"fwd": 2, "bwd": 5}


def compile_one(name: str, width: int, length: int) -> None:
    """Values and gradients for more rows of rotated heads than fast memory holds; run in a process of its own, which leaves schedules behind."""
    import jax
    import jax.numpy as jnp

    from mllm_jax.nn.flash import attend_flash
    from mllm_jax.nn.position import Rope
    from mllm_jax.nn.visibility import Visibility
    from mllm_jax.plan.topology import not_kept
    from mllm_jax.sharding import Layout, rows, use

    layout = Layout(mesh={"data": 1})
    mesh = layout.make_mesh(list(topology(name).devices[:1]))
    where = rows(mesh)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        order = jnp.broadcast_to(jnp.arange(length), (4, length))
        sees = Visibility(segments=segments, order=order, key_segments=segments, key_order=order)
        rotation = Rope()(jnp.broadcast_to(order[..., None], (4, length, 3)), width)
        return jnp.sum(attend_flash(q, k, v, sees, scale=width**-0.5, rotation=rotation) ** 2)

    qkv = [array(jnp.bfloat16, 4, length, 32, width)] * 3
    with use(layout, mesh), not_kept():
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(*qkv, array(jnp.int32, 4, length)).compile()


def schedule(text: str) -> dict[str, int]:
    """Instructions of each part of a kernel, from the listing of its bundles: its loops follow one another, that over pairs has two branches."""
    lines = [(int(m[1], 16), m[2], m[3], m[4]) for m in re.finditer(r"^ *(0x[0-9a-f]+) *(\w\w)?: *(>*) *(.*)$", text, re.M)]
    inner = [(at, mark, line) for at, mark, depth, line in lines if depth == ">>"]
    ends = [at for at, mark, _ in inner if mark == "PF"]
    begins = [max(at for at, _, line in inner if at < end and "sbr.rel" in line) for end in ends]
    return {"whole": ends[0] - begins[0], "part": ends[1] - begins[1], "around": sum(depth == ">" for *_, depth, _ in lines),
            "keys": sum(not begins[0] <= at <= ends[1] for at, *_ in inner)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2"])
    parser.add_argument("--width", type=int, nargs="+", default=[128])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_one(args.topology[0], args.width[0], args.length)
        return
    for name in args.topology:
        chip = CHIPS[name.partition(":")[0]]
        for width in args.width:
            with tempfile.TemporaryDirectory() as folder:
                flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
                one = ["--compile", "--topology", name, "--width", str(width), "--length", str(args.length)]
                done = subprocess.run([sys.executable, __file__, *one], env=os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
                                      capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                for kind, products in PRODUCTS.items():
                    [listing] = [p for p in Path(folder).iterdir() if re.search(rf"flash_{kind}.*\d-final_bundles", p.name)]
                    cost, block = schedule(listing.read_text()), block_of(args.length)
                    n, least = args.length // block, 2 * products * block**2 * width * chip.clock * chip.cores / chip.peak
                    wait = lambda part: max(cost[part], least)
                    head = n * (n - 1) // 2 * wait("whole") + n * (wait("part") + cost["around"] + cost["keys"])
                    print(f"{name} width {width} {kind}: whole {cost['whole']}, part {cost['part']} ({least:.0f}), around {cost['around']} "
                          f"and {cost['keys']}; a causal head of {args.length} positions: {head:.0f} cycles, "
                          f"{head / (n * (n + 1) // 2) * (512 / block) ** 2:.0f} a pair of 512", flush=True)


if __name__ == "__main__":
    main()
