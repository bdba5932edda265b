"""Transformers within the UNet: pixels attend to each other and to the text.

    x = x + O softmax(Q n(x) (K n(x))^T / sqrt(K)) V n(x)           self-attention                       (1)
    x = x + O softmax(Q n(x) (K c)^T / sqrt(K)) V c                 cross-attention, c the text tokens   (2)
    x = x + W_down (v * gelu(g)),   [v, g] = W_up n(x)              exact GELU                           (3)
    y = image + W_out blocks(W_in n_group(image))                   blocks of (1) to (3)                 (4)

Layer norms within the blocks have eps 1e-5, the group norm of (4) 1e-6. Queries, keys and values have no bias. Agrees
with `BasicTransformerBlock` and `Transformer2DModel` of diffusers with linear projections.

Shape letters: B batch, L pixels, T text tokens, D width, E width of the text, H heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from nd_jax.models.attention import ATTENTION
from nd_jax.models.image_layers import GroupNorm, LayerNorm

BLOCK_NORM_EPSILON = 1e-5
TRANSFORMER_NORM_EPSILON = 1e-6
MLP_RATIO = 4


class Attention(nn.Module):
    """Multi-head attention of x [B, L, D] to `context` [B, T, E]: [B, L, D].

    Attributes:
      heads: of the attention.
      attention: a key of `attention.ATTENTION`.
    """

    heads: int
    attention: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context_BTE: jax.Array) -> jax.Array:
        dense = lambda name, bias=False: nn.Dense(
            x_BLD.shape[-1], use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )
        split = lambda y: nn.with_logical_constraint(
            y.reshape(*y.shape[:-1], self.heads, -1), ("batch", "length", "activation_heads", None)
        )
        query = split(dense("query")(x_BLD))
        key, value = (split(dense(name)(context_BTE)) for name in ("key", "value"))
        return dense("out", bias=True)(ATTENTION[self.attention](query, key, value, None).reshape(x_BLD.shape))


class GatedFeedForward(nn.Module):
    """Equation 3 without the norm and the sum: [B, L, D] -> [B, L, D]."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        width, dtypes = x_BLD.shape[-1], dict(dtype=self.dtype, param_dtype=self.param_dtype)
        value, gate = jnp.split(nn.Dense(2 * MLP_RATIO * width, name="up", **dtypes)(x_BLD), 2, axis=-1)
        hidden = nn.with_logical_constraint(
            value * nn.gelu(gate, approximate=False), ("batch", "length", "activation_mlp")
        )
        return nn.Dense(width, name="down", **dtypes)(hidden)


class TransformerBlock(nn.Module):
    """Equations 1 to 3 as `nn.scan` wants them: (x [B, L, D], text [B, T, E]) -> (x, None)."""

    heads: int
    attention: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context_BTE: jax.Array) -> tuple[jax.Array, None]:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = lambda name: LayerNorm(BLOCK_NORM_EPSILON, self.param_dtype, name=name)
        attend = lambda name: Attention(self.heads, self.attention, name=name, **dtypes)
        normed = norm("self_norm")(x_BLD)
        x_BLD = x_BLD + attend("self_attention")(normed, normed)
        x_BLD = x_BLD + attend("cross_attention")(norm("cross_norm")(x_BLD), context_BTE)
        x_BLD = x_BLD + GatedFeedForward(name="mlp", **dtypes)(norm("mlp_norm")(x_BLD))
        return nn.with_logical_constraint(x_BLD, ("batch", "length", "activation_embed")), None


class ImageTransformer(nn.Module):
    """Equation 4: (image [B, H, W, D], text [B, T, E]) -> [B, H, W, D]. Blocks are stacked on axis 0 (`blocks/...`).

    Attributes:
      depth: number of blocks.
      heads: of their attention.
      groups: of the group norm.
      attention: a key of `attention.ATTENTION`.
    """

    depth: int
    heads: int
    groups: int
    attention: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, context_BTE: jax.Array) -> jax.Array:
        width, dtypes = image.shape[-1], dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x_BLD = GroupNorm(self.groups, TRANSFORMER_NORM_EPSILON, self.param_dtype, name="norm")(image)
        x_BLD = nn.Dense(width, name="proj_in", **dtypes)(x_BLD.reshape(image.shape[0], -1, width))
        blocks = nn.scan(
            TransformerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        x_BLD, _ = blocks(self.heads, self.attention, name="blocks", **dtypes)(x_BLD, context_BTE)
        return image + nn.Dense(width, name="proj_out", **dtypes)(x_BLD).reshape(image.shape)
