import math

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.connectors.conv import CAbstractorConfig, Depthwise, LDPConfig, LDPv2Config, eighths
from mllm_jax.nn.param import axes_of, merge, split
from mllm_jax.sharding import Layout, rows, sharding_of, use
from mllm_jax.types import Features
from tests.connectors.golden import check_official, depthwise, linear, norm, stacked
from tests.contracts import check_connector
from tests.golden.official import read
from tests.synthetic import randomized


@pytest.mark.parametrize("cfg", [
    CAbstractorConfig(grid=4, to=3, width=12, depth=2, table=3), LDPConfig(grid=4), LDPv2Config(grid=4, to=2),
])
def test_contract(cfg):
    check_connector(cfg)


def reg_block(g, theirs):
    out = linear(g, f"{theirs}.conv1.conv", "conv1") | norm(g, f"{theirs}.conv1.bn", "norm1")
    out |= depthwise(g, f"{theirs}.conv2.conv", "conv2") | norm(g, f"{theirs}.conv2.bn", "norm2")
    out |= linear(g, f"{theirs}.se.fc1", "excite/down") | linear(g, f"{theirs}.se.fc2", "excite/up")
    out |= linear(g, f"{theirs}.conv3.conv", "conv3") | norm(g, f"{theirs}.conv3.bn", "norm3")
    if f"{theirs}.downsample.conv.weight" in g:
        out |= linear(g, f"{theirs}.downsample.conv", "shortcut") | norm(g, f"{theirs}.downsample.bn", "shortcut_norm")
    return out


def c_abstractor(g):
    out = {"position": g["pos_emb"][0]} | linear(g, "readout.0", "readout/layers/0") | linear(g, "readout.2", "readout/layers/1")
    for ours, stage in (("before", 0), ("after", 2)):
        first, *rest = (reg_block(g, f"net.{stage}.b{i}") for i in (1, 2, 3))
        out |= {f"{ours}/first/{k}": v for k, v in first.items()} | stacked(rest, f"{ours}/blocks/0")
    return out


def test_c_abstractor_is_that_of_honeybee():
    check_official(CAbstractorConfig(grid=5, to=3, width=16), read("honeybee_c_abstractor"), c_abstractor)


def mobile_block(g, theirs, ours):
    out = depthwise(g, f"{theirs}.0.0", f"{ours}/depthwise") | norm(g, f"{theirs}.0.1", f"{ours}/norm1")
    out |= linear(g, f"{theirs}.1.fc1", f"{ours}/excite/down") | linear(g, f"{theirs}.1.fc2", f"{ours}/excite/up")
    return out | linear(g, f"{theirs}.2.0", f"{ours}/pointwise") | norm(g, f"{theirs}.2.1", f"{ours}/norm2")


def ldp(g):
    mlp = linear(g, "model.mlp.1", "mlp/layers/0") | linear(g, "model.mlp.3", "mlp/layers/1")
    return mlp | mobile_block(g, "model.mb_block.1.block", "mix") | mobile_block(g, "model.mb_block.2.block", "halve")


def test_ldp_is_that_of_mobilevlm():
    check_official(LDPConfig(grid=5), read("mobilevlm_ldp"), ldp)


def test_ldpv2_is_that_of_mobilevlm_v2():
    mlp = lambda g: linear(g, "mlp.mlp.0", "mlp/layers/0") | linear(g, "mlp.mlp.2", "mlp/layers/1")
    check_official(LDPv2Config(grid=5, to=3), read("mobilevlm_ldpv2"), lambda g: mlp(g) | depthwise(g, "peg.peg.0", "position"))


