"""Positions: rotary embeddings over one to three axes, and learned tables at other resolutions."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.config import config
from mllm_jax.types import struct


@config
class Llama3Scaling:
    """Frequencies stretched for long contexts, slow ones by `factor`, fast ones not at all (Llama 3.1)."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8_192               # context length of the pre-training

    def __call__(self, freqs: np.ndarray) -> np.ndarray:
        turns = self.original * freqs / (2 * math.pi)            # in the original context
        part = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return freqs * (part + (1 - part) / self.factor)


@config
class LinearScaling:
    """All frequencies divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float

    def __call__(self, freqs: np.ndarray) -> np.ndarray:
        return freqs / self.factor


@config
class Rope:
    """Rotary embedding (arXiv:2104.09864) in the half-split convention of Llama.

    `sections` says how many of the frequencies turn with each of (time, row, column), as in M-RoPE
    (Qwen2-VL, arXiv:2409.12191, section 2.1); without it all turn with time.  The axes follow one another,
    or with `interleaved` take turns, time, row, column, until one has all of its own (Qwen3-VL).  With `axial` each
    axis has a series of frequencies of its own, as in the ViT of Qwen2-VL.
    """

    theta: float = 1e4
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    axial: bool = False
    part: float = 1.0                   # of a head that turns, its first numbers; the others stay as they are (GPT-NeoX, StableLM)
    scaling: Llama3Scaling | LinearScaling | None = None

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """(f64[r] radians per position, i64[r] which axis of the positions), r half of what turns of a head."""
        half = int(head_dim * self.part) // 2
        sections = self.sections or (half, 0, 0)
        if sum(sections) != half:
            raise ValueError(f"rotary sections {sections} must add up to half of what turns of a head, {half}")
        series = lambda n: self.theta ** (-np.arange(n) / n)
        freqs = np.concatenate([series(n) for n in sections if n]) if self.axial else series(half)
        axis = np.repeat(np.arange(3), sections)
        if self.interleaved:
            axis = np.zeros(half, int)
            for a in (1, 2):
                axis[a : 3 * sections[a] : 3] = a
        return self.scaling(freqs) if self.scaling else freqs, axis

    def __call__(self, positions: jax.Array, head_dim: int) -> "Rotation":
        """The rotation at i32[b s 3]."""
        freqs, axis = self.frequencies(head_dim)
        # float32: in bfloat16 positions above 256 collide.
        angle = positions[..., axis].astype(jnp.float32) * freqs.astype(np.float32)
        return Rotation(cos=jnp.cos(angle), sin=jnp.sin(angle))


@struct
class Rotation:
    """Cosines and sines f32[b s r] of the first 2 r numbers of a head, computed once for all layers."""

    cos: jax.Array
    sin: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """f[b s h k] -> f[b s h k]."""
        x1, x2, rest = jnp.split(x.astype(jnp.float32), [self.cos.shape[-1], 2 * self.cos.shape[-1]], axis=-1)
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1).astype(x.dtype)


def interpolate(table: jax.Array, side: int) -> jax.Array:
    """A square table of learned positions f[n*n d] at another resolution, f[side*side d].

    Bicubic with a = -0.75, pixel centres, no antialiasing: what `torch.nn.functional.interpolate` does, and
    with it every checkpoint of this field.  `jax.image.resize` takes a = -0.5 and differs.
    """
    n = math.isqrt(table.shape[0])
    if n == side:
        return table
    weights = cubic_weights(n, side)
    square = table.reshape(n, n, -1)
    return jnp.einsum("rn,cm,nmd->rcd", weights, weights, square).reshape(side * side, -1)


def cubic_weights(n: int, out: int, a: float = -0.75) -> np.ndarray:
    """f32[out n]: how much each of n samples counts in each of `out` resampled ones; borders repeat."""
    weights = np.zeros((out, n))
    for o in range(out):
        x = (o + 0.5) * n / out - 0.5
        for i in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - i)
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[o, min(max(i, 0), n - 1)] += w
    return weights.astype(np.float32)
