"""CogVLM (arXiv:2311.03079): every layer of a frozen Vicuna gets a second set of matrices, for the positions of an image.

New here: `ExpertLayer`, chosen by the kind of a position and not by a router; all patches share one position; a ViT with norms behind.
Sizes: the hub's config.json; stages, steps, batches and lengths: the paper, section 2.3.  Unverified: rates, warm-ups, decay,
lengths of the first stages, when 490 pixels begin, steps of the last, what trains in it; a table of positions is stretched for them.
"""

from dataclasses import replace

from mllm_jax.connectors.glu import GLUConfig
from mllm_jax.data.layouts import Marked
from mllm_jax.data.views import Square
from mllm_jax.decoders import transformer as llm
from mllm_jax.decoders.expert import ExpertLayer
from mllm_jax.encoders import vit
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.models.tower import TowerConfig
from mllm_jax.objectives import NextToken
from mllm_jax.recipe import Adam, Data, Recipe, Stage

EXPERT = ("inputs/image/connector/*", "inputs/image/marks/*", "decoder/blocks/*/expert/*")


def model(size: int) -> MLLMConfig:
    image = TowerConfig(view=Square(size=size), encoder=replace(vit.EVA2_E14_224, grid=size // 14, table=16),
                        connector=GLUConfig(hidden=11_008), layout=Marked(), place="one")
    return MLLMConfig(inputs={"image": image}, decoder=replace(llm.VICUNA_7B, vocab=32_064, cycle=(ExpertLayer(),)))


def stage(sources: dict[str, float], rows: int, seq_len: int, steps: int, lr: float, template: str = "base", **more) -> Stage:
    data = Data(sources=sources, batch_size=rows, seq_len=seq_len, template=template, pack=False, overlong="truncate")
    return Stage(data=data, objectives={"lm": NextToken()}, steps=steps, **{"train": EXPERT} | more, optimizer=Adam(
        lr=lr, warmup=0.02, weight_decay=0.05, b2=0.95, lr_scale={"inputs/image/encoder/*": 0.1} if "train" in more else {}))


def recipe() -> Recipe:
    pairs, grounding = {"laion_2b": 0.5, "coyo_700m": 0.5}, {"laion_2b": 0.25, "coyo_700m": 0.25, "cogvlm_grounding_40m": 0.5}
    begin = {"inputs/image/encoder": "hf://THUDM/cogvlm-base-224-hf", "decoder": "hf://lmsys/vicuna-7b-v1.5",
             "decoder/blocks/0/expert": "copy://decoder/blocks/0"}
    return Recipe(paper="arXiv:2311.03079", params=17.64e9, tokenizer="hf://lmsys/vicuna-7b-v1.5", model=model(490), stages={
        "pretrain": stage(pairs, 8_192, 384, 120_000, 1e-4, model=model(224), weights=begin),
        "ground": stage(grounding, 1_024, 384, 30_000, 1e-5, model=model(224)),
        "px490": stage(grounding, 1_024, 1_408, 30_000, 1e-5, weights={"": "stage://ground"}),
        "instruct": stage({"cogvlm_sft_311k": 1.0}, 640, 2_048, 8_000, 1e-5, "cogvlm", train=(*EXPERT, "inputs/image/encoder/*")),
    })
