"""blip2.npz: the three losses of BLIP-2's first stage, and their gradients, of LAVIS's own code, tiny.

    git clone https://github.com/salesforce/LAVIS && git -C LAVIS checkout 506965b9c4a18c1e565bd32acaccabe0198433f7
    pip install torch transformers
    PYTHONPATH=. python tests/golden/make_blip2.py LAVIS

`Blip2Qformer.forward` runs as it is on a Q-Former of two layers. Around it stand: image features for the frozen ViT, token
ids for BERT's tokenizer, the likeliest column for `torch.multinomial`, and for gathering what many processes compute: values
without gradients, but for the image features (lavis/models/base_model.py).
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from tests.golden.official import HERE, randomize

B, T, V, D, MEMORY, TOKENS, QUERIES, DIM = 4, 7, 41, 16, 12, 5, 3, 8
LENGTHS = [7, 5, 6, 4]


def load(clone: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, clone / (name.replace(".", "/") + ".py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stub(name: str, **members) -> None:
    module = sys.modules[name] = types.ModuleType(name)
    module.__dict__.update(members)


def official(clone: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """Qformer.py and blip2_qformer.py, with what newer transformers do not have."""
    from transformers import modeling_utils
    from transformers.pytorch_utils import apply_chunking_to_forward

    modeling_utils.apply_chunking_to_forward = apply_chunking_to_forward
    modeling_utils.prune_linear_layer = modeling_utils.find_pruneable_heads_and_indices = None
    for package in ("lavis", "lavis.common", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models"):
        stub(package, __path__=[])
    register = lambda _: lambda cls: cls
    stub("lavis.common.registry", registry=types.SimpleNamespace(register_model=register))
    stub("lavis.models.base_model", all_gather_with_grad=lambda x: x, concat_all_gather=lambda x: x.detach().clone())
    stub("lavis.models.blip2_models.blip2", Blip2Base=nn.Module, compute_sim_matrix=None, disabled_train=None)
    stub("lavis.models.blip_models.blip_outputs", BlipOutput=types.SimpleNamespace, BlipOutputFeatures=None)
    former = load(clone, "lavis.models.blip2_models.Qformer")
    base = former.BertPreTrainedModel
    base.init_weights = lambda self: None
    base.get_head_mask = lambda self, mask, n, *_: [None] * n
    base.invert_attention_mask = lambda self, mask: (1.0 - mask[:, None, None].float()) * -1e9
    stage = load(clone, "lavis.models.blip2_models.blip2_qformer")
    stage.dist = types.SimpleNamespace(get_rank=lambda: 0)
    return former, stage


def main(clone: Path) -> None:
    former, stage = official(clone)
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16,
        layer_norm_eps=1e-12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.encoder_width, config.add_cross_attention, config.cross_attention_freq, config.query_length = MEMORY, True, 2, QUERIES
    config.is_decoder, config.use_cache, config.position_embedding_type = False, True, "absolute"
    config.chunk_size_feed_forward = 0
    model = nn.Module.__new__(stage.Blip2Qformer)
    nn.Module.__init__(model)
    model.Qformer = former.BertLMHeadModel(config)
    model.Qformer.cls.predictions.decoder.weight = model.Qformer.bert.embeddings.word_embeddings.weight
    model.Qformer.cls.predictions.decoder.bias = model.Qformer.cls.predictions.bias
    model.query_tokens = nn.Parameter(torch.zeros(1, QUERIES, D))
    model.vision_proj, model.text_proj, model.itm_head = nn.Linear(D, DIM), nn.Linear(D, DIM), nn.Linear(D, 2)
    randomize(model)
    model.temp = nn.Parameter(torch.tensor(0.3))
    model.visual_encoder = model.ln_vision = nn.Identity()
    model.max_txt_len = T

    rng = np.random.default_rng(0)
    ids, mask = rng.integers(1, V - 1, (B, T)), np.arange(T) < np.array(LENGTHS)[:, None]
    ids[~mask] = 0
    encoded = types.SimpleNamespace(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask.astype(int)))
    encoded.to = lambda device: encoded
    tokenizer = lambda *args, **kwargs: encoded
    tokenizer_class = type("Tokenizer", (), {"__call__": staticmethod(tokenizer), "bos_token_id": V - 1, "pad_token_id": 0})
    model.tokenizer = tokenizer_class()
    torch.multinomial = lambda weights, n: weights.argmax()[None]

    memory = torch.tensor(rng.normal(size=(B, TOKENS, MEMORY)), dtype=torch.float32, requires_grad=True)
    out = model.eval()({"image": memory, "text_input": [""] * B})
    out.loss.backward()
    arrays = {"io/tokens": ids, "io/mask": mask, "io/memory": memory.detach().numpy(), "io/dmemory": memory.grad.numpy()}
    arrays |= {f"io/{name}": getattr(out, f"loss_{name}").detach().numpy() for name in ("itc", "itm", "lm")}
    for key, p in model.named_parameters():
        arrays[f"weight/{key}"] = p.detach().numpy()
        assert p.grad is not None, key
        arrays[f"grad/{key}"] = p.grad.numpy()
    np.savez_compressed(HERE / "blip2.npz", **arrays)
    print({k: v.shape for k, v in arrays.items() if k.startswith("weight/")}, [float(arrays[f"io/{n}"]) for n in ("itc", "itm", "lm")])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
