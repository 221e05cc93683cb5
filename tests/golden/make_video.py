"""Writes video.npz: what the video processors of transformers 5.23 make of frames, which needs torchvision 0.28.

    pip install torchvision && python -m tests.golden.make_video
"""

import numpy as np
import torch
from transformers import LlavaOnevisionVideoProcessor, Qwen2VLVideoProcessor

from tests.golden.official import HERE


def main() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3)).astype(np.uint8)
    plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    square = {"height": 28, "width": 28}
    onevision = LlavaOnevisionVideoProcessor(size=square)([frames], **plain)["pixel_values_videos"][0]
    patches, *grid = Qwen2VLVideoProcessor.patchify(
        None, torch.tensor(frames.transpose(0, 3, 1, 2))[None], patch_size=8, merge_size=2, temporal_patch_size=2)
    np.savez_compressed(HERE / "video.npz", frames=frames, onevision=onevision.transpose(0, 2, 3, 1), qwen=patches[0].numpy(), grid=grid)


if __name__ == "__main__":
    main()
