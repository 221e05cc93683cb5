"""A feed-forward layer of which each token uses a part: a router chooses `top_k` of many experts (arXiv:1701.06538).

Two ways to get the tokens to their experts (nn/experts.py):

    dropless    capacity=None: every token reaches all its choices, experts take what comes (MegaBlocks, arXiv:2211.15841)
    capacity    in training an expert takes at most C = ceil(capacity * tokens * top_k / experts) tokens of a row, in the
                order of the row, all first choices before the second ones; the others pass it by (GShard, arXiv:2006.16668)

Tokens are counted in each row of the batch for itself, so that neither microbatches nor devices nor the other rows
change who is left out; deepspeed counts in what one device happens to hold.  With one row the rule is deepspeed's.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.experts import Experts, Routes
from mllm_jax.nn.param import normal, param
from mllm_jax.types import Mean, mean


@config
class MoEConfig:
    experts: int
    top_k: int = 2
    normalize: bool = True              # weights of a token's choices add up to 1 (Mixtral, deepspeed); False: Jamba, Switch
    capacity: float | None = None       # room of an expert over its fair share of a row; None: no token is left out
    min_capacity: int = 0
    explore: bool = False               # in training the choices after the first are drawn by their probabilities (GShard)
    balance: int = 1                    # choices that the balance loss counts: 1 (GShard, Switch) or top_k (Mixtral)

    def build(self, block: BlockConfig, *, rngs: nnx.Rngs) -> "MoE":
        return MoE(self, block, rngs=rngs)

    def tiny(self) -> "MoEConfig":
        return replace(self, experts=max(4, self.top_k))

    def room(self, tokens: int) -> int | None:
        """How many of so many tokens an expert takes; None: all that come."""
        if self.capacity is None:
            return None
        fair = math.ceil(self.capacity * tokens * self.top_k / self.experts)
        return min(max(self.min_capacity, fair), tokens)

    def check(self) -> "MoEConfig":
        """Itself, or a ConfigError that says what to change."""
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k={self.top_k} of {self.experts} experts; it can be 1 to {self.experts}")
        if not 1 <= self.balance <= self.top_k:
            raise ConfigError(f"balance={self.balance} counts more choices than a token has; it can be 1 to top_k={self.top_k}")
        if self.capacity is not None and self.capacity <= 0:
            raise ConfigError(f"capacity={self.capacity}; it is a factor above 0, or None for room without end")
        return self


class MoE(nnx.Module):
    """f[b s d] -> f[b s d], and what the router did: see `report`."""

    def __init__(self, cfg: MoEConfig, block: BlockConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg.check()
        self.router = param(rngs, (block.width, cfg.experts), "embed choice", normal(block.width**-0.5))
        self.experts = Experts(block, cfg.experts, rngs=rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, draws: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Positions where the mask bool[b s] is False take nobody's place, are not counted, and get 0.

        `draws` u32[b] are given in training, and what is drawn is drawn from them.  Without, nothing is left to
        chance and no token left out, so that what a token becomes does not depend on those after it.
        """
        cfg = self.cfg
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        # float32, on chips too that round what a matmul reads: near ties decide who is chosen.
        logits = jnp.einsum("bsd,de->bse", x.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
        room = None if draws is None else cfg.room(x.shape[1])
        noise = gumbel(draws, logits.shape[1:]) if cfg.explore and draws is not None else None
        choice, routes = route(cfg, logits, mask, room, noise)
        return self.experts(x, routes, room), report(cfg, logits, mask, choice, routes)


def route(
    cfg: MoEConfig, logits: jax.Array, mask: jax.Array, room: int | None = None, noise: jax.Array | None = None,
) -> tuple[jax.Array, Routes]:
    """f32[b s e], bool[b s] -> what tokens choose i32[b s k], and where they go.

    The weights of a token are its probabilities where there is room, and normalized after that: a token that one
    expert leaves out belongs to the other.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    choice = choose(logits, cfg.top_k, noise)
    reached, place = jnp.broadcast_to(mask[..., None], choice.shape), None
    if room is not None:
        place = queue(choice, mask, cfg.experts)
        reached = reached & (place < room)
    weight = jnp.where(reached, jnp.take_along_axis(probs, choice, axis=-1), 0.0)
    if cfg.normalize:
        weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), jnp.finfo(jnp.float32).eps)
    return choice, Routes(expert=jnp.where(reached, choice, cfg.experts), weight=weight, place=place)


def choose(logits: jax.Array, k: int, noise: jax.Array | None = None) -> jax.Array:
    """f[b s e] -> i32[b s k]: the most probable expert, and the next ones with noise on the logits.

    By k times the largest: no partitioner splits `jax.lax.top_k`, and every device would get all rows.
    """
    choice, left = [jnp.argmax(logits, axis=-1)], logits if noise is None else logits + noise
    for _ in range(k - 1):
        left = jnp.where(jax.nn.one_hot(choice[-1], logits.shape[-1], dtype=bool), -jnp.inf, left)
        choice.append(jnp.argmax(left, axis=-1))
    return jnp.stack(choice, axis=-1)


def gumbel(draws: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """u32[b] -> f32[b *shape]; the largest of logits with this noise is a draw from their softmax."""
    return jax.vmap(lambda seed: jax.random.gumbel(jax.random.key(seed), shape))(draws)


def queue(choice: jax.Array, mask: jax.Array, experts: int) -> jax.Array:
    """i32[b s k], bool[b s] -> i32[b s k]: how many of the row stand before this token at the expert of its choice.

    All first choices stand before all second ones; padding does not stand anywhere.
    """
    b, s, k = choice.shape
    lines = jnp.swapaxes(choice, 1, 2).reshape(b, k * s)
    there = jax.nn.one_hot(lines, experts, dtype=jnp.int32) * jnp.tile(mask, (1, k))[..., None]
    place = jnp.sum((jnp.cumsum(there, axis=1) - 1) * there, axis=-1)
    return jnp.swapaxes(place.reshape(b, k, s), 1, 2)


def report(cfg: MoEConfig, logits: jax.Array, mask: jax.Array, choice: jax.Array, routes: Routes) -> dict[str, Mean]:
    """Losses and statistics over real tokens; added over layers they are means over layers.

    balance     E * sum_e p_e f_e: mean probability of an expert times the part of the tokens that choose it, 1 (or
                `cfg.balance`) where all experts are alike; over the rows that run together
    z           mean square of the log-partition (ST-MoE, arXiv:2202.08906, eq. 5)
    entropy     of a token's probabilities, in nats: log E where the router does not care
    most, least the share of all choices that the busiest and the idlest expert get, 1/E where all get the same
    dropped     the part of the choices for which there was no room
    """
    experts, k = cfg.experts, cfg.top_k
    real = mask.astype(jnp.float32)
    tokens = jnp.sum(real)
    part = lambda total: total / jnp.maximum(tokens, 1.0)
    whole = lambda value: Mean(total=value * tokens, count=tokens)
    partition, probs = jax.nn.logsumexp(logits, axis=-1), jax.nn.softmax(logits, axis=-1)
    counts = jnp.sum(jax.nn.one_hot(choice, experts) * real[..., None, None], axis=(0, 1))           # f[k e]
    likely, chosen = part(jnp.sum(probs * real[..., None], axis=(0, 1))), part(jnp.sum(counts[: cfg.balance], axis=0))
    shares = part(jnp.sum(counts, axis=0)) / k
    return {
        "router/balance": whole(experts * jnp.sum(likely * chosen)),
        "router/z": mean(partition**2, real),
        "router/entropy": mean(partition - jnp.sum(probs * logits, axis=-1), real),
        "router/most": whole(jnp.max(shares)),
        "router/least": whole(jnp.min(shares)),
        "router/dropped": Mean(total=k * tokens - jnp.sum(routes.expert < experts), count=k * tokens),
    }
