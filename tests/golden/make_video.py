"""Writes video.npz: what the video processors of transformers 5.23 make of frames, which needs torchvision 0.28.

The wheel of the registry is of a CUDA build of torch, and does not load beside a torch for CPUs alone: so it is no
requirement of the tests, which read this file instead.

    pip install torch==2.13 torchvision==0.28 && python -m tests.golden.make_video
"""

import numpy as np
import torch
from transformers import LlavaOnevisionVideoProcessor, Qwen2VLVideoProcessor, SmolVLMVideoProcessor

from tests.golden.official import HERE


def main() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3)).astype(np.uint8)
    plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    square = {"height": 28, "width": 28}
    onevision = LlavaOnevisionVideoProcessor(size=square)([frames], **plain)["pixel_values_videos"][0]
    smol = SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})([frames], **plain)["pixel_values"][0]
    patches, *grid = Qwen2VLVideoProcessor.patchify(
        None, torch.tensor(frames.transpose(0, 3, 1, 2))[None], patch_size=8, merge_size=2, temporal_patch_size=2)
    odd = Qwen2VLVideoProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096})(
        [frames[:, :30, :45]], cap_pixels_per_frame=False, **plain)
    np.savez_compressed(HERE / "video.npz", frames=frames, onevision=onevision.transpose(0, 2, 3, 1), smolvlm=smol.transpose(0, 2, 3, 1),
                        qwen=patches[0].numpy(), grid=grid, qwen_odd=odd["pixel_values_videos"], grid_odd=odd["video_grid_thw"][0])


if __name__ == "__main__":
    main()
