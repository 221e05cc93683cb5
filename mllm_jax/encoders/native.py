"""Vision transformer for images and videos of any size (Qwen2-VL, arXiv:2409.12191; 2.5, arXiv:2502.13923; Qwen3-VL).

It reads the packed layout of types.Media: patches of all items of a row one after another, each with its place.  A
patch spans two moments, an image shows one twice.  Patches see those of their own frame only; positions are rotary,
over rows and columns.  What came later are values here: windows of attention with a few layers that see the whole frame
(2.5), a learned table resampled to the grid of each item, and levels of earlier layers for the decoder (3).

No scores of a whole row exist (nn/blockwise.py): in long rows a layer costs what its frames cost; a window layer costs
the rows of windows that its blocks touch, which follow one another in a row of patches.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import config
from mllm_jax.encoders.vit import CLIP_MEAN, CLIP_STD, HALF, normalize
from mllm_jax.nn import stack
from mllm_jax.nn.block import Block
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.lookup import lookup
from mllm_jax.nn.param import LayerNorm, Linear, RMSNorm, normal, param
from mllm_jax.nn.position import Rope
from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import constrain
from mllm_jax.types import Features, Grid, Media


@config
class NativeViTConfig(BlockConfig):
    patch: int                          # side of a patch in pixels
    depth: int
    steps: int = 2                      # moments that a patch spans
    channels: int = 3
    mean: tuple[float, ...] = CLIP_MEAN                         # of each channel of pixels in [0, 1]
    std: tuple[float, ...] = CLIP_STD
    patch_bias: bool = False
    positions: int | None = None        # side of a learned table of positions beside the rotary ones
    window: int | None = None           # side in patches of the squares in which most layers attend; None: all see the frame
    full: tuple[int, ...] = ()          # with windows: the layers that see the frame
    deep: tuple[int, ...] = ()          # layers whose output is given too, counted from 0

    gated: bool = False
    activation: str = "quick_gelu"
    norm: LayerNorm | RMSNorm = LayerNorm(eps=1e-6)
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True

    def build(self, *, rngs: nnx.Rngs) -> "NativeViT":
        return NativeViT(self, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        return grid

    @property
    def run_depth(self) -> int:
        return self.depth

    @property
    def patch_dim(self) -> int:
        return self.steps * self.patch * self.patch * self.channels

    @property
    def rope(self) -> Rope:
        """Half of the frequencies turn with the row, half with the column; both series are the same."""
        quarter = (self.head_dim or self.width // self.heads) // 4
        return Rope(sections=(0, quarter, quarter), axial=True)

    def tiny(self) -> "NativeViTConfig":
        return replace(
            self, width=32, depth=3, heads=2, mlp=64, patch=8, head_dim=None, positions=self.positions and 5, window=self.window and 4,
            full=self.full and (2,), deep=tuple(range(len(self.deep[:2]))))


QWEN2_VIT = NativeViTConfig(width=1280, depth=32, heads=16, mlp=5120, patch=14)
QWEN2_5_VIT = replace(
    QWEN2_VIT, mlp=3420, gated=True, activation="silu", norm=RMSNorm(eps=1e-6), window=8, full=(7, 15, 23, 31))
QWEN3_VIT = NativeViTConfig(
    width=1152, depth=27, heads=16, mlp=4304, patch=16, mean=HALF, std=HALF, patch_bias=True, positions=48, deep=(8, 16, 24),
    activation="gelu_tanh")
QWEN3_VIT_SMALL = replace(QWEN3_VIT, width=1024, depth=24, mlp=4096, deep=(5, 11, 17))


class NativeViT(nnx.Module):
    def __init__(self, cfg: NativeViTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch = Linear(cfg.patch_dim, cfg.width, "patch embed", bias=cfg.patch_bias, rngs=rngs)
        n = cfg.positions
        self.position = None if n is None else param(rngs, (n * n, cfg.width), "position embed", normal(cfg.width**-0.5))
        self.blocks = stack.make([lambda r: Block(cfg, rngs=r)], cfg.depth, rngs=rngs)

    def __call__(self, media: Media) -> Features:
        """Patches u8[b n u] or f32 -> what the last layer gives, f[b n d], and the chosen earlier ones, f[l b n d]."""
        cfg = self.cfg
        values = normalize(media.values, cfg.mean, cfg.std) if media.values.dtype == jnp.uint8 else media.values
        x = self.patch(values)
        if self.position is not None:
            x = x + resampled(self.position[...], cfg.positions, media).astype(x.dtype)
        rotation = cfg.rope(media.coords, cfg.head_dim or cfg.width // cfg.heads)
        wide = frames(media)
        near = wide if cfg.window is None else windows(media, cfg.window)
        is_wide, chosen = jnp.isin(jnp.arange(cfg.depth), jnp.array(cfg.full, int)), jnp.array(cfg.deep, int)

        def step(carry: tuple, block: Block, i: jax.Array, _: int) -> tuple:
            x, levels = carry
            # Numbers and not programs differ between layers, so that one layer is compiled.
            group = jnp.where(is_wide[i], wide, near)
            sees = Visibility(segments=group, order=jnp.zeros_like(group), key_segments=group, key_order=jnp.zeros_like(group))
            x = block(constrain(x, "batch seq embed_act"), sees, rotation=rotation)[0]
            return (x, jnp.where((chosen == i)[:, None, None, None], x, levels)), None

        (x, levels), _ = stack.run(self.blocks, step, (x, jnp.zeros((len(cfg.deep), *x.shape), x.dtype)), depth=cfg.depth)
        return Features(tokens=x, mask=media.item > 0, deep=levels if cfg.deep else None)


def frames(media: Media) -> jax.Array:
    """i32[b n]: the number of the frame that a patch belongs to, over all items of the row; 0 is padding."""
    return _runs(media, media.item, media.coords[..., 0])


def windows(media: Media, side: int) -> jax.Array:
    """i32[b n]: numbers of the squares of side x side patches into which frames are cut, from their upper left corner.

    Squares of the same rows of a frame have numbers near to one another.
    """
    band = _runs(media, media.item, media.coords[..., 0], media.coords[..., 1] // side)
    return jnp.where(band > 0, band * (band.shape[1] // side + 1) + media.coords[..., 2] // side, 0)


def _runs(media: Media, *numbers: jax.Array) -> jax.Array:
    """i32[b n]: counts from 1 the stretches of a row in which these i32[b n] stay the same."""
    new = sum(jnp.diff(x, axis=1, prepend=-1) != 0 for x in numbers) > 0
    return jnp.where(media.item > 0, jnp.cumsum(new, axis=1), 0)


def resampled(table: jax.Array, side: int, media: Media) -> jax.Array:
    """f32[b n d]: a table of side x side positions, resampled to the grid of each item; corners stay corners.

    Linear between neighbours, as torch's `interpolate(mode="bilinear", align_corners=True)`.
    """
    b, n = media.item.shape
    last = jax.vmap(lambda x, item: jax.ops.segment_max(x, item, num_segments=n + 1))(media.coords[..., 1:], media.item)
    last = jnp.take_along_axis(last, media.item[..., None], axis=1)
    at = media.coords[..., 1:].astype(jnp.float32) * ((side - 1) / jnp.maximum(last, 1).astype(jnp.float32))
    low = jnp.minimum(at.astype(jnp.int32), side - 1)
    high, part = jnp.minimum(low + 1, side - 1), at - low
    rows = ((low[..., 0], 1 - part[..., 0]), (high[..., 0], part[..., 0]))
    columns = ((low[..., 1], 1 - part[..., 1]), (high[..., 1], part[..., 1]))
    taps = [(r * side + c, y * x) for r, y in rows for c, x in columns]
    return sum(lookup(table, index, "position") * weight[..., None] for index, weight in taps)
