"""Optimisers and learning-rate schedules from config values."""

from collections.abc import Mapping
from typing import Any

import optax

from nd_jax.errors import UserError


def make_schedule(config: Mapping[str, Any], num_steps: int) -> optax.Schedule:
    """Learning rate by update number: linear warm-up from 0, then `constant`, `cosine` or `linear` decay to 0."""
    rate, warmup, decay = config["learning_rate"], config["warmup_steps"], config["decay"]
    after = max(1, num_steps - warmup)
    if decay == "constant":
        main = optax.constant_schedule(rate)
    elif decay == "cosine":
        main = optax.cosine_decay_schedule(rate, after)
    elif decay == "linear":
        main = optax.linear_schedule(rate, 0.0, after)
    else:
        raise UserError(f"optimizer.decay is {decay!r}: use 'constant', 'cosine' or 'linear'")
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), main], [warmup])


def make_optimizer(config: Mapping[str, Any], num_steps: int) -> optax.GradientTransformation:
    """Adam or AdamW behind clipping by global norm (`clip_norm` 0: none).

    Args:
      config: name, learning_rate, warmup_steps, decay, beta1, beta2, epsilon, weight_decay, clip_norm.
      num_steps: updates that the schedule spans.
    """
    schedule = make_schedule(config, num_steps)
    betas = dict(b1=config["beta1"], b2=config["beta2"], eps=config["epsilon"])
    if config["name"] == "adamw":
        main = optax.adamw(schedule, weight_decay=config["weight_decay"], **betas)
    elif config["name"] == "adam":
        main = optax.adam(schedule, **betas)
    else:
        raise UserError(f"optimizer.name is {config['name']!r}: use 'adam' or 'adamw'")
    clip = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    return optax.chain(*clip, main)
