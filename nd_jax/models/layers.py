"""Layers that several networks share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


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
