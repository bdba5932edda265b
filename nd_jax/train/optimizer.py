"""Optimisers and learning-rate schedules from config values."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from nd_jax.errors import UserError

# Root mean square of a Muon update in learning rates; that of Adam's updates, so that one rate suits both.
MUON_RMS = 0.2


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
    """Adam, AdamW or Muon behind clipping by global norm (`clip_norm` 0: none).

    "muon" orthogonalises the momentum of kernels (arXiv 2502.16982, whose scaling of updates it takes) and is AdamW for
    all other parameters; `beta1` and `beta2` are AdamW's, Muon's own momentum is 0.95.

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
    elif config["name"] == "muon":
        main = muon(
            schedule,
            adam_b1=config["beta1"],
            adam_b2=config["beta2"],
            eps=config["epsilon"],
            weight_decay=config["weight_decay"],
            adam_weight_decay=config["weight_decay"],
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=kernel_axes,
        )
    else:
        raise UserError(f"optimizer.name is {config['name']!r}: use 'adam', 'adamw' or 'muon'")
    clip = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    return optax.chain(*clip, main)


def kernel_axes(params: Any) -> Any:
    """What Muon sees as matrices: the axes (inputs, outputs) of every kernel, None for all other parameters.

    A kernel's last axis is its output. The first axis of stacked blocks (`blocks/.../kernel`) counts matrices. The
    modulation of a block is left to Adam: it is a stack of vectors that scale and shift, and as large as all of the
    block's attention.
    """

    def axes(path: tuple, x: jax.Array) -> MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        stacked = int("blocks" in names)
        if names[-1] != "kernel" or "modulation" in names or x.ndim < 2 + stacked:
            return None
        return MuonDimensionNumbers(tuple(range(stacked, x.ndim - 1)), (x.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)
