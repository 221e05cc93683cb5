"""honeybee_c_abstractor.npz, honeybee_d_abstractor.npz: the projectors of Honeybee (arXiv:2312.06742), tiny.

    git clone https://github.com/khanrc/honeybee && git -C honeybee checkout 68a8d843404b00be65ff16bb149f6a0107c66dff
    pip install torch torchvision timm==0.9.12 transformers==4.34.1 einops
    PYTHONPATH=. python tests/golden/make_honeybee.py honeybee

The D-Abstractor is that of configs/model_config/d-abs.yaml: queries pooled from the image, learned points.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch

from tests.golden.official import load, package, randomize, record


def main(clone: Path) -> None:
    # The configuration class asks the Hub for an encoder; the projectors read only its fields.
    configuration = types.ModuleType("honeybee.configuration_honeybee")
    configuration.HoneybeeVisualProjectorConfig = types.SimpleNamespace
    package(clone, "honeybee", configuration_honeybee=configuration)
    projectors = package(clone, "honeybee.projectors")
    vars(projectors).update(vars(load(clone, "honeybee.projectors.projectors")))
    rng = np.random.default_rng(0)

    # Channels change in the first block; windows of 5 -> 3 overlap.
    c = projectors.CAbstractor(types.SimpleNamespace(
        encoder_hidden_size=12, hidden_size=16, output_hidden_size=10, depth=3, mlp_depth=2, num_query_tokens=9, pos_emb=True,
        num_eos_tokens=0), 25)
    record("honeybee_c_abstractor", randomize(c), rng.normal(size=(2, 25, 12)), lambda x: c(x).last_hidden_state)

    from transformers.models.deformable_detr import DeformableDetrConfig

    # It moves its input to a GPU by this name.
    torch.cuda.FloatTensor = torch.FloatTensor
    dabs = load(clone, "honeybee.projectors.dabs")
    config = DeformableDetrConfig(
        d_model=16, decoder_layers=2, decoder_ffn_dim=24, decoder_attention_heads=2, decoder_n_points=3, num_feature_levels=1,
        num_queries=9, use_pretrained_backbone=False, encoder_hidden_size=12, output_hidden_size=10, num_eos_tokens=0,
        feature_layer_index=-1, pos_emb=True, pooled_v_target="query", disable_custom_kernels=True)
    d = randomize(dabs.DAbstractor(config, 25))
    with torch.no_grad():               # a grid that learning has moved, a point of it outside of the image
        d.reference_points.copy_(torch.rand(d.reference_points.shape, generator=torch.Generator().manual_seed(2)) * 1.2 - 0.1)
    record("honeybee_d_abstractor", d, rng.normal(size=(2, 25, 12)), lambda x: d(x).last_hidden_state)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
