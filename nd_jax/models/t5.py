"""T5 v1.1 encoder and the distilled T5 (DT5) with its projection.

Agrees with `transformers.T5EncoderModel` and with `T5EncoderWithProjection` of the public Neodragon code.

    h_0     = E[ids]                                                                     (1)
    h_k+½   = h_k + O softmax(Q n(h_k) (K n(h_k))^T + b) V n(h_k)                        (2)
    h_k+1   = h_k+½ + W_down(gelu(W_gate n(h_k+½)) * W_up n(h_k+½))                      (3)
    n(x)    = scale * x / sqrt(mean(x^2) + eps),  in float32, no mean subtracted         (4)
    output  = n(h_N)                                                                     (5)
    DT5     = W_2 relu(W_1 output)                                                       (6)

Logits are not divided by sqrt(d_kv). The bias b is one learned table of relative positions that every block
shares, plus the padding mask.

Shape letters: B batch, L tokens, D model width, H heads, K head width, F feed-forward width, N blocks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nd_jax.models.layers import TokenEmbedding

# Large enough to remove a padded key in float32 and bfloat16, and finite, so that a row without any valid key is
# a uniform average instead of NaN.
MASKED_LOGIT = -1e9

LOGICAL_AXES = (
    (r"token_embedding/embedding$", ("vocab", "embed")),
    (r"attention/(query|key|value)/kernel$", ("layers", "embed", "heads")),
    (r"attention/out/kernel$", ("layers", "heads", "embed")),
    (r"mlp/(gate|up)/kernel$", ("layers", "embed", "mlp")),
    (r"mlp/down/kernel$", ("layers", "mlp", "embed")),
    (r"projection_hidden/kernel$", ("embed", "mlp")),
    (r"projection_out/kernel$", ("mlp", "embed")),
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; the defaults are flan-t5-base."""

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 12
    num_heads: int = 12
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class DistilT5Config:
    """The encoder's sizes and the width of the projection behind it."""

    encoder: T5Config = T5Config()
    projection_dim: int = 4096


T5_XXL = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)


class T5Output(NamedTuple):
    """`hidden` [B, L, D]; `block_states` [N, B, L, D], each block's input, or None when not asked for."""

    hidden: jax.Array
    block_states: jax.Array | None


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair for bidirectional attention, int32 [length, length].

    Half of the buckets serve keys behind the query, half those in front; within each half, the first half is exact and
    the rest grows logarithmically up to `max_distance` (`T5Attention._relative_position_bucket` in transformers).
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    magnitude = np.abs(distance)
    # float32 on purpose: at the exact powers the rounding decides the bucket, and the reference rounds so.
    ratio = np.log(np.maximum(magnitude, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        np.log(max_distance / exact)
    )
    large = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return ((distance > 0) * half + np.where(magnitude < exact, magnitude, large)).astype(np.int32)


def attention_bias(relative_bias: jax.Array, mask: jax.Array, config: T5Config) -> jax.Array:
    """Additive logits: relative positions plus the padding mask.

    Args:
      relative_bias: [buckets, H], the learned table.
      mask: [B, L], 1 or True for real tokens.
      config: bucket settings.

    Returns:
      float32 [B, H, L, L].
    """
    buckets = relative_position_buckets(
        mask.shape[-1], config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    bias_1HLL = jnp.transpose(relative_bias.astype(jnp.float32)[buckets], (2, 0, 1))[None]
    mask_B11L = jnp.where(mask[:, None, None, :] > 0, 0.0, MASKED_LOGIT).astype(jnp.float32)
    return bias_1HLL + mask_B11L


class RMSNorm(nn.Module):
    """Equation 4: float32 inside, the input's dtype outside."""

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scale32 = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (x32 * jax.lax.rsqrt(variance + self.epsilon) * scale32).astype(x.dtype)


def _dense(features: int, stddev: float, name: str, dtype: Any, param_dtype: Any) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nn.initializers.normal(stddev),
        name=name,
    )


class T5Attention(nn.Module):
    """Self-attention of equation 2, without the residual sum. Initialised as in transformers."""

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, bias_BHLL: jax.Array) -> jax.Array:
        cfg = self.config
        inner = cfg.num_heads * cfg.d_kv

        def project(name: str, stddev: float) -> jax.Array:
            y = _dense(inner, stddev, name, self.dtype, self.param_dtype)(x_BLD)
            return y.reshape(*y.shape[:-1], cfg.num_heads, cfg.d_kv)

        q_BLHK = project("query", (cfg.d_model * cfg.d_kv) ** -0.5)
        k_BLHK = project("key", cfg.d_model**-0.5)
        v_BLHK = project("value", cfg.d_model**-0.5)
        logits_BHLL = jnp.einsum("blhk,bmhk->bhlm", q_BLHK, k_BLHK, preferred_element_type=jnp.float32)
        weights_BHLL = nn.softmax(logits_BHLL + bias_BHLL).astype(self.dtype)
        mixed_BLHK = jnp.einsum("bhlm,bmhk->blhk", weights_BHLL, v_BLHK)
        mixed = mixed_BLHK.reshape(*x_BLD.shape[:-1], inner)
        return _dense(cfg.d_model, inner**-0.5, "out", self.dtype, self.param_dtype)(mixed)