@pytest.mark.parametrize(("cfg", "d_out", "size"), [
    (CAbstractorConfig(grid=16, to=12), 4096, 37_070_336), (LDPConfig(grid=24), 2048, 18_936_832),
    (LDPv2Config(grid=24, to=12), 2048, 6_316_032), (LDPv2Config(grid=24, to=12), 2560, 9_205_760),
])
def test_published_sizes(cfg, d_out, size):
    """Those of the official modules at full width, behind ViT-L."""
    shapes = jax.eval_shape(lambda: cfg.build(1024, d_out, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == size


def test_a_depthwise_convolution_by_hand():
    """Channel 0 sums the 3x3 around a pixel, channel 1 takes its right neighbour; outside are zeros."""
    graph, _ = split(Depthwise(2, stride=2, rngs=nnx.Rngs(0)))
    kernel = jnp.zeros((3, 3, 2)).at[..., 0].set(1).at[1, 2, 1].set(1)
    x = jnp.arange(9.0).reshape(1, 3, 3, 1).repeat(2, axis=-1)
    y = merge(graph, {"kernel": kernel})(x)
    np.testing.assert_array_equal(y[0, ..., 0], [[0 + 1 + 3 + 4, 1 + 2 + 4 + 5], [3 + 4 + 6 + 7, 4 + 5 + 7 + 8]])
    np.testing.assert_array_equal(y[0, ..., 1], [[1, 0], [7, 0]])


@pytest.mark.parametrize(("n", "out"), [(512, 512), (640, 640), (10, 16), (2, 8), (12, 16), (11, 16), (18, 24), (17, 16)])
def test_eighths_are_those_of_mobilenet(n, out):
    assert eighths(n) == out


@pytest.mark.parametrize("cfg", [CAbstractorConfig(grid=4, to=2, width=8, depth=1), LDPConfig(grid=4), LDPv2Config(grid=4, to=2)])
def test_an_item_does_not_see_its_neighbours(cfg):
    graph, params = split(cfg.build(3, 8, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 32, 3))
    f = jax.jit(lambda x: merge(graph, params)(Features(tokens=x, mask=jnp.ones(x.shape[:2], bool))).tokens)
    np.testing.assert_array_equal(f(x.at[:, 16:].set(7.0))[:, :4], f(x)[:, :4])


def test_a_grid_that_is_not_the_encoders_is_said():
    for cfg, name in ((CAbstractorConfig(grid=24, to=12), "C-Abstractor"), (LDPConfig(grid=24), "LDP"), (LDPv2Config(grid=24, to=12), "LDPv2")):
        assert cfg.num_tokens((2, 24, 24)) == (2, 12, 12)
        with pytest.raises(ConfigError, match=f"the {name} reads grids of 24x24 tokens; the encoder gives 16x16: set its grid to 16"):
            cfg.num_tokens((1, 16, 16))


@pytest.mark.parametrize("cfg", [CAbstractorConfig(grid=4, to=2, width=32, depth=2), LDPConfig(grid=4), LDPv2Config(grid=4, to=2)],
                         ids=lambda cfg: type(cfg).__name__)
def test_a_mesh_changes_no_gradient(cfg):
    """Rows over two axes and channels over a third, where XLA by itself gets those of neighbours wrong."""
    graph, params = split(module := cfg.build(32, 32, rngs=nnx.Rngs(0)))
    axes, params = axes_of(module), randomized(params)
    x, pull = (jax.random.normal(jax.random.key(i), (8, n, 32)) for i, n in enumerate((32, 8)))

    def gradients(layout: Layout) -> dict:
        mesh = layout.make_mesh(jax.devices()[: math.prod(layout.mesh.values())])
        with use(layout, mesh):
            placed = {k: jax.device_put(v, sharding_of(axes[k], v.shape, layout, mesh)) for k, v in params.items()}
            loss = lambda p, x: jnp.sum(merge(graph, p)(Features(tokens=x, mask=jnp.ones(x.shape[:2], bool))).tokens * pull)
            return jax.jit(jax.grad(loss))(placed, jax.device_put(x, rows(mesh)))

    one, many = gradients(Layout(mesh={"data": 1})), gradients(Layout(mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    for name, want in one.items():      # sums in another order
        np.testing.assert_allclose(many[name], want, atol=2e-5 * float(jnp.abs(want).max()), err_msg=name)
