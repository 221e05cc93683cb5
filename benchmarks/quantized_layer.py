"""What eight bits give and cost a layer: the feed-forward layer of Llama-2 7B, forward and backward, compiled for TPUs that are not here.

    python benchmarks/quantized_layer.py v5e v6e --chips 1 4

One chip shows products and rounding; several, that share the parameters, what is gathered.  Two rows of 2048 tokens a chip.  Times are
those of the estimator of plans (mllm_jax/plan/estimate.py): products by the compiler's cycles, the rest by the bytes that it moves.
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax import sharding
from mllm_jax.chips import CHIPS
from mllm_jax.decoders.transformer import LLAMA
from mllm_jax.nn.mlp import MLP
from mllm_jax.nn.param import axes_of, merge, split
from mllm_jax.plan.estimate import Estimate, Replay
from mllm_jax.plan.executable import hlo_text
from mllm_jax.plan.hlo import Hlo
from mllm_jax.plan.network import Network
from mllm_jax.plan.topology import topology
from mllm_jax.sharding import Layout

TOKENS = 2, 2048                        # rows of a chip, and their length
SMALLEST = {2: "2x2", 3: "2x2x1"}       # slices of four chips, by the sides of a torus


class Half(nnx.Module):
    """The second half of a transformer layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.mlp = LLAMA.norm.build(LLAMA.width, rngs=rngs), MLP(LLAMA, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.norm(x))


def measure(kind: str, chips: int, quantize: str) -> Estimate:
    on = topology(f"{kind}:{SMALLEST[CHIPS[kind].dims]}")
    layout = Layout(mesh={"fsdp": chips}, dtype="bfloat16", quantize=quantize)
    mesh = layout.make_mesh(list(on.devices)[:chips])
    module = nnx.eval_shape(lambda: Half(nnx.Rngs(0)))
    graph, shapes = split(module)
    axes = axes_of(module)
    where = {k: sharding.sharding_of_parameter(axes[k], v.shape, layout, mesh) for k, v in shapes.items()}
    params = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where[k]) for k, v in shapes.items()}
    rows, length = TOKENS
    x = jax.ShapeDtypeStruct((rows * chips, length, LLAMA.width), jnp.bfloat16, sharding=sharding.rows(mesh))

    def run(params: dict, x: jax.Array, grad: jax.Array) -> tuple:
        y, pull = jax.vjp(lambda params, x: merge(graph, params)(x), params, x)
        return y, pull(grad)

    with sharding.use(layout, mesh):
        compiled = jax.jit(run, out_shardings=(x.sharding, (where, x.sharding))).lower(params, x, x).compile()
    network = Network(on.chip, [(*d.coords, 0) for d in mesh.devices.flat], mesh.shape)
    return Replay(Hlo(hlo_text(compiled)), on.chip, network).out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["v5e"])
    parser.add_argument("--chips", nargs="*", type=int, default=[1, 4], choices=[1, 4])
    args = parser.parse_args()
    print("| chip | chips | layer in | ms | products | their TFLOP/s | rounding and the rest | waiting for ICI | gathered, MB |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind in args.kinds:
        for chips in args.chips:
            for quantize in ("none", "int8"):
                e = measure(kind, chips, quantize)
                spent = e.by_kind()
                products, wires = spent["matmul"], spent.get("wait ici", 0.0)
                gathered = sum(t.bytes for (what, _), t in e.traffic.items() if what == "all-gather") / 1e6
                print(f"| {kind} | {chips} | {'bfloat16' if quantize == 'none' else quantize} | {1e3 * e.seconds:.2f} | {1e3 * products:.2f} | "
                      f"{e.flops / products / 1e12:.0f} | {1e3 * (e.seconds - products - wires):.2f} | {1e3 * wires:.2f} | {gathered:.0f} |",
                      flush=True)


if __name__ == "__main__":
    main()