class T5FeedForward(nn.Module):
    """Gated GELU (tanh form) of equation 3, without the residual sum."""

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        cfg = self.config
        dense = lambda n, f, s: _dense(f, s, n, self.dtype, self.param_dtype)
        gate = nn.gelu(dense("gate", cfg.d_ff, cfg.d_model**-0.5)(x_BLD), approximate=True)
        hidden_BLF = gate * dense("up", cfg.d_ff, cfg.d_model**-0.5)(x_BLD)
        hidden_BLF = nn.with_logical_constraint(hidden_BLF, ("batch", "length", "activation_mlp"))
        return dense("down", cfg.d_model, cfg.d_ff**-0.5)(hidden_BLF)


class T5Block(nn.Module):
    """One block, equations 2 and 3: (residual [B, L, D], bias [B or 1, H, L, L]) -> residual."""

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, bias_BHLL: jax.Array) -> jax.Array:
        eps = self.config.layer_norm_epsilon
        args = (self.config, self.dtype, self.param_dtype)
        normed = RMSNorm(eps, self.param_dtype, name="attention_norm")(x_BLD)
        x_BLD = x_BLD + T5Attention(*args, name="attention")(normed, bias_BHLL)
        normed = RMSNorm(eps, self.param_dtype, name="mlp_norm")(x_BLD)
        x_BLD = x_BLD + T5FeedForward(*args, name="mlp")(normed)
        return nn.with_logical_constraint(x_BLD, ("batch", "length", "activation_embed"))


class _ScannedBlock(nn.Module):
    """`T5Block` with the signature that `nn.scan` wants: the carry in and out, and the block's input if asked for."""

    config: T5Config
    dtype: Any
    param_dtype: Any
    return_block_states: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, bias_BHLL: jax.Array):
        # share_scope keeps the parameters of the block at the top of the stacked tree.
        block = T5Block(self.config, self.dtype, self.param_dtype)
        nn.share_scope(self, block)
        return block(x_BLD, bias_BHLL), (x_BLD if self.return_block_states else None)


class T5Encoder(nn.Module):
    """T5 v1.1 encoder. Block parameters are stacked on axis 0 (`blocks/...`).

    Attributes:
      config: sizes.
      dtype: computation dtype; norms and softmax are float32 whatever it is.
      param_dtype: dtype of initialised parameters.
      remat: recompute each block in the backward pass.
    """

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array, return_block_states: bool = False) -> T5Output:
        """Args: ids int32 [B, L]; mask int32 or bool [B, L], 1 for real tokens."""
        cfg = self.config
        embed = TokenEmbedding(cfg.vocab_size, cfg.d_model, self.dtype, self.param_dtype, name="token_embedding")
        table = self.param(
            "relative_bias",
            nn.initializers.normal(cfg.d_model**-0.5),
            (cfg.relative_attention_num_buckets, cfg.num_heads),
            self.param_dtype,
        )
        x_BLD = nn.with_logical_constraint(embed(ids), ("batch", "length", "activation_embed"))
        bias_BHLL = attention_bias(table, mask, cfg)
        block = nn.remat(_ScannedBlock, prevent_cse=False) if self.remat else _ScannedBlock
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
        )(cfg, self.dtype, self.param_dtype, return_block_states, name="blocks")
        x_BLD, states_NBLD = blocks(x_BLD, bias_BHLL)
        return T5Output(RMSNorm(cfg.layer_norm_epsilon, self.param_dtype, name="final_norm")(x_BLD), states_NBLD)


class DistilT5Projection(nn.Module):
    """Equation 6. The public class has dropout 0.1 between the layers; distillation runs it in evaluation mode."""

    projection_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        dense = lambda n: nn.Dense(
            self.projection_dim, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name=n
        )
        return dense("projection_out")(nn.relu(dense("projection_hidden")(hidden_BLD)))


class DistilT5(nn.Module):
    """DT5: `encoder/...` and the projection; (ids [B, L], mask [B, L]) -> [B, L, projection_dim]."""

    config: DistilT5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        encoder = T5Encoder(self.config.encoder, self.dtype, self.param_dtype, self.remat, name="encoder")
        projection = DistilT5Projection(self.config.projection_dim, self.dtype, self.param_dtype, name="projection")
        return projection(encoder(ids, mask).hidden)
