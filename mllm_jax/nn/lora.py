"""Low-rank adapters as a change of a model (LoRA, arXiv:2106.09685).

`LoRA(model=cfg, targets=("decoder/*",))` builds the model of `cfg` and puts an adapter beside the kernel
of each `Linear` whose path matches.  The wrapped model runs as before; `merge_adapters` folds the
adapters into the kernels for export.
"""

import math
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.nn.fusion import project
from mllm_jax.nn.param import Linear, Params, normal, param, zeros
from mllm_jax.sharding import compute_dtype

LEAVES = ("lora/a", "lora/b")


@config
class LoRA:
    """A model with adapters; train them with `train=("*/lora/*",)`."""

    model: Any
    rank: int
    alpha: float
    targets: tuple[str, ...]            # globs over the paths of Linear layers

    def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
        module = self.model.build(rngs=rngs)
        found = 0
        for path, layer in list(nnx.iter_modules(module)):
            if isinstance(layer, Linear) and any(fnmatch("/".join(map(str, path)), t) for t in self.targets):
                layer.lora = Adapter(layer, self.rank, self.alpha, rngs=rngs)
                found += 1
        if not found:
            raise ConfigError(f"no Linear layer matches the LoRA targets {self.targets}")
        return module

    def tiny(self) -> "LoRA":
        return replace(self, model=self.model.tiny(), rank=2)

    def __getattr__(self, name: str) -> Any:
        # What is asked of the model beyond building it (inputs, decoder, ...) is that of the wrapped one.
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)


class Adapter(nnx.Module):
    """x -> alpha / rank * (x A) B; B starts at zero, so that the model starts unchanged."""

    def __init__(self, layer: Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        shape, axes, n = layer.kernel[...].shape, layer.kernel.get_metadata()["axes"], layer.inputs
        stacked, inner = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes):]
        self.inputs, self.scale = n, alpha / rank
        self.a = _stacked(rngs, stacked, (*inner[:n], rank), (*axes[:n], "rank"), normal(math.prod(inner[:n]) ** -0.5))
        self.b = _stacked(rngs, stacked, (rank, *inner[n:]), ("rank", *axes[n:]), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = compute_dtype()
        y = project(x, self.a[...].astype(dtype), self.inputs)
        return project(y, self.b[...].astype(dtype)) * self.scale


def _stacked(rngs: nnx.Rngs, stacked: tuple[int, ...], shape: tuple[int, ...], axes: tuple[str, ...], init) -> nnx.Param:
    """A parameter with the leading layer axis of the kernel it changes, which has no name."""
    p = param(rngs, stacked + shape, " ".join(("layers",) * len(stacked) + axes), init)
    return nnx.Param(p[...], axes=axes)


def merge_adapters(params: Params, rank: int, alpha: float) -> Params:
    """The parameters of the plain model whose kernels include the adapters: W + alpha / rank * A B."""
    out = {k: v for k, v in params.items() if not k.endswith(LEAVES)}
    for name in (k.removesuffix("lora/a") for k in params if k.endswith("lora/a")):
        a, b, kernel = (params[name + leaf] for leaf in ("lora/a", "lora/b", "kernel"))
        stacked = a.ndim + b.ndim - 2 - kernel.ndim             # 1 for a stack of layers
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1)) if stacked else (lambda a, b: jnp.tensordot(a, b, 1))
        out[name + "kernel"] = kernel + alpha / rank * product(a, b)
    return out
