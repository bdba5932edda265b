"""Low-rank updates (LoRA, arXiv 2106.09685) as a pure function of parameters.

    W' = W + (alpha / r) A B,   A [.., in, r] ~ N(0, 1/in),   B [.., r, out] = 0

The model never knows: the merged kernels go through the ordinary `apply`. Kernels of stacked blocks keep their leading
axis.
"""

import re

import jax
import jax.numpy as jnp
from flax import traverse_util

from nd_jax.distill.base import Params


def init_lora(key: jax.Array, params: Params, patterns: tuple[str, ...], rank: int) -> Params:
    """Factors for every kernel whose path matches: {path: {"a": [.., in, rank], "b": [.., rank, out]}}, float32."""
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = sorted(p for p in flat if any(re.search(pattern, p) for pattern in patterns))
    if not chosen:
        raise ValueError(f"no kernel matches {patterns}")
    factors = {}
    for path, k in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *lead, fan_in, fan_out = flat[path].shape
        a = jax.random.normal(k, (*lead, fan_in, rank), jnp.float32) * fan_in**-0.5
        factors[path] = {"a": a, "b": jnp.zeros((*lead, rank, fan_out), jnp.float32)}
    return traverse_util.unflatten_dict(factors, sep="/")


def merge_lora(params: Params, factors: Params, alpha: float) -> Params:
    """Kernels with their updates added; every other parameter as it was."""
    flat = traverse_util.flatten_dict(params, sep="/")
    low_rank = traverse_util.flatten_dict(factors, sep="/")
    for path in sorted({p.rsplit("/", 1)[0] for p in low_rank}):
        a, b = low_rank[f"{path}/a"], low_rank[f"{path}/b"]
        update = jnp.einsum("...ir,...ro->...io", a, b) * (alpha / a.shape[-1])
        flat[path] = flat[path] + update.astype(flat[path].dtype)
    return traverse_util.unflatten_dict(flat, sep="/")
