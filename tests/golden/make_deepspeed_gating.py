"""deepspeed_top2.npz: a sparse layer with deepspeed's top-2 gate, tiny: values and gradients, balance loss included.

    git clone https://github.com/microsoft/DeepSpeed && git -C DeepSpeed checkout 38327e07f6cd39b63418f60cedd1651b0be3e7c3
    PYTHONPATH=. python tests/golden/make_deepspeed_gating.py DeepSpeed

The gate is deepspeed's; dispatch and combination are the two einsums of its MOELayer.  Its noise is recorded as if it
were a weight.  One row of 24 tokens, 4 experts, capacity factor 0.6: some tokens find no room.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.golden.official import load, package, randomize, record

EXPERTS, WIDTH, HIDDEN, TOKENS, CAPACITY = 4, 12, 20, 24, 0.6


class Sparse(nn.Module):
    def __init__(self, gate: types.ModuleType):
        super().__init__()
        self.gate = gate
        self.wg = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.fc1 = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(EXPERTS))
        self.fc2 = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(EXPERTS))
        self.noise = nn.Parameter(torch.zeros(TOKENS, EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gate.gumbel_rsample = lambda shape, device: self.noise.detach()
        # A copy: this version adds the noise in place.
        balance, combine, dispatch, _ = self.gate.top2gating(self.wg(x) * 1.0, CAPACITY, 0)
        rows = torch.einsum("sec,sm->ecm", dispatch.float(), x)
        rows = torch.stack([self.fc2[e](nn.functional.gelu(self.fc1[e](rows[e]), approximate="tanh")) for e in range(EXPERTS)])
        y = torch.einsum("sec,ecm->sm", combine, rows)
        print("choices without room:", 2 * TOKENS - int(dispatch.sum()))
        return torch.cat([y.flatten(), balance[None]])


def main(clone: Path) -> None:
    silent = types.ModuleType("stub")
    silent.__getattr__ = lambda name: None
    package(clone, "deepspeed", utils=silent, comm=silent)
    for name in ("deepspeed.utils.timer", "deepspeed.utils.bwc", "deepspeed.moe.mappings"):
        sys.modules[name] = silent
    sys.modules["deepspeed"].comm = silent
    package(clone, "deepspeed.moe")
    layer = randomize(Sparse(load(clone, "deepspeed.moe.sharded_moe")))
    with torch.no_grad():
        layer.noise.copy_(-torch.log(-torch.log(torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2)))))
    record("deepspeed_top2", layer, np.random.default_rng(0).normal(size=(TOKENS, WIDTH)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
