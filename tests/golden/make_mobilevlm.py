"""mobilevlm_ldp.npz, mobilevlm_ldpv2.npz: the projectors of MobileVLM (arXiv:2312.16886) and V2 (2402.03766), tiny.

    git clone https://github.com/Meituan-AutoML/MobileVLM && git -C MobileVLM checkout 688fdec914810485c8766da96c63d9d2ce15f750
    pip install torch torchvision timm==0.9.12
    PYTHONPATH=. python tests/golden/make_mobilevlm.py MobileVLM
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch

from tests.golden.official import load, package, randomize, record


def main(clone: Path) -> None:
    package(clone, "mobilevlm")
    package(clone, "mobilevlm.model")
    official = load(clone, "mobilevlm.model.vision_projector")
    rng = np.random.default_rng(0)
    config = types.SimpleNamespace(mm_hidden_size=12, hidden_size=40)
    # 40 / 4 = 10 becomes 16 in the squeeze; a grid of 5 becomes one of 3.
    record("mobilevlm_ldp", randomize(official.LDPNetProjector(config)), rng.normal(size=(2, 25, 12)))
    v2 = official.LDPNetV2Projector(config)
    v2.dwn.dwn[0] = torch.nn.AdaptiveAvgPool2d((3, 3))      # 12 of 24 in the paper
    record("mobilevlm_ldpv2", randomize(v2), rng.normal(size=(2, 25, 12)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
