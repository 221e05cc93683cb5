"""BLIP-2 (arXiv:2301.12597): a frozen ViT, a frozen OPT, and 32 queries between them that learn what to say of an image.

New here: the connector is trained before it meets the language model, with three losses at once.  The paper, section 3.4, and
LAVIS; unverified: b2, steps, batches, the last rate.  The ViT is EVA's with a norm trained later; queries begin as BERT's text layers.
"""

from dataclasses import replace

from mllm_jax.connectors.qformer import QFormerConfig, Words
from mllm_jax.data.augment import HorizontalFlip, RandomResizedCrop
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.encoders import vit
from mllm_jax.models.bridge import BridgeConfig
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.objectives import InfoNCE, Matching, NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage

SIZES = {"2.7b": (llm.OPT_2_7B, 3.745e9), "6.7b": (llm.OPT_6_7B, 7.753e9)}
PAIRS = {"coco_captions": 0.4, "visual_genome": 0.8, "cc3m": 3, "cc12m": 10, "sbu": 0.8, "laion_115m": 114}     # millions of images
TOWER, FORMER, HEADS = "inputs/image/encoder", "inputs/image/connector/former", ("text/*", "match/*", "caption/*", "temperature")
COPIES = {f"{FORMER}/blocks/{i}/{x}": f"copy://{FORMER}/blocks/{i}/{y}" for i in (0, 1) for x, y in (("mlp", "text_mlp"), ("norm2", "text_norm"))}


def recipe(size: str = "2.7b") -> Recipe:
    (decoder, params), opt = SIZES[size], f"hf://facebook/opt-{size}"
    image = TowerConfig(view=Square(size=224), encoder=vit.EVA_G14_224, connector=QFormerConfig(tokens=257))
    bridge = BridgeConfig(inputs={"image": replace(image, connector=replace(image.connector, words=Words()), route="pool")})
    data = Data(sources=PAIRS, batch_size=1_680, seq_len=32, template="clip", pack=False,
                augment=(RandomResizedCrop(scale=(0.5, 1.0)), HorizontalFlip()))
    adam = Adam(lr=1e-4, warmup=5_000, end=0.1, clip=None, weight_decay=0.05, b2=0.98)
    train = (f"{TOWER}/norm/*", "inputs/image/connector/*")
    losses = {"itc": InfoNCE(smoothing=0.1, candidates_learn=False), "itm": Matching(), "itg": NextToken(smoothing=0.1)}
    return Recipe(
        paper="arXiv:2301.12597", params=params, tokenizer=opt, model=MLLMConfig(inputs={"image": image}, decoder=decoder),
        stages={
            "represent": Stage(
                model=bridge, data=data, objectives=losses, optimizer=adam, steps=250_000, train=(*train, *HEADS),
                weights={TOWER: "hf://Salesforce/blip2-itm-vit-g", FORMER: "hf://google-bert/bert-base-uncased"} | COPIES),
            "generate": Stage(
                data=replace(data, batch_size=1_920, seq_len=64, template="blip2", overlong="truncate"), train=train,
                objectives={"lm": NextToken()}, optimizer=replace(adam, warmup=2_000, end=0.5), steps=80_000,
                weights={part: f"stage://represent/{part}" for part in (TOWER, FORMER)} | {"decoder": opt}),
        })
