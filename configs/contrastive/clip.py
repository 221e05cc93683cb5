"""CLIP (arXiv:2103.00020): an image tower and a text tower meet in one space.

New here: two towers, one symmetric loss over the global batch.  Its 400 M pairs are not public; give your own.
Steps are 32 epochs.  ViT-L/14 by default; `size=b32` and `b16` are the smaller ones of the paper's table 20.
"""

from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.dual_encoder import DualEncoderConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.objectives import InfoNCE
from mllm_jax.recipe import Adam, Data, Recipe, Stage

SIZES = {
    # image tower, text tower, width of the space, learning rate, published parameters
    "b32": (vit.CLIP_B32_224, llm.CLIP_TEXT_B, 512, 5e-4, 151.3e6),
    "b16": (vit.CLIP_B16_224, llm.CLIP_TEXT_B, 512, 5e-4, 149.6e6),
    "l14": (vit.CLIP_L14_224, llm.CLIP_TEXT_L, 768, 4e-4, 427.6e6),
}


def recipe(size: str = "l14") -> Recipe:
    encoder, text, dim, lr, params = SIZES[size]
    view = Square(size=encoder.grid * encoder.patch, crop=True)
    return Recipe(
        paper="arXiv:2103.00020",
        params=params,
        tokenizer="hf://openai/clip-vit-large-patch14",
        model=DualEncoderConfig(
            inputs={"image": TowerConfig(view=view, encoder=encoder, route="pool")}, text=text, dim=dim),
        stages={
            "contrastive": Stage(
                data=Data(sources={"wit_400m": 1.0}, batch_size=32_768, seq_len=77, template="clip"),
                objectives={"itc": InfoNCE()},
                optimizer=Adam(lr=lr, warmup=2_000, weight_decay=0.2, b2=0.98, eps=1e-6, clip=None),
                steps=390_625,
            ),
        },
    )
