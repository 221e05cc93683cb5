"""Memory of looking up embeddings and of their gradient, as compiled for TPU chips.

    python benchmarks/lookup_memory.py

A table of 262,144 tokens of width 2560 (Gemma 3's), split over all chips, 4096 tokens on each; 8 and 256 chips.  Prints the
temporaries per chip beside the chip's part of the table.  No TPU is needed, but `pip install mllm_jax[plan]`.  Exits non-zero
where they are more than twice that part and 0.5 GiB.
"""

import sys
import time

import jax
import jax.numpy as jnp

from mllm_jax.chips import GIB
from mllm_jax.nn.lookup import lookup
from mllm_jax.plan.topology import not_kept, topology
from mllm_jax.sharding import Layout, rows, sharding_of_parameter, use

REST = 0.5                              # GiB beside the gradient, in the two layouts that it comes in


def program(name: str, tokens: int = 262_144, width: int = 2560, length: int = 4096) -> jax.stages.Lowered:
    """The rows, and the gradient of the table."""
    layout = Layout(mesh={"fsdp": -1}, dtype="bfloat16")
    mesh = layout.make_mesh(list(topology(name).devices))
    where = sharding_of_parameter(("vocab", "embed"), (tokens, width), layout, mesh)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((mesh.size, length, *shape), dtype, sharding=rows(mesh))
    table = jax.ShapeDtypeStruct((tokens, width), jnp.float32, sharding=where)

    def both(table: jax.Array, index: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        found, back = jax.vjp(lambda table: lookup(table, index, "vocab", jnp.bfloat16), table)
        return found, *back(grad)

    with use(layout, mesh):
        return jax.jit(both, out_shardings=(rows(mesh), where)).lower(table, array(jnp.int32), array(jnp.bfloat16, width))


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    missed = False
    for name, chips in (("v5e:2x4", 8), ("v5e:16x16", 256)):
        start = time.time()
        with not_kept():
            gib = program(name).compile().memory_analysis().temp_size_in_bytes / GIB
        part = 262_144 * 2560 * 4 / chips / GIB
        missed |= gib > 2 * part + REST
        print(f"{name}: {gib:.3f} GiB of temporaries a chip, of a table of 2.5 GiB {part:.3f}; compiled in {time.time() - start:.0f} s", flush=True)
    sys.exit(missed)


if __name__ == "__main__":
    main()
