"""From a recipe's optimizer to optax: clipping, the update rule, decoupled decay, factors, the schedule."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch

import jax.numpy as jnp
import optax

from mllm_jax.config import ConfigError
from mllm_jax.recipe import SGD, Adafactor, Adam, Lion, Optimizer

# Leaves that say how much, not what: decaying them pulls norms and gates away from the identity.
NO_DECAY = {"bias", "head_bias", "scale", "log_scale", "gate", "class_token"}

RULES = {
    Adam: lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
    Lion: lambda o: optax.scale_by_lion(b1=o.b1, b2=o.b2),
    Adafactor: lambda o: optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate=o.decay_rate),
        optax.clip_by_block_rms(1.0),
        optax.ema(o.b1, debias=False) if o.b1 else optax.identity()),
    SGD: lambda o: optax.trace(o.momentum) if o.momentum else optax.identity(),
}


def schedule(cfg: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate at step 0, 1, ...: linear from 0 to the peak, then what `cfg.schedule` says, until `steps`."""
    warmup = round(cfg.warmup * steps) if cfg.warmup < 1 else round(cfg.warmup)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(cfg.lr, rest, alpha=cfg.end),
        "linear": lambda: optax.linear_schedule(cfg.lr, cfg.lr * cfg.end, rest),
        "constant": lambda: optax.constant_schedule(cfg.lr),
        # Before the warm-up ends the step counted from there is negative, and its value is not used.
        "rsqrt": lambda: lambda step: cfg.lr * jnp.sqrt(max(warmup, 1) / (jnp.maximum(step, 0) + max(warmup, 1))),
    }
    if cfg.schedule not in after:
        raise ConfigError(f"optimizer.schedule is {cfg.schedule!r}; it can be {', '.join(after)}")
    if warmup == 0:
        return after[cfg.schedule]()
    # The first step moves: a rate of exactly zero would waste it.
    rise = lambda step: cfg.lr * (step + 1) / (warmup + 1)
    return optax.join_schedules([rise, after[cfg.schedule]()], [warmup])


def build(cfg: Optimizer, steps: int, paths: Iterable[str]) -> optax.GradientTransformation:
    """The optimizer of the parameters with these paths.

    Raises:
      ConfigError: a glob of `lr_scale` or `decays` matches no trained parameter.
    """
    factors = learning_rate_factors(cfg.lr_scale, paths := list(paths))
    reached = {path for glob in cfg.decays for path in _matched("decays", glob, paths)}
    decays = {path: path in reached and path.rpartition("/")[2] not in NO_DECAY for path in paths}
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity(),
        RULES[type(cfg)](cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=lambda _: decays) if cfg.weight_decay else optax.identity(),
        optax.stateless(lambda updates, _: {k: u * factors[k] if k in factors else u for k, u in updates.items()}),
        optax.scale_by_learning_rate(schedule(cfg, steps)),
    )


def learning_rate_factors(lr_scale: Mapping[str, float], paths: list[str]) -> dict[str, float]:
    """{path: factor} of the parameters that a glob names; the last glob that matches wins."""
    out = {}
    for glob, factor in lr_scale.items():
        out |= dict.fromkeys(_matched("lr_scale", glob, paths), factor)
    return out


def _matched(field: str, glob: str, paths: list[str]) -> list[str]:
    matched = [p for p in paths if fnmatch(p, glob)]
    if not matched:
        raise ConfigError(f"optimizer.{field} names {glob!r}, which matches none of the {len(paths)} trained parameters")
    return matched


