"""Layers that several networks share."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def sinusoid(values: jax.Array, channels: int) -> jax.Array:
    """float [B] -> float32 [B, channels], cosines first, frequencies 10000^(-2i / channels); `channels` is even."""
    half = channels // 2
    frequency = np.exp(-math.log(10000.0) * np.arange(half) / half).astype(np.float32)
    angle = values.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TokenEmbedding(nn.Module):
    """Row lookup: ids int32 [...] -> [..., features] in `dtype`. Parameter `embedding` [vocab, features].

    Unlike `nn.Embed` it gathers the sharded table before the lookup. Otherwise the rows come out split the way the
    table is, and the partitioner replicates the whole batch to split it again by rows.
    """

    vocab_size: int
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    embedding_init: nn.initializers.Initializer = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        shape = (self.vocab_size, self.features)
        table = self.param("embedding", self.embedding_init, shape, self.param_dtype).astype(self.dtype)
        return jnp.take(nn.with_logical_constraint(table, (None, None)), ids, axis=0)


class ConditioningMLP(nn.Module):
    """Two layers with a SiLU between them, of timesteps, pooled texts and sizes: [B, features in] -> [B, width]."""

    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = lambda name: nn.Dense(
            self.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(0.02),
            name=name,
        )
        return dense("out")(nn.silu(dense("hidden")(x)))
