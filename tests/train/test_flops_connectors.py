"""Counts of connectors at their published widths, against the matmuls of the traced forward and backward pass."""


import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mllm_jax.connectors.conv import CAbstractorConfig, LDPConfig, LDPv2Config
from mllm_jax.connectors.deformable import DAbstractorConfig
from mllm_jax.connectors.glu import GLUConfig
from mllm_jax.connectors.merge import MergeConfig
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.pool import NestedConfig, PoolConfig
from mllm_jax.connectors.qformer import QFormerConfig, Words
from mllm_jax.connectors.resampler import PerceiverConfig, SincosResamplerConfig
from mllm_jax.connectors.shuffle import ShuffleConfig
from mllm_jax.nn.param import LayerNorm, merge, split
from mllm_jax.train.flops_connectors import CONNECTORS
from mllm_jax.types import Features
from tests.train.test_flops import matmul_flops

CASES = [
    (MLPConfig(), 1024, 4096), (MergeConfig(), 1280, 3584), (NestedConfig(grid=16, windows=(1, 2, 4)), 1024, 4096),
    (PoolConfig(grid=16, to=8, before=MLPConfig(), after=MLPConfig(depth=1)), 1024, 4096),
    (ShuffleConfig(grid=16, side=4, mlp=MLPConfig(depth=1, bias=False)), 768, 2048),
    (ShuffleConfig(grid=16, mlp=MLPConfig(norm=LayerNorm())), 1024, 3584),
    (CAbstractorConfig(grid=16, to=12), 1024, 4096), (CAbstractorConfig(grid=16, to=12, width=1280), 1024, 4096),
    (DAbstractorConfig(grid=16, to=12), 1024, 4096), (DAbstractorConfig(grid=16, to=12, width=1280, heads=8), 1024, 1280),
    (LDPConfig(grid=16), 1024, 2048), (LDPv2Config(grid=16, to=12), 1024, 2048),
    (PerceiverConfig(grid=16), 1024, 1024), (PerceiverConfig(grid=16, frames=2), 1024, 4096),
    (SincosResamplerConfig(grid=32, to=16, width=4096, heads=32), 1664, 4096),
    (SincosResamplerConfig(grid=16, to=8, width=1024, heads=8), 1024, 4096),
    (QFormerConfig(tokens=256), 1408, 2560), (QFormerConfig(tokens=256, words=Words()), 1408, 4096),
    (GLUConfig(hidden=11_008), 1792, 4096),
]


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("cfg", "d_in", "d_out"), CASES, ids=lambda x: type(x).__name__ if not isinstance(x, int) else "")
def test_the_count_is_that_of_the_traced_connector(cfg, d_in, d_out, trained, below):
    """Where the encoder trains and where it does not. Depthwise convolutions, pooling and the hats are the difference."""
    made, n = {}, 2 * 16**2 if getattr(cfg, "grid", 16) == 16 else 2 * cfg.grid**2

    def build():
        made["graph"], params = split(cfg.build(d_in, d_out, rngs=nnx.Rngs(0)))
        return params

    params = jax.eval_shape(build)
    x = jax.ShapeDtypeStruct((1, n, d_in), jnp.float32)

    def loss(params, x):
        text = jnp.zeros((1, 2, cfg.words.length), jnp.int32) if getattr(cfg, "words", None) else None
        return jnp.sum(merge(made["graph"], params)(Features(tokens=x, mask=jnp.ones((1, n), bool), text=text)).tokens)

    wanted = (*([0] if trained else []), *([1] if below else []))
    program = jax.grad(loss, wanted) if wanted else loss
    traced = matmul_flops(jax.make_jaxpr(program)(params, x).jaxpr)
    paths = set(params) if trained else set()
    learning = {path.rsplit("/", k)[0] for path in paths for k in range(path.count("/") + 1)} | ({""} if trained else set())
    trains = lambda path: path.removeprefix("c").removeprefix("/") in learning
    counted, paths_counted = 0.0, set()
    for _, passes, matmuls in CONNECTORS[type(cfg)](cfg, "c", d_in, d_out, float(n), below, trains):
        for m in matmuls:
            back = passes or bool(m.after and trains(m.after))
            if m.path:
                paths_counted.add(m.path.removeprefix("c/"))
                counted += 2 * m.inputs * m.outputs * m.times * (1 + trained + back)
            else:
                counted += 2 * m.inputs * m.outputs * m.times * (3 if back else 1)
    assert paths_counted == {k for k in params if k.endswith("kernel")}
    # The D-Abstractor looks through a matrix over all patches, of which the points that count are a small part.
    assert counted == pytest.approx(traced, rel=0.1 if isinstance(cfg, DAbstractorConfig) else 0.03)


def test_half_the_images_are_half_the_work():
    cfg = CAbstractorConfig(grid=16, to=12, depth=2)
    total = lambda n: sum(m.inputs * m.outputs * m.times for _, _, ms in CONNECTORS[type(cfg)](cfg, "c", 8, 8, n, True, bool) for m in ms)
    assert total(512.0) == 2 * total(256.0)
