"""Convolutional connectors: neighbouring patches are mixed before, while or after they become fewer.

C-Abstractor    RegNet blocks, an average over windows, RegNet blocks, an MLP: Honeybee (arXiv:2312.06742, section 3.2), MM1
LDP             MLP, then two inverted residuals of MobileNetV3, the second with stride 2: MobileVLM (arXiv:2312.16886)
LDPv2           MLP, an average over windows, a depthwise convolution added: MobileVLM V2 (arXiv:2402.03766)

Norms are over the channels of each pixel, with the 1e-5 of the `timm` that the official code pins.  A 1x1 convolution
is a linear layer, so only 3x3 depthwise ones are left.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import config
from mllm_jax.connectors.items import check_square, join_grids, split_grids
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.pool import average_weights, resample
from mllm_jax.nn import stack
from mllm_jax.nn.param import LayerNorm, Linear, normal, param, zeros
from mllm_jax.nn.position import interpolate
from mllm_jax.sharding import compute_dtype, constrain
from mllm_jax.types import Features, Grid

Activation = Callable[[jax.Array], jax.Array]
# Channels stay whole between linear layers: with rows over two axes of a mesh and channels over a third, XLA's gradient
# through what mixes neighbours is wrong, and in silence (tests/connectors/test_conv.py).
WHOLE = "item row column embed_act"


@config
class CAbstractorConfig:
    grid: int                           # side of the encoder's grid
    to: int                             # side of the grid of tokens
    width: int = 1024                   # channels of the blocks
    depth: int = 3                      # blocks before the average, and as many after it
    readout: MLPConfig = MLPConfig(depth=2, activation="silu")
    table: int | None = None            # side of the stored table of positions, where it is not `grid`

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "CAbstractor":
        return CAbstractor(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        return check_square(grid, self.grid, "C-Abstractor"), self.to, self.to

    def tiny(self) -> "CAbstractorConfig":
        return replace(self, grid=4, to=2, width=32, depth=1, table=None)       # a block has 14 arrays, and each takes time to compile


class CAbstractor(nnx.Module):
    def __init__(self, cfg: CAbstractorConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.position = param(rngs, ((cfg.table or cfg.grid) ** 2, d_in), "position embed", normal(0.02))
        self.before = RegStage(d_in, cfg.width, cfg.depth, rngs=rngs)
        self.after = RegStage(cfg.width, cfg.width, cfg.depth, rngs=rngs)
        self.readout = cfg.readout.build(cfg.width, d_out, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        """f[b (i r c) d_in] -> f[b (i to to) d_out]."""
        grid, to = self.cfg.grid, self.cfg.to
        y = split_grids(x, grid)
        y = y + interpolate(self.position[...], grid).reshape(grid, grid, -1).astype(y.dtype)
        y = resample(self.before(y), average_weights(grid, to))
        return self.readout(join_grids(self.after(y), x))


class RegStage(nnx.Module):
    """RegNet blocks (arXiv:2003.13678), the first of which fits the channels: f[n r c d_in] -> f[n r c d]."""

    def __init__(self, d_in: int, d: int, depth: int, *, rngs: nnx.Rngs):
        self.first = RegBlock(d_in, d, rngs=rngs)
        self.blocks = stack.make([lambda r: RegBlock(d, d, rngs=r)], depth - 1, rngs=rngs) if depth > 1 else None
        self.depth = depth

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        if self.blocks is None:
            return x
        return stack.run(self.blocks, lambda x, block, *_: (block(x), None), x, depth=self.depth - 1)[0]


class RegBlock(nnx.Module):
    def __init__(self, d_in: int, d: int, *, rngs: nnx.Rngs):
        norm = lambda: LayerNorm().build(d, rngs=rngs)
        self.conv1, self.norm1 = Linear(d_in, d, "embed mlp", bias=False, rngs=rngs), norm()
        self.conv2, self.norm2 = Depthwise(d, rngs=rngs), norm()
        # A quarter of what comes into the block, and not of its own channels: so does RegNet.
        self.excite = Excite(d, round(d_in / 4), rngs=rngs)
        self.conv3, self.norm3 = Linear(d, d, "embed mlp", bias=False, rngs=rngs), norm()
        self.shortcut = Linear(d_in, d, "embed mlp", bias=False, rngs=rngs) if d_in != d else None
        self.shortcut_norm = norm() if d_in != d else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = constrain(x, WHOLE)
        y = jax.nn.silu(self.norm1(self.conv1(x)))
        y = jax.nn.silu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(self.excite(y, jax.nn.silu, jax.nn.sigmoid)))
        return constrain(jax.nn.silu(y + (x if self.shortcut is None else self.shortcut_norm(self.shortcut(x)))), WHOLE)


@config
class LDPConfig:
    """Half as many tokens along each side."""

    grid: int                           # side of the encoder's grid

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "LDP":
        return LDP(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        return check_square(grid, self.grid, "LDP"), -(-self.grid // 2), -(-self.grid // 2)

    def tiny(self) -> "LDPConfig":
        return replace(self, grid=4)


class LDP(nnx.Module):
    def __init__(self, cfg: LDPConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.mlp = MLPConfig(depth=2).build(d_in, d_out, rngs=rngs)
        self.mix = MobileBlock(d_out, stride=1, rngs=rngs)
        self.halve = MobileBlock(d_out, stride=2, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        """f[b (i r c) d_in] -> f[b (i r/2 c/2) d_out]."""
        y = split_grids(self.mlp(x), self.cfg.grid)
        return join_grids(self.halve(y + self.mix(y)), x)


class MobileBlock(nnx.Module):
    """The inverted residual of MobileNetV3 (arXiv:1905.02244) without expansion and without its shortcut."""

    def __init__(self, d: int, *, stride: int, rngs: nnx.Rngs):
        self.depthwise = Depthwise(d, stride=stride, rngs=rngs)
        self.norm1 = LayerNorm().build(d, rngs=rngs)
        self.excite = Excite(d, eighths(d // 4), rngs=rngs)
        self.pointwise = Linear(d, d, "embed mlp", bias=False, rngs=rngs)
        self.norm2 = LayerNorm().build(d, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.hard_swish(self.norm1(self.depthwise(x)))
        return self.norm2(self.pointwise(self.excite(y, jax.nn.relu, jax.nn.hard_sigmoid)))


@config
class LDPv2Config:
    grid: int                           # side of the encoder's grid
    to: int                             # side of the grid of tokens

    def build(self, d_in: int, d_out: int, *, rngs: nnx.Rngs) -> "LDPv2":
        return LDPv2(self, d_in, d_out, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        return check_square(grid, self.grid, "LDPv2"), self.to, self.to

    def tiny(self) -> "LDPv2Config":
        return replace(self, grid=4, to=2)


class LDPv2(nnx.Module):
    def __init__(self, cfg: LDPv2Config, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.mlp = MLPConfig(depth=2).build(d_in, d_out, rngs=rngs)
        # Says where a token stands (PEG, arXiv:2102.10882): the padding at the border makes it differ from the inside.
        self.position = Depthwise(d_out, bias=True, rngs=rngs)

    def __call__(self, x: Features) -> Features:
        """f[b (i r c) d_in] -> f[b (i to to) d_out]."""
        y = resample(split_grids(self.mlp(x), self.cfg.grid), average_weights(self.cfg.grid, self.cfg.to))
        return join_grids(y + self.position(y), x)


class Depthwise(nnx.Module):
    """A 3x3 convolution of each channel apart, padded with one zero: f[n r c d] -> f[n r/stride c/stride d]."""

    def __init__(self, d: int, *, stride: int = 1, bias: bool = False, rngs: nnx.Rngs):
        self.kernel = param(rngs, (3, 3, d), "row column embed", normal(1 / 3))
        self.bias = param(rngs, (d,), "embed", zeros) if bias else None
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        # Nine shifted products: the gradient of the kernel of a grouped convolution is wrong there too.
        dtype, k = compute_dtype(), self.stride
        rows, columns = (-(-n // k) for n in x.shape[1:3])
        # Gathered first: the partitioner would take the channels of the kernel for those of the output, and replicate that.
        kernel = constrain(self.kernel[...].astype(dtype), "row column embed_act")
        wide = jnp.pad(constrain(x.astype(dtype), WHOLE), ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = sum(wide[:, r : r + k * rows : k, c : c + k * columns : k] * kernel[r, c] for r in range(3) for c in range(3))
        return y if self.bias is None else y + self.bias[...].astype(dtype)


class Excite(nnx.Module):
    """Each channel times what a small MLP makes of the means of all (squeeze and excitation, arXiv:1709.01507)."""

    def __init__(self, d: int, hidden: int, *, rngs: nnx.Rngs):
        self.down = Linear(d, hidden, "embed mlp", rngs=rngs)
        self.up = Linear(hidden, d, "mlp embed", rngs=rngs)

    def __call__(self, x: jax.Array, inner: Activation, gate: Activation) -> jax.Array:
        means = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
        return constrain(x * gate(self.up(inner(self.down(means)))), WHOLE)


def eighths(n: int) -> int:
    """The multiple of 8 nearest to n, but no less than nine tenths of it (MobileNet's `_make_divisible`)."""
    near = max(8, (n + 4) // 8 * 8)
    return near if near >= 0.9 * n else near + 8
