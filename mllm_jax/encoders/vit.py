"""Vision transformer over patches cut on the host (arXiv:2010.11929), with the options of CLIP, OpenCLIP and SigLIP.

The host sends raw bytes; the patch embedding is a matmul on normalized pixels, which is the same as a
convolution whose stride is its size.  Features are those of one chosen hidden state: LLaVA reads the one
before the last, and the layers after it are kept (a checkpoint has them) but not run.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.nn import stack
from mllm_jax.nn.attention import Attention
from mllm_jax.nn.block import Block
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.mlp import MLP
from mllm_jax.nn.param import LayerNorm, Linear, RMSNorm, normal, param
from mllm_jax.nn.position import interpolate
from mllm_jax.sharding import constrain
from mllm_jax.types import Features, Grid, Media

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@config
class ViTConfig(BlockConfig):
    patch: int                          # side of a patch in pixels
    grid: int                           # side of an image in patches
    depth: int
    channels: int = 3
    table: int | None = None            # side of the stored table of positions, where it is not `grid`
    mean: tuple[float, ...] = CLIP_MEAN                         # of each channel of pixels in [0, 1]
    std: tuple[float, ...] = CLIP_STD
    class_token: bool = True
    keep_class: bool = False            # the class token is among the features
    patch_bias: bool = False
    pre_norm: bool = True               # a norm before the first layer
    last_norm: bool = True              # a norm after the last layer
    layer: int = -1                     # which hidden state are the features; -1 is the last
    final_norm: bool = False            # that norm is applied to the features, not only to what is pooled
    pool: str = "class"                 # the vector of an image: "class" token, "map" (attention pooling), "mean", or "none"

    gated: bool = False
    activation: str = "quick_gelu"
    norm: LayerNorm | RMSNorm = LayerNorm()
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True

    def build(self, *, rngs: nnx.Rngs) -> "ViT":
        return ViT(self, rngs=rngs)

    def num_tokens(self, grid: Grid) -> Grid:
        if grid != (1, self.grid, self.grid):
            raise ConfigError(f"the encoder takes images of {self.grid}x{self.grid} patches of {self.patch} pixels; "
                              f"the view cuts {grid[1]}x{grid[2]}: make the view {self.grid * self.patch} pixels wide")
        return (1, 1, math.prod(grid) + 1) if self.keep_class else grid

    @property
    def run_depth(self) -> int:
        """How many layers are run to get the chosen hidden state."""
        return self.layer % (self.depth + 1)

    @property
    def patch_dim(self) -> int:
        return self.patch * self.patch * self.channels

    def tiny(self) -> "ViTConfig":
        return replace(self, width=32, depth=3, heads=2, mlp=64, patch=8, grid=4, table=None, head_dim=None)


CLIP_B32_224 = ViTConfig(width=768, depth=12, heads=12, mlp=3072, patch=32, grid=7)
CLIP_B16_224 = ViTConfig(width=768, depth=12, heads=12, mlp=3072, patch=16, grid=14)
CLIP_L14_224 = ViTConfig(width=1024, depth=24, heads=16, mlp=4096, patch=14, grid=16)
CLIP_L14_336 = replace(CLIP_L14_224, grid=24)
OPENCLIP_H14_224 = ViTConfig(width=1280, depth=32, heads=16, mlp=5120, patch=14, grid=16, activation="gelu")
# Of Data Filtering Networks (arXiv:2309.17425), trained at 224 pixels and then at these; with the activation of the first CLIP.
CLIP_H14_378 = replace(OPENCLIP_H14_224, grid=27, activation="quick_gelu", final_norm=True)
# As Qwen-VL reads it: without class token and last norm, its table of 16x16 positions stretched over 32x32 patches.
OPENCLIP_BIGG_14_448 = ViTConfig(
    width=1664, depth=48, heads=16, mlp=8192, patch=14, grid=32, table=16, class_token=False, pool="none", activation="gelu",
    norm=LayerNorm(eps=1e-6),
)
SIGLIP_B16_224 = ViTConfig(
    width=768, depth=12, heads=12, mlp=3072, patch=16, grid=14, mean=HALF, std=HALF, class_token=False, patch_bias=True,
    pre_norm=False, final_norm=True, pool="map", activation="gelu_tanh", norm=LayerNorm(eps=1e-6),
)
SIGLIP_SO400M_384 = replace(SIGLIP_B16_224, width=1152, depth=27, heads=16, mlp=4304, patch=14, grid=27)
SIGLIP_SO400M_224 = replace(SIGLIP_SO400M_384, grid=16)
# EVA-CLIP (arXiv:2211.07636) as BLIP-2 reads it: the last of 40 layers is left out, and a norm that its reader trains is put
# in its place.  The norm has this eps in transformers; in the code of the paper (LAVIS) it has 1e-5.
EVA_G14_224 = ViTConfig(
    width=1408, depth=39, heads=16, mlp=6144, patch=14, grid=16, patch_bias=True, pre_norm=False, key_bias=False, keep_class=True,
    final_norm=True, pool="none", activation="gelu", norm=LayerNorm(eps=1e-6),
)
# EVA2-CLIP-E (arXiv:2303.15389) as CogVLM reads it: norms after each half of a layer, and 63 of 64 layers, without the last norm.
EVA2_E14_224 = ViTConfig(
    width=1792, depth=63, heads=16, mlp=15_360, patch=14, grid=16, patch_bias=True, pre_norm=False, norms="after", last_norm=False,
    pool="none", activation="gelu", norm=LayerNorm(eps=1e-6),
)
# InternViT (arXiv:2312.14238, 2412.05271): what layers give is scaled, and no norm follows the last one.
INTERNVIT_300M_448 = ViTConfig(
    width=1024, depth=24, heads=16, mlp=4096, patch=14, grid=32, mean=IMAGENET_MEAN, std=IMAGENET_STD, patch_bias=True, pre_norm=False,
    last_norm=False, pool="none", activation="gelu", norm=LayerNorm(eps=1e-6), layer_scale=0.1,
)
INTERNVIT_6B_448 = replace(
    INTERNVIT_300M_448, width=3200, depth=45, heads=25, mlp=12_800, norm=RMSNorm(eps=1e-6), qkv_bias=False, qk_norm="width")


class ViT(nnx.Module):
    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        if (cfg.pool == "class" or cfg.keep_class) and not cfg.class_token:
            raise ConfigError("pool='class' and keep_class need class_token=True")
        if (cfg.pool != "none" or cfg.final_norm) and not cfg.last_norm:
            raise ConfigError(f"pool={cfg.pool!r} and final_norm={cfg.final_norm} read the last norm; set last_norm=True, or pool='none'")
        self.cfg = cfg
        d, n = cfg.width, (cfg.table or cfg.grid) ** 2 + cfg.class_token
        self.patch = Linear(cfg.patch_dim, d, "patch embed", bias=cfg.patch_bias, rngs=rngs)
        self.class_token = param(rngs, (d,), "embed", normal(d**-0.5)) if cfg.class_token else None
        self.position = param(rngs, (n, d), "position embed", normal(d**-0.5))
        self.pre_norm = cfg.norm.build(d, rngs=rngs) if cfg.pre_norm else None
        self.blocks = stack.make([lambda r: Block(cfg, rngs=r)], cfg.depth, rngs=rngs)
        self.norm = cfg.norm.build(d, rngs=rngs) if cfg.last_norm else None
        self.pool = AttentionPool(cfg, rngs=rngs) if cfg.pool == "map" else None

    def __call__(self, media: Media) -> Features:
        """Patches u8[b i p u] or f32 -> the chosen hidden state of every patch, f[b (i p) d]."""
        b, i = media.values.shape[:2]
        x = self.encode(rearrange(media.values, "b i p u -> (b i) p u"), self.cfg.run_depth)
        x = self.norm(x) if self.cfg.final_norm else x
        x = x[:, 1:] if self.cfg.class_token and not self.cfg.keep_class else x
        tokens = rearrange(x, "(b i) p d -> b (i p) d", b=b)
        return Features(tokens=tokens, mask=jnp.repeat(media.mask, x.shape[1], axis=1))

    def embed(self, media: Media) -> jax.Array:
        """The pooled vector of every image, f[b i d]."""
        b = media.values.shape[0]
        x = self.encode(rearrange(media.values, "b i p u -> (b i) p u"), self.cfg.depth)
        if self.cfg.pool == "class":
            x = self.norm(x[:, 0])
        elif self.cfg.pool == "map":
            x = self.pool(self.norm(x))
        elif self.cfg.pool == "mean":
            x = jnp.mean(self.norm(x)[:, self.cfg.class_token:], axis=1)
        else:
            raise ConfigError(f"an encoder with pool={self.cfg.pool!r} has no vector for a whole image")
        return rearrange(x, "(b i) d -> b i d", b=b)

    def encode(self, patches: jax.Array, depth: int) -> jax.Array:
        """[n p u] -> hidden state number `depth`, f[n p d]; 0 is what enters the first layer."""
        cfg = self.cfg
        if patches.dtype == jnp.uint8:
            patches = normalize(patches, cfg.mean, cfg.std)
        x = constrain(self.patch(patches), "item patch embed_act")
        table = self.position[...]
        if cfg.table not in (None, cfg.grid):
            table = jnp.concatenate([table[: cfg.class_token], interpolate(table[cfg.class_token:], cfg.grid)])
        if self.class_token is not None:
            first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, cfg.width))
            x = jnp.concatenate([first, x], axis=1)
        x = x + table.astype(x.dtype)
        x = x if self.pre_norm is None else self.pre_norm(x)

        def step(x: jax.Array, block: Block, *_) -> tuple[jax.Array, None]:
            return block(constrain(x, "item patch embed_act"))[0], None

        return stack.run(self.blocks, step, x, depth=depth)[0]


class AttentionPool(nnx.Module):
    """One learned query reads all patches (SigLIP; arXiv:1810.00825): f[n p d] -> f[n d]."""

    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        self.probe = param(rngs, (1, cfg.width), "query embed", normal(0.02))
        self.attn = Attention(cfg, rngs=rngs)
        self.norm = cfg.norm.build(cfg.width, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        y, _ = self.attn(probe, memory=x)
        return (y + self.mlp(self.norm(y)))[:, 0]


def normalize(patches: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """u8[... (r c channel)] -> f32, (x / 255 - mean) / std."""
    repeat = patches.shape[-1] // len(mean)
    scale = np.tile(1 / (255 * np.asarray(std)), repeat).astype(np.float32)
    shift = np.tile(np.asarray(mean) / np.asarray(std), repeat).astype(np.float32)
    return patches.astype(jnp.float32) * scale - shift
