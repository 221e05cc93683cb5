"""SigLIP (arXiv:2303.15343): CLIP whose loss asks of every pair on its own whether it belongs together.

New here: the sigmoid loss, attention pooling, a text tower that sees both ways and reads its padding too.
WebLI is not public; give your own pairs.  Batch, steps and optimizer are those of the paper's text as we
remember it and were not checked against an official configuration.
"""

from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.dual_encoder import DualEncoderConfig, Projection
from mllm_jax.models.tower import TowerConfig
from mllm_jax.objectives import Sigmoid
from mllm_jax.recipe import Adafactor, Data, Recipe, Stage

SIZES = {
    "b16": (vit.SIGLIP_B16_224, llm.SIGLIP_TEXT_B, 203.2e6),
    "so400m": (vit.SIGLIP_SO400M_384, llm.SIGLIP_TEXT_SO400M, 878.0e6),
}


def recipe(size: str = "b16") -> Recipe:
    encoder, text, params = SIZES[size]
    view = Square(size=encoder.grid * encoder.patch, resample="bilinear")
    return Recipe(
        paper="arXiv:2303.15343",
        params=params,
        tokenizer="hf://google/siglip-base-patch16-224",
        model=DualEncoderConfig(
            inputs={"image": TowerConfig(view=view, encoder=encoder, route="pool")},
            text=text, dim=encoder.width, project={"text": Projection(bias=True)}, scale=10.0, bias=-10.0),
        stages={
            "contrastive": Stage(
                data=Data(sources={"webli": 1.0}, batch_size=32_768, seq_len=64, template="siglip"),
                objectives={"pairs": Sigmoid()},
                optimizer=Adafactor(lr=1e-3, warmup=10_000, schedule="rsqrt", weight_decay=1e-4, b1=0.9),
                steps=274_658,
            ),
        },
    )
