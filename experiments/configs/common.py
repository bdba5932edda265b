"""What the configs of all methods have in common."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from nd_jax.errors import UserError


def choose_variant(file: str, variant: str, variants: Mapping[str, Callable[[], ConfigDict]]) -> ConfigDict:
    """The config of a variant.

    Raises:
      UserError: the file has no such variant.
    """
    if variant not in variants:
        raise UserError(f"{file} has no variant {variant!r}: use {' or '.join(variants)}")
    return variants[variant]()


def base_config(method: str, unit: str, **entries: Any) -> ConfigDict:
    """Seed, dtype, mesh and optimiser, for a method to change.

    Args:
      method: name in nd_jax/distill/registry.py.
      unit: what a row of a batch is, for progress lines.
      **entries: of the method.
    """
    return ConfigDict(
        {
            "method": method,
            "unit": unit,
            "seed": 0,
            "dtype": "float32",
            "microbatches": 1,
            "ema_decay": 0.0,
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4,
                "warmup_steps": 1000,
                "decay": "cosine",
                "beta1": 0.9,
                "beta2": 0.95,
                "epsilon": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
            },
            **entries,
        }
    )
