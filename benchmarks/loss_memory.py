"""Memory of the losses that see a whole vocabulary or a whole batch, as compiled for TPU chips.

    python benchmarks/loss_memory.py [head pairs]

    head    cross-entropy over 262,144 tokens of width 2560, 4096 positions a chip, on 8 chips of v5e and v6e, and where a
            quarter of the positions is trained (`Data.trained`); the matrix lies split over the chips
    pairs   the sigmoid and the softmax loss of pairs of width 1152, 8192 rows a chip, on 16, 64 and 256 chips of v5e

Prints the temporaries per chip of the loss and all its gradients.  No TPU is needed, but `pip install mllm_jax[plan]`.
Exits non-zero where the head takes more than 0.5 GiB, or pairs more than 0.6 or more on more chips.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mllm_jax.chips import GIB
from mllm_jax.objectives import InfoNCE, NextToken, Sigmoid
from mllm_jax.objectives.base import Objective
from mllm_jax.plan.topology import not_kept, topology
from mllm_jax.sharding import Layout, rows, sharding_of, use
from mllm_jax.types import Batch, Outputs

HEAD, PAIRS = 0.5, 0.6                  # GiB


def head(name: str, trained: int | None = None, tokens: int = 262_144, width: int = 2560, positions: int = 4096) -> jax.stages.Lowered:
    """The gradients to hidden states and matrix."""
    layout = Layout(mesh={"data": 1, "fsdp": -1, "tensor": 1}, dtype="bfloat16")
    mesh = layout.make_mesh(list(topology(name).devices))
    matrix = sharding_of(("embed", "vocab"), (width, tokens), layout, mesh)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=rows(mesh))
    hidden, unembed = array(jnp.bfloat16, positions, width), jax.ShapeDtypeStruct((width, tokens), jnp.float32, sharding=matrix)
    where = (hidden.sharding, matrix)

    def loss(hidden: jax.Array, unembed: jax.Array, batch: Batch) -> jax.Array:
        return NextToken().score(Outputs(hidden=hidden, unembed=unembed), batch)["loss"].value

    batch = batch_of(array, positions, trained)
    with use(layout, mesh):
        return jax.jit(jax.grad(loss, (0, 1)), out_shardings=where).lower(hidden, unembed, batch)


def pairs(name: str, objective: Objective, each: int = 8192, width: int = 1152) -> jax.stages.Lowered:
    """The gradients to both embeddings, scale and bias, of so many rows on each chip."""
    layout = Layout(mesh={"data": 1, "fsdp": -1, "tensor": 1})
    mesh = layout.make_mesh(list(topology(name).devices))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((mesh.size * each, *shape), dtype, sharding=rows(mesh))
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, batch: Batch) -> jax.Array:
        scores = objective.score(Outputs(embeds={"image": image, "text": text}, scale=scale, bias=bias), batch)
        return scores["loss"].value, scores["recall@1"].value

    unit = array(jnp.float32, width)
    with use(layout, mesh):
        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True)).lower(unit, unit, one, one, batch_of(array, 1, None))


def batch_of(array, positions: int, trained: int | None) -> Batch:
    number = array(jnp.int32, positions)
    return Batch(tokens=number, targets=number, weights=array(jnp.float32, positions), segments=number, positions=array(jnp.int32, positions, 3),
                 kinds=number, trained=trained and array(jnp.int32, trained))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="{head,pairs}", help="both by default")
    what = parser.parse_args().what or ["head", "pairs"]
    jax.config.update("jax_platforms", "cpu")
    missed = False

    def show(line: str, run, *args) -> float:
        start = time.time()
        with not_kept():
            gib = run(*args).compile().memory_analysis().temp_size_in_bytes / GIB
        print(f"{line}: {gib:.3f} GiB of temporaries a chip, compiled in {time.time() - start:.0f} s", flush=True)
        return gib

    if "head" in what:
        for name in ("v5e:2x4", "v6e:2x4"):
            for trained in (None, 1024):
                missed |= show(f"head {name}, {trained or 4096} of 4096 positions trained", head, name, trained) > HEAD
    if "pairs" in what:
        for title, objective in (("sigmoid", Sigmoid()), ("softmax", InfoNCE())):
            gib = [show(f"{title} {name}", pairs, name, objective) for name in ("v5e:4x4", "v5e:8x8", "v5e:16x16")]
            missed |= max(gib) > PAIRS or max(gib) > 1.01 * gib[0]
    sys.exit(missed)


if __name__ == "__main__":
    main()
