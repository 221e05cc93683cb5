"""Cycles of the attention kernels on TPU chips, counted in the instructions that the compiler schedules.

    python benchmarks/flash_cycles.py --topology v5e:2x2 v6e:2x2 --width 128

For a pair of blocks of queries and keys: instructions where all is seen, where a mask is made, and in brackets the cycles of its
products at the peak of the chip, below which no pair comes, since the matrix units make instructions wait; then the instructions
around the pairs, which run for each block of queries (forward), or most of them for each head (backward).  With these, the cycles
of one head of a causal row.  No TPU is needed, but `pip install mllm_jax[plan]`.
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
    """Values and gradients for one row of two heads; run in a process of its own, which leaves the schedules in a folder."""
    import jax
    import jax.numpy as jnp

    from mllm_jax.nn.flash import attend_flash
    from mllm_jax.nn.visibility import Visibility

    where = jax.sharding.SingleDeviceSharding(topology(name).devices[0])
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        order = jnp.arange(length)[None]
        sees = Visibility(segments=segments, order=order, key_segments=segments, key_order=order)
        return jnp.sum(attend_flash(q, k, v, sees, scale=1.0) ** 2)

    qkv = [array(jnp.bfloat16, 1, length, 2, width)] * 3
    jax.jit(jax.grad(loss, (0, 1, 2))).lower(*qkv, array(jnp.int32, 1, length)).compile()


def schedule(text: str) -> dict[str, int]:
    """Instructions of each part of a kernel, from the listing of its bundles: two branches in its inner loop."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"^ *(0x[0-9a-f]+) *(.*)$", text, re.M)]
    inner = [(at, line) for at, line in lines if re.match(r"(\w\w)?: *>> ", line)]
    jumps = [at for at, line in inner if "sbr.rel" in line]
    ends = [at for at, line in inner if re.match(r"PF: *>>", line)]
    outer = [at for at, line in lines if re.match(r"(\w\w)?: *> ", line)]
    return {"whole": ends[0] - jumps[0], "part": ends[1] - jumps[1], "around": len(outer)}


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
                    head = n * (n - 1) // 2 * wait("whole") + n * wait("part") + cost["around"] * (n if kind == "fwd" else 1)
                    print(f"{name} width {width} {kind}: whole {cost['whole']}, part {cost['part']} ({least:.0f}), around {cost['around']}; "
                          f"a causal head of {args.length} positions: {head:.0f} cycles", flush=True)


if __name__ == "__main__":
    main()
