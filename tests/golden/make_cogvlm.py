"""cogvlm.npz: CogVLM's own code (modeling_cogvlm.py and visual.py of the folders of THUDM on the Hub), tiny, on two rows.

    git clone https://github.com/function2-llx/MMMM && git -C MMMM checkout 94dea139283280fccefe3fe42de7dec8f0cc193c
    pip install torch transformers einops
    PYTHONPATH=. python tests/golden/make_cogvlm.py MMMM

The repository holds a copy of that code, unchanged at this commit.  Around it stand torch's attention for that of xformers,
nothing for torchvision, and a plain module for `PreTrainedModel`, whose newer versions ask for more.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.golden.official import HERE, load, package, randomize

CONFIG = {
    "hidden_size": 16, "intermediate_size": 20, "max_position_embeddings": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5, "vocab_size": 24, "hidden_act": "silu", "pad_token_id": 0, "output_attentions": False,
    "output_hidden_states": False, "use_cache": False, "use_return_dict": True, "template_version": "chat", "initializer_range": 0.02,
    "vision_config": {"dropout_prob": 0.0, "hidden_act": "gelu", "hidden_size": 12, "image_size": 16, "in_channels": 3,
                      "intermediate_size": 18, "layer_norm_eps": 1e-6, "num_heads": 3, "num_hidden_layers": 2, "num_positions": 5,
                      "patch_size": 8},
}  # fmt: skip


def stub(name: str, **members) -> None:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(members)


class Plain(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        pass


def official(clone: Path) -> types.ModuleType:
    import transformers  # before torchvision seems to be there

    transformers.PreTrainedModel = Plain
    attention = lambda q, k, v, scale: nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2).contiguous()
    stub("xformers.ops", memory_efficient_attention=attention)
    stub("xformers", ops=sys.modules["xformers.ops"])
    stub("torchvision", transforms=None)
    for name in ("mmmm", "mmmm.model", "mmmm.model.cogvlm"):
        package(clone, name)
    return load(clone, "mmmm.model.cogvlm.modeling_cogvlm")


def main(clone: Path) -> None:
    code = official(clone)
    model = randomize(code.CogVLMForCausalLM(types.SimpleNamespace(**CONFIG))).eval()
    with torch.no_grad():
        for i, mark in enumerate((model.model.vision.boi, model.model.vision.eoi)):
            mark.normal_(generator=torch.Generator().manual_seed(i))
    rng = np.random.default_rng(0)
    ids, types_ = torch.tensor(rng.integers(3, 24, (2, 14))), torch.zeros(2, 14, dtype=torch.long)
    types_[0, 1:7] = types_[1, 4:10] = 1                        # an image of 2 x 2 patches and the vectors around it
    images = torch.tensor(rng.standard_normal((2, 3, 16, 16)), dtype=torch.float32)
    labels = torch.where(torch.arange(14) > 10, ids, -100)
    out = model(input_ids=ids, images=[[x] for x in images], token_type_ids=types_, attention_mask=torch.ones_like(ids), labels=labels)
    out.loss.backward()
    numpy = lambda x: x.detach().numpy()
    arrays = {"ids": ids, "types": types_, "images": images, "labels": labels, "logits": out.logits, "loss": out.loss,
              "positions": code.build_position_ids(types_), "expert": code.get_expert_mask(types_)[0]}
    arrays = {f"io/{k}": numpy(v) for k, v in arrays.items()}
    for name, p in model.named_parameters():
        arrays |= {f"weight/{name}": numpy(p), f"grad/{name}": numpy(p.grad)}
    np.savez_compressed(HERE / "cogvlm.npz", **arrays)
    print(f"cogvlm.npz: {(HERE / 'cogvlm.npz').stat().st_size // 1024} kB, loss {out.loss.item():.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
