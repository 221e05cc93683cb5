"""Memory of training a vision transformer of Gemma 3's size, 27 layers of 1152 at 4096 patches, as compiled for TPU chips.

    python benchmarks/vit_memory.py --topology v5e:2x4 --images 1 4

Prints the temporaries per chip of a forward and backward pass in bfloat16 with layers computed again, by the kernel of
nn/flash.py and by XLA.  No TPU is needed, but `pip install mllm_jax[plan]`.  Exits non-zero where the kernel takes more than 1.1 GiB
for one image or 2.4 for four.
"""

import argparse
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.encoders import vit
from mllm_jax.nn.param import axes_of, merge, split
from mllm_jax.plan.topology import topology
from mllm_jax.sharding import Layout, rows, sharding_of, use
from mllm_jax.types import Media

LIMITS = {1: 1.1, 4: 2.4}               # GiB


def compiled(name: str, images: int, layout: Layout, depth: int) -> jax.stages.Compiled:
    """The gradient of all parameters, for a row of so many images on each chip."""
    cfg = replace(vit.SIGLIP_SO400M_224, grid=64, pool="none", depth=depth)
    mesh = layout.make_mesh(list(topology(name).devices))
    b, p = mesh.size, cfg.grid**2
    with use(layout, mesh):
        module = nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
        graph, params = split(module)
        axes = axes_of(module)
        params = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(axes[k], x.shape, layout, mesh)) for k, x in params.items()}
        array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows(mesh))
        media = Media(values=array(jnp.uint8, b, images, p, cfg.patch_dim), coords=array(jnp.int32, b, images, p, 3),
                      mask=array(bool, b, images), slot=array(jnp.int32, b, 1))
        loss = lambda params, media: jnp.mean(merge(graph, params)(media).tokens.astype(jnp.float32) ** 2)
        where = {k: x.sharding for k, x in params.items()}
        return jax.jit(jax.grad(loss), out_shardings=where).lower(params, media).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--depth", type=int, default=27, help="fewer layers compile no faster, but show what one layer keeps")
    parser.add_argument("--attention", nargs="+", default=["flash", "xla"])
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    missed = False
    for attention in args.attention:
        for images in args.images:
            start = time.time()
            layout = Layout(mesh={"data": 1, "fsdp": -1}, dtype="bfloat16", remat="full", attention=attention)
            memory = compiled(args.topology, images, layout, args.depth).memory_analysis()
            gib = memory.temp_size_in_bytes / 2**30
            missed |= attention == "flash" and gib > LIMITS.get(images, float("inf"))
            print(f"{args.topology} {attention} images={images} depth={args.depth}: {gib:.2f} GiB of temporaries per chip, "
                  f"compiled in {time.time() - start:.0f} s", flush=True)
    sys.exit(missed)


if __name__ == "__main__":
    main()
