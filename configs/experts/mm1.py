"""MM1 (arXiv:2403.09611): documents, captions and text at 45, 45 and 10 %, so that examples in the row teach; dense or with experts.

New here: documents beside captions, all trained; then 672 pixels (interpolated positions), as four tiles and an overview.  Unpublished:
data and language models, which start random, in shapes of the published sizes.  Unverified: all numbers but the mixture and 144 tokens.
"""

from dataclasses import replace

from mllm_jax.connectors.conv import CAbstractorConfig
from mllm_jax.data.tiles import Tiles
from mllm_jax.data.views import Square
from mllm_jax.decoders.layers import Layer
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.encoders import vit
from mllm_jax.evaluation.tasks import Answers
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.nn.moe import MoEConfig
from mllm_jax.objectives import Auxiliary, NextToken
from mllm_jax.recipe import Adafactor, Adam, Data, Recipe, Stage

SHAPES = {"3b": (2560, 32, 20, 7_872, 3.0e9), "7b": (4096, 32, 32, 13_248, 7.0e9), "30b": (7168, 48, 56, 22_912, 30e9)}
EXPERTS = {"": ((Layer(),), 0.0), "64e": ((Layer(), Layer(mlp=MoEConfig(experts=64))), 61e9),       # layers that take turns, and their parameters
           "32e": ((*[Layer()] * 3, Layer(mlp=MoEConfig(experts=32))), 40e9)}
MIX = {"mm1_documents": 0.45, "mm1_captions": 0.45, "mm1_text": 0.1}


def recipe(size: str = "3b") -> Recipe:
    base, _, sparse = size.partition("_")
    (d, depth, heads, mlp, params), (cycle, more) = SHAPES[base], EXPERTS[sparse]
    llm = DecoderConfig(vocab=48_000, width=d, depth=depth, heads=heads, kv_heads=None if base == "3b" else 8, mlp=mlp, cycle=cycle)
    low = TowerConfig(view=Square(size=378), encoder=vit.CLIP_H14_378, connector=CAbstractorConfig(grid=27, to=12))
    high = replace(low, view=Tiles(size=672, pinpoints=((2, 2),)), encoder=replace(low.encoder, grid=48, table=27),
                   connector=CAbstractorConfig(grid=48, to=12, table=27))
    routing = {"balance": Auxiliary(name="router/balance", weight=0.01), "z": Auxiliary(name="router/z", weight=1e-3)} if sparse else {}
    pretrain = Stage(
        model=MLLMConfig(inputs={"image": low}, decoder=llm), objectives={"lm": NextToken(), **routing},
        data=Data(sources=MIX, batch_size=512, seq_len=4_096, items={"image": 16}, overlong="truncate", on_bad_example="skip"),
        optimizer=Adam(lr=0.575 * params**-0.4214, warmup=2_000, end=0.1, weight_decay=0.1), steps=200_000,
        weights={"inputs/image/encoder": "hf://apple/DFN5B-CLIP-ViT-H-14-378"},
        evals={"two_shots": Answers(source="shapes?shots=2", limit=256, baselines=False)})
    instruct = replace(pretrain, model=None, optimizer=Adafactor(lr=1e-5), steps=10_000, weights={"*": "stage://pretrain"}, data=replace(
        pretrain.data, sources={"mm1_instruct_1450k": 1.0}, batch_size=256, seq_len=2_048, template="vicuna_v1", items={"image": 10}))
    return Recipe(paper="arXiv:2403.09611", params=params + more + 0.68e9, tokenizer="bpe:48000",
                  model=MLLMConfig(inputs={"image": high}, decoder=llm), stages={"pretrain": pretrain, "instruct": instruct})
