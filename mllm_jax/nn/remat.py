"""What a layer keeps for its backward pass, and where; the rest is computed again.

A layout says it in words joined by "+":

    none                  all that the backward pass reads
    full                  nothing but what enters the layer
    dots                  all matrix products with weights
    qkv+attention         what bears these names (below)
    qkv+host:mlp          the same, the second in the memory of the host, over PCIe

Bytes of one layer and token of width d: qkv (2 + 2 kv_heads / heads) d, attention 2 d, out 2 d, mlp 2 x (2 with a gate) x hidden,
in bfloat16; what is not kept costs its product once more.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from mllm_jax.config import ConfigError, nearest

NAMES = {
    "qkv": "queries, keys and values, before their norms and rotations",
    "attention": "what attention gives, and what its kernel needs to go back",
    "out": "the output matrix of attention",
    "mlp": "the first products of a feed-forward layer, before its activation",
}
LOW = "low"                             # what a product in eight bits gives, in the compute dtype (nn/quantized.py)


def _dots(prim: object, *inputs: jax.core.ShapedArray, **params: object) -> bool:
    """Products with weights; of those in eight bits not the sums, which are twice as wide as what is made of them."""
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *inputs, **params) and inputs[0].dtype.itemsize > 1


WHOLE = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(_dots, jax.checkpoint_policies.save_only_these_names(LOW)),
}
HOST = "host:"


def keep(x: jax.Array, name: str) -> jax.Array:
    """x, which a policy may keep under this name."""
    return checkpoint_name(x, name)


def policy(words: str) -> Callable[..., object] | None:
    """A policy of jax.checkpoint; None: nothing is computed again.

    Raises:
      ConfigError: a word that is not known, or one given twice.
    """
    if words == "none":
        return None
    if words in WHOLE:
        return WHOLE[words]
    here = [w for w in words.split("+") if not w.startswith(HOST)]
    there = [w.removeprefix(HOST) for w in words.split("+") if w.startswith(HOST)]
    for word in (*here, *there):
        if word not in NAMES:
            known = ["none", *WHOLE, *NAMES, *(HOST + n for n in NAMES)]
            raise ConfigError(f"remat={words!r}: {word!r} is nothing that a layer keeps; nearest: {nearest(word, known)}")
    if len({*here, *there}) < len(here) + len(there):
        raise ConfigError(f"remat={words!r} names something twice; name it once")
    if not there:
        return jax.checkpoint_policies.save_only_these_names(*here)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=here, names_which_can_be_offloaded=there, offload_src="device", offload_dst="pinned_host")
