"""open_flamingo_gated.npz: a gated cross-attention layer of OpenFlamingo, tiny.

    git clone https://github.com/mlfoundations/open_flamingo && git -C open_flamingo checkout 655f693fbfa04cd6e9a987d960654624d48917cf
    pip install torch einops einops-exts
    PYTHONPATH=. python tests/golden/make_flamingo.py open_flamingo

Two rows of nine positions beside two media of five latents.  In the first row media stand at 2 and 5, in the second
one at 0, so that its second medium is seen by nobody.  After the nine, two more positions that come when decoding,
and see what the last one saw.  x of the fixture is a row of [positions, media], flat.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from tests.golden.official import load, package, randomize, record

S, NEW, D, MEDIA, LATENTS, D_MEDIA = 9, 2, 16, 2, 5, 12


def main(clone: Path) -> None:
    package(clone, "open_flamingo")
    package(clone, "open_flamingo.src")
    helpers = load(clone, "open_flamingo.src.helpers")
    layer = randomize(helpers.GatedCrossAttentionBlock(dim=D, dim_visual=D_MEDIA, dim_head=4, heads=3))
    with torch.no_grad():                   # wide open, so that they matter, and each in its own way
        layer.attn_gate.fill_(0.7)
        layer.ff_gate.fill_(-1.1)
    here = torch.zeros(2, S, dtype=torch.bool)
    here[0, [2, 5]] = here[1, 0] = True

    def call(flat: torch.Tensor) -> torch.Tensor:
        x, media = flat.split([(S + NEW) * D, MEDIA * LATENTS * D_MEDIA], dim=1)
        x, media = x.reshape(2, S + NEW, D), media.reshape(2, MEDIA, LATENTS, D_MEDIA)
        return torch.cat([layer(x[:, :S], media, here), layer(x[:, S:], media, here, use_cached_media=True)], dim=1)

    flat = np.random.default_rng(0).normal(size=(2, (S + NEW) * D + MEDIA * LATENTS * D_MEDIA))
    record("open_flamingo_gated", layer, flat, call)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
