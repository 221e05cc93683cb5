"""Random changes of a decoded image, before the view: u8[h w 3] -> u8[h w 3] of another size.

The random numbers are keyed by (seed, example id, epoch) and by nothing else: neither the position in the
stream, nor the worker, nor the host. The same example is therefore changed in the same way on one host and
on thirty-two, and after a restart.
"""

import hashlib
import math

import numpy as np

from mllm_jax.config import config


def rng_for(seed: int, id: str, epoch: int) -> np.random.Generator:
    """Random numbers for one example in one epoch, independent of those of any other."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))


@config
class RandomResizedCrop:
    """A box of random area and shape (arXiv:1409.4842); the view resizes it."""

    scale: tuple[float, float] = (0.08, 1.0)        # part of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)     # width / height, uniform in its logarithm

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < tall <= height and 0 < wide <= width:
                top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
                return image[top : top + tall, left : left + wide]
        # A very long image may hold no such box: the largest centred one with an allowed ratio.
        wide = min(width, max(1, round(height * self.ratio[1])))
        tall = min(height, max(1, round(width / self.ratio[0])))
        top, left = (height - tall) // 2, (width - wide) // 2
        return image[top : top + tall, left : left + wide]


@config
class HorizontalFlip:
    """Mirrors left and right; leave it out where text, or the words left and right, matter."""

    p: float = 0.5

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return image[:, ::-1] if rng.random() < self.p else image
