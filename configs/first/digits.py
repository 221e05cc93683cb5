"""A first multimodal LLM: it reads handwritten digits in scenes, on a laptop's processor, in minutes.

New here: the stages of the field.  Two towers learn what pictures and captions share; a decoder learns to
answer about scenes that are written down; the connector learns to write pictures so that the frozen decoder
reads them; then all learn to answer together.  Data: real digits of the UCI set, see data/sources/digits.py.
"""

from dataclasses import replace

from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.data.views import Square
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.encoders.vit import HALF, ViTConfig
from mllm_jax.evaluation.tasks import Answers, Retrieval
from mllm_jax.models.dual_encoder import DualEncoderConfig
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.objectives import InfoNCE, NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage

VOCAB = 384
VIT = ViTConfig(width=128, depth=4, heads=4, mlp=384, patch=8, grid=4, mean=HALF, std=HALF, activation="gelu")
VIEW = Square(size=32)


def recipe() -> Recipe:
    text = DecoderConfig(vocab=VOCAB, width=96, depth=2, heads=4, mlp=256, head="none")
    # The vector of a picture is the mean of its patches, so that each patch must know what it shows.
    pairs = TowerConfig(view=VIEW, encoder=replace(VIT, pool="mean"), route="pool")
    image = TowerConfig(view=VIEW, encoder=VIT, connector=MLPConfig(depth=2))
    decoder = DecoderConfig(vocab=VOCAB, width=128, depth=4, heads=4, mlp=352)
    rows = {"batch_size": 16, "seq_len": 128, "template": "plain"}
    return Recipe(
        paper="this project",
        tokenizer=f"bpe:{VOCAB}",
        samples=24,
        model=MLLMConfig(inputs={"image": image}, decoder=decoder),
        stages={
            "contrast": Stage(
                model=DualEncoderConfig(inputs={"image": pairs}, text=text, dim=96),
                data=Data(sources={"digits_captions": 1.0}, batch_size=128, seq_len=24, template="clip"),
                objectives={"itc": InfoNCE()},
                optimizer=Adam(lr=1e-3, warmup=0.1, b2=0.98),
                steps=420,
                evals={"retrieval": Retrieval(source="digits_test", pool=100, limit=1_000)},
            ),
            "words": Stage(
                model=MLLMConfig(inputs={}, decoder=decoder),
                data=Data(sources={"digits_words": 1.0}, **rows),
                objectives={"lm": NextToken()},
                optimizer=Adam(lr=1e-3, warmup=0.1, b2=0.98),
                steps=680,
            ),
            "align": Stage(
                data=Data(sources={"digits_questions": 1.0}, items={"image": 3}, **rows),
                objectives={"lm": NextToken()},
                optimizer=Adam(lr=2e-3, warmup=0.1, b2=0.98),
                steps=150,
                train=("inputs/image/connector/*",),
                weights={"inputs/image/encoder": "stage://contrast/inputs/image", "decoder": "stage://words/decoder"},
            ),
            "instruct": Stage(
                data=Data(sources={"digits_questions": 0.85, "digits_captions": 0.15}, items={"image": 4}, **rows),
                objectives={"lm": NextToken()},
                optimizer=Adam(lr=1e-3, warmup=0.05, b2=0.98),
                steps=1_100,
                evals={"answers": Answers(source="digits_test", limit=1_000, max_new_tokens=8, train="digits_questions",
                                          confusion=("which",), rows=100)},
            ),
        },
    )
