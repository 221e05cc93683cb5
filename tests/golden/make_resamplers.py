"""open_flamingo_perceiver.npz, qwen_vl_resampler.npz, qwen_vl_visual.npz: OpenFlamingo's resampler, Qwen-VL's and its ViT, tiny.

    git clone https://github.com/mlfoundations/open_flamingo && git -C open_flamingo checkout 655f693fbfa04cd6e9a987d960654624d48917cf
    git clone https://github.com/yfzhang114/LLaVA-Align && git -C LLaVA-Align checkout dfbecfa7ac72c12dc6faf8ad7113a1b9a174101a
    pip install torch torchvision einops einops-exts requests
    PYTHONPATH=. python tests/golden/make_resamplers.py open_flamingo LLaVA-Align

The second repository holds the file visual.py that Qwen-VL keeps beside its weights.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.golden.official import load, package, randomize, record


class WithPost(nn.Module):
    """The end of Qwen-VL's VisionTransformer.forward: attn_pool, ln_post, @ proj."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.attn_pool, self.ln_post, self.proj = visual.attn_pool, visual.ln_post, visual.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln_post(self.attn_pool(x)) @ self.proj


def main(flamingo: Path, qwen: Path) -> None:
    rng = np.random.default_rng(0)
    package(flamingo, "open_flamingo")
    package(flamingo, "open_flamingo.src")
    helpers = load(flamingo, "open_flamingo.src.helpers")
    # Two media of three frames of 3x3 patches.
    perceiver = randomize(helpers.PerceiverResampler(dim=12, depth=2, dim_head=6, heads=4, num_latents=5, max_num_frames=3))
    record("open_flamingo_perceiver", perceiver, rng.normal(size=(2, 27, 12)), lambda x: perceiver(x.reshape(2, 1, 3, 9, 12))[:, 0])

    package(qwen, "experiments")
    package(qwen, "experiments.Qwen_VL")
    visual = load(qwen, "experiments.Qwen_VL.visual")
    # A table for 3x3 queries is stretched over 5x5 patches.
    tower = visual.VisionTransformer(
        image_size=10, patch_size=2, width=12, layers=2, heads=2, mlp_ratio=2.0, n_queries=9, output_dim=128)
    tower.attn_pool = visual.Resampler(grid_size=3, embed_dim=24, num_heads=2, kv_dim=12, norm_layer=tower.ln_post.__class__)
    for norm in (tower.attn_pool.ln_q, tower.attn_pool.ln_kv):
        norm.eps = 1e-6
    tower.ln_post, tower.proj = nn.LayerNorm(24, eps=1e-6), nn.Parameter(torch.randn(24, 24))
    table = tower.attn_pool.pos_embed.detach().clone()
    module = randomize(WithPost(tower))
    with torch.no_grad():
        module.attn_pool.pos_embed.copy_(table)             # not learned
    record("qwen_vl_resampler", module, rng.normal(size=(2, 25, 12)))
    # The whole of it, from pixels; the ViT's own table of 16x16 positions becomes one of 5x5.
    randomize(tower)
    with torch.no_grad():
        tower.attn_pool.pos_embed.copy_(table)
    record("qwen_vl_visual", tower, rng.normal(size=(2, 3, 10, 10)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
