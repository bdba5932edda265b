"""One joint block of the video transformer: an image stream and a text stream that attend to each other.

Per stream, with its own weights, c = silu(temb) and n(.) a layer norm without affine part:

    [s1, g1, a1, s2, g2, a2] = W_mod c + b_mod         (shift, scale, gate of attention, then of the MLP)    (1)
    u       = n(x) (1 + g1) + s1                                                                             (2)
    q, k, v = heads of W u + b;  q, k = rms(q), rms(k) per head, and for image tokens turned by time         (3)
    o       = softmax(q k^T / sqrt(K)) v over the tokens of both streams that the mask allows                (4)
    y       = x + a1 (W_o o + b_o)                                                                           (5)
    out     = y + a2 MLP(n(y) (1 + g2) + s2),  MLP = W_down gelu(W_up .)                                     (6)

The text stream of the last block ends at (4): its modulation is [scale, shift] and it has no output. Norms, softmax and
modulation are float32 whatever the computation dtype. Agrees with `JointTransformerBlock` of the public code.

Shape letters: B batch, N image tokens, T text tokens, L = T + N, D model width, H heads, K head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from nd_jax.models.attention import ATTENTION, OrderedMask

NORM_EPSILON = 1e-6
HEAD_NORM_EPSILON = 1e-5
MLP_RATIO = 4


class TokenGeometry(NamedTuple):
    """What a block needs to know of its tokens' places; axis 0 is the batch or 1.

    Attributes:
      positions: float32 [B, N, D], spatial positions of the image tokens.
      rotary_cos, rotary_sin: float32 [B, N, K / 2], rotation of the image tokens. Text is at time 0, which turns
        nothing.
      mask: which keys a query may attend to, an `OrderedMask` or bool [B, 1, L, L] with queries on axis 2; text tokens
        come first.
    """

    positions: jax.Array
    rotary_cos: jax.Array
    rotary_sin: jax.Array
    mask: OrderedMask | jax.Array


@jax.custom_vjp
def _rows_times_kernel(x_BE: jax.Array, kernel_EF: jax.Array) -> jax.Array:
    return x_BE @ kernel_EF


def _rows_times_kernel_backward(saved: tuple[jax.Array, jax.Array], gradient_BF: jax.Array):
    x_BE, kernel_EF = saved
    return jnp.einsum("bf,ef->be", gradient_BF, kernel_EF), jnp.einsum("be,bf->ef", x_BE, gradient_BF)


_rows_times_kernel.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _rows_times_kernel_backward)


def vector_dot_general(x_BE: jax.Array, kernel_EF: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """The product in (1) as `nn.Dense` takes it, for one vector per sample.

    JAX makes a kernel's gradient transposed and turns it round. For a batch of one, XLA on a processor then writes the
    whole gradient twice, and that of (1) is the largest of a block. Here it is made as it lies.
    """
    return _rows_times_kernel(x_BE, kernel_EF)


def layer_norm(x: jax.Array) -> jax.Array:
    """Without affine part, float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + NORM_EPSILON)


def modulate(x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """Equation 2, float32: one shift and scale per sample."""
    return layer_norm(x_BLD) * (1.0 + scale_BD[:, None]) + shift_BD[:, None]


def rotate(x_BNHK: jax.Array, cos_BNk: jax.Array, sin_BNk: jax.Array) -> jax.Array:
    """Turns the channel pairs (2k, 2k + 1) of every head, float32."""
    pairs = x_BNHK.reshape(*x_BNHK.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_BNk[:, :, None], sin_BNk[:, :, None]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x_BNHK.shape)


class HeadNorm(nn.Module):
    """RMS norm over one head, float32: [..., K] -> [..., K]."""

    head_dim: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (self.head_dim,), self.param_dtype).astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + HEAD_NORM_EPSILON)
        return x * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


