"""Small models and tasks that evaluation is tested with; as a script, one process of several.

python -m tests.evaluation.small PROCESS COUNT PORT FOLDER
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

SOURCE = "shapes:?count=11&size=32"


def llm():
    from mllm_jax.connectors.mlp import MLPConfig
    from mllm_jax.data.views import Square
    from mllm_jax.decoders.transformer import LLAMA
    from mllm_jax.encoders.vit import CLIP_L14_336
    from mllm_jax.models.mllm import MLLMConfig
    from mllm_jax.models.tower import TowerConfig

    tower = TowerConfig(view=Square(size=336), encoder=replace(CLIP_L14_336, layer=-2), connector=MLPConfig())
    return MLLMConfig(inputs={"image": tower}, decoder=replace(LLAMA, kv_heads=2)).tiny()


def dual():
    from mllm_jax.data.views import Square
    from mllm_jax.decoders.transformer import CLIP_TEXT_B
    from mllm_jax.encoders.vit import CLIP_B16_224
    from mllm_jax.models.dual_encoder import DualEncoderConfig
    from mllm_jax.models.tower import TowerConfig

    return DualEncoderConfig(
        inputs={"image": TowerConfig(view=Square(size=224), encoder=CLIP_B16_224, route="pool")},
        text=CLIP_TEXT_B,
        dim=512,
    ).tiny()


def spread(cfg, seed: int = 1) -> dict:
    """Numpy weights large enough that the answer depends on the image, and logits differ by more than rounding."""
    import numpy as np

    from mllm_jax.nn.param import abstract, split

    shapes = split(abstract(cfg))[1]
    rng = np.random.default_rng(seed)
    plain = lambda k: 1.0 if k.endswith("scale") and "log" not in k else 0.0
    return {k: (rng.normal(0, 0.25, v.shape) + plain(k)).astype(np.float32) for k, v in sorted(shapes.items())}


def tasks() -> dict:
    from mllm_jax.evaluation.tasks import Answers, Perplexity, Retrieval

    return {
        "answers": (llm(), Answers(source=SOURCE, max_new_tokens=3, rows=4), "plain"),
        "perplexity": (llm(), Perplexity(source=SOURCE, rows=4), "plain"),
        "retrieval": (dual(), Retrieval(source=SOURCE, rows=4), "clip"),
    }


def run(folder: Path, names=("answers", "perplexity", "retrieval"), **kw) -> dict:
    from mllm_jax.data.tokenizer import load_tokenizer
    from mllm_jax.evaluation.run import evaluate

    out = {}
    for name in names:
        cfg, task, template = tasks()[name]
        out[name] = evaluate(
            cfg, spread(cfg), task, load_tokenizer("bytes"), folder=folder / name, template=template, **kw
        )
    return out


if __name__ == "__main__":
    process, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", count, process)
    results = run(folder, ["answers", "retrieval"])
    from mllm_jax.sharding import Layout

    # Both processes hold all rows here, and one of them answers.
    run(folder / "tensor", ["perplexity"], layout=Layout(mesh={"data": 1, "fsdp": 1, "tensor": 2 * count}))
    if process:
        (folder / f"seen-by-{process}.json").write_text(json.dumps(results))
