"""The ViT of Qwen-VL with its resampler, from pixels, against the official visual.py."""

from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mllm_jax.connectors.resampler import SincosResamplerConfig
from mllm_jax.encoders import vit
from mllm_jax.nn.param import merge, split
from mllm_jax.types import Media
from tests.connectors.golden import linear, norm, split_heads, stacked
from tests.connectors.test_resampler import qwen
from tests.golden import official

HEADS = 2
VIT = replace(vit.OPENCLIP_BIGG_14_448, width=12, depth=2, heads=HEADS, mlp=24, patch=2, grid=5)
RESAMPLER = SincosResamplerConfig(grid=5, to=3, width=24, heads=2)


def converted(g):
    def layer(i):
        at = f"transformer.resblocks.{i}."
        # Queries, keys and values lie head by head: (head, which, channel).
        three = lambda x: rearrange(x, "(h three k) ... -> three (h k) ...", three=3, h=HEADS)
        out = norm(g, f"{at}ln_1", "norm1") | norm(g, f"{at}ln_2", "norm2")
        for x, w, b in zip("qkv", three(g[f"{at}attn.in_proj.weight"]), three(g[f"{at}attn.in_proj.bias"])):
            out |= split_heads(linear({"x.weight": w, "x.bias": b}, "x", f"attn/{x}"), HEADS)
        out |= split_heads(linear(g, f"{at}attn.out_proj", "attn/o"), HEADS, out=True)
        return out | linear(g, f"{at}mlp.c_fc", "mlp/up") | linear(g, f"{at}mlp.c_proj", "mlp/down")

    encoder = {"patch/kernel": rearrange(g["conv1.weight"], "d c r k -> (r k c) d"), "position": g["positional_embedding"]}
    encoder |= norm(g, "ln_pre", "pre_norm") | stacked([layer(0), layer(1)], "blocks/0")
    return {f"encoder/{k}": v for k, v in encoder.items()} | {f"connector/{k}": v for k, v in qwen(g).items()}


def test_it_is_that_of_qwen_vl():
    io, weights, grads = official.read("qwen_vl_visual")
    patches = rearrange(io["x"], "b c (r i) (k j) -> 1 b (r k) (i j c)", i=2, j=2)
    media = Media(values=jnp.asarray(patches), coords=jnp.zeros((1, 2, 25, 3), int), mask=jnp.ones((1, 2), bool), slot=jnp.zeros((1, 1), int))
    (encoder, fresh), (connector, _) = split(VIT.build(rngs=nnx.Rngs(0))), split(RESAMPLER.build(12, 24, rngs=nnx.Rngs(0)))
    unread = {f"encoder/{k}": v for k, v in fresh.items() if k.startswith("norm/")}            # of the pooled vector, which none has
    part = lambda params, name: {k.removeprefix(name): v for k, v in params.items() if k.startswith(name)}

    def run(params):
        y = merge(connector, part(params, "connector/"))(merge(encoder, part(params, "encoder/"))(media)).tokens.reshape(2, 9, 24)
        return jnp.sum(y * io["pull"]), y

    params = {k: jnp.asarray(v) for k, v in converted(weights).items()}
    d, y = jax.jit(jax.grad(run, has_aux=True))(params | unread)
    np.testing.assert_allclose(y, io["y"], atol=1e-5)           # float32, sums in another order
    for path, g in converted(grads).items():
        np.testing.assert_allclose(d[path], g, atol=1e-5 * max(1, np.abs(g).max()), err_msg=path)


def test_published_sizes():
    """Counted in the official module at full width; ours has the norm of a pooled vector besides."""
    size = lambda f: sum(x.size for x in jax.tree.leaves(jax.eval_shape(f)))
    assert size(lambda: vit.OPENCLIP_BIGG_14_448.build(rngs=nnx.Rngs(0))) == 1_842_770_688 + 2 * 1664
    full = SincosResamplerConfig(grid=32, to=16, width=4096, heads=32)
    assert size(lambda: full.build(1664, 4096, rngs=nnx.Rngs(0))) == 91_791_360