class Stream(nn.Module):
    """The weights of one stream: `project` is equations 1 to 3, `finish` equations 5 and 6.

    Attributes:
      heads, head_dim: of the attention; the model width is their product.
      last: the text stream of the last block, which has no output.
    """

    heads: int
    head_dim: int
    last: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        width = self.heads * self.head_dim
        zeros, xavier = nn.initializers.zeros, nn.initializers.xavier_uniform()
        dense = lambda features, init=xavier, **product: nn.Dense(
            features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init, **product
        )
        # Zero, so that a fresh block passes its input on.
        self.modulation = dense((2 if self.last else 6) * width, zeros, dot_general=vector_dot_general)
        self.query, self.key, self.value = dense(width), dense(width), dense(width)
        self.query_norm = HeadNorm(self.head_dim, self.param_dtype)
        self.key_norm = HeadNorm(self.head_dim, self.param_dtype)
        if not self.last:
            self.out = dense(width)
            self.mlp_up, self.mlp_down = dense(MLP_RATIO * width), dense(width)

    def project(
        self, x_BLD: jax.Array, conditioning_BD: jax.Array, rotary: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """((q, k, v), each [B, L, H, K] in `dtype`; the modulation that `finish` needs)."""
        modulation = self.modulation(conditioning_BD).astype(jnp.float32)
        modulation = nn.with_logical_constraint(modulation, ("batch", "activation_embed"))
        if self.last:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            rest = ()
        else:
            shift, scale, *rest = jnp.split(modulation, 6, axis=-1)
        u_BLD = modulate(x_BLD, shift, scale).astype(self.dtype)
        split = lambda y: nn.with_logical_constraint(
            y.reshape(*y.shape[:-1], self.heads, self.head_dim), ("batch", "length", "activation_heads", None)
        )
        query = self.query_norm(split(self.query(u_BLD)))
        key = self.key_norm(split(self.key(u_BLD)))
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        return (query.astype(self.dtype), key.astype(self.dtype), split(self.value(u_BLD))), tuple(rest)

    def finish(self, x_BLD: jax.Array, mixed_BLHK: jax.Array, modulation: tuple[jax.Array, ...]) -> jax.Array:
        """The stream behind the attention, [B, L, D]."""
        attention_gate, shift, scale, mlp_gate = modulation
        mixed = self.out(mixed_BLHK.reshape(*x_BLD.shape[:-1], -1))
        x_BLD = x_BLD + mixed * attention_gate[:, None].astype(self.dtype)
        hidden = nn.gelu(self.mlp_up(modulate(x_BLD, shift, scale).astype(self.dtype)), approximate=True)
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", "activation_mlp"))
        x_BLD = x_BLD + self.mlp_down(hidden) * mlp_gate[:, None].astype(self.dtype)
        return nn.with_logical_constraint(x_BLD, ("batch", "length", "activation_embed"))


class JointBlock(nn.Module):
    """(image [B, N, D], text [B, T, D], silu(temb) [B, D], geometry) -> (image, text); text is None when `last`.

    Attributes:
      heads, head_dim, last: see `Stream`.
      attention: a key of `attention.ATTENTION`.
      unseen: how many of the last image tokens the mask hides from all other tokens, see `attention.xla_attention`.
    """

    heads: int
    head_dim: int
    last: bool = False
    attention: str = "xla"
    unseen: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        sizes = dict(heads=self.heads, head_dim=self.head_dim, dtype=self.dtype, param_dtype=self.param_dtype)
        self.image = Stream(**sizes)
        self.text = Stream(last=self.last, **sizes)

    def __call__(
        self, image_BND: jax.Array, text_BTD: jax.Array, conditioning_BD: jax.Array, geometry: TokenGeometry
    ) -> tuple[jax.Array, jax.Array | None]:
        rotary = (geometry.rotary_cos, geometry.rotary_sin)
        image_qkv, image_modulation = self.image.project(image_BND, conditioning_BD, rotary)
        text_qkv, text_modulation = self.text.project(text_BTD, conditioning_BD)
        length = text_BTD.shape[1]
        joined = [jnp.concatenate(pair, axis=1) for pair in zip(text_qkv, image_qkv, strict=True)]
        mixed = ATTENTION[self.attention](*joined, geometry.mask, self.unseen)
        image_BND = self.image.finish(image_BND, mixed[:, length:], image_modulation)
        if self.last:
            return image_BND, None
        return image_BND, self.text.finish(text_BTD, mixed[:, :length], text_modulation)
