"""Layers that the networks of the first frame share: the UNet and the image autoencoder. Channel-last, [B, H, W, C].

    n(x) = (x - mean) / sqrt(var + eps) * scale + bias      moments per image and channel group, or per token       (1)
    r(x) = shortcut(x) + conv(silu(n(conv(silu(n(x))) + W silu(temb) + b)))       the term of temb: UNet only       (2)
    u(x) = conv(nearest(x)), every pixel twice in both directions                                                   (3)

Agrees with `ResnetBlock2D`, `Upsample2D` and `Downsample2D` of diffusers. The norms are ours because `nn.GroupNorm` and
`nn.LayerNorm` mix dtypes, which a strict caller forbids.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# Zeros before and after the rows and the columns of a strided convolution's input.
PAD_AROUND = ((1, 1), (1, 1))
PAD_AFTER = ((0, 1), (0, 1))


def _normalise(x: jax.Array, axes: tuple[int, ...], epsilon: float) -> jax.Array:
    centred = x - x.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + epsilon)


def _affine(module: nn.Module, x: jax.Array) -> jax.Array:
    """Scale and bias of equation 1, one per channel, as parameters of `module`."""
    parameter = lambda name, init: module.param(name, init, x.shape[-1:], module.param_dtype).astype(jnp.float32)
    scale, bias = parameter("scale", nn.initializers.ones), parameter("bias", nn.initializers.zeros)
    along = tuple(range(x.ndim - 1))
    return x * jnp.expand_dims(scale, along) + jnp.expand_dims(bias, along)


class GroupNorm(nn.Module):
    """Equation 1 over the pixels and the channels of a group: [B, H, W, C] -> the same; float32 inside."""

    groups: int
    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        return _affine(self, _normalise(grouped, (1, 2, 4), self.epsilon).reshape(x.shape)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Equation 1 over the channels of a token: [B, L, D] -> the same; float32 inside."""

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _affine(self, _normalise(x.astype(jnp.float32), (-1,), self.epsilon)).astype(x.dtype)


class ResidualBlock(nn.Module):
    """Equation 2: [B, H, W, C] -> [B, H, W, features]; the shortcut is a 1x1 convolution where C changes.

    Attributes:
      features: output channels.
      groups, epsilon: of the norms.
    """

    features: int
    groups: int
    epsilon: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """`time` is silu(temb), [B, E]."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = lambda name: GroupNorm(self.groups, self.epsilon, self.param_dtype, name=name)
        conv = lambda size, name: nn.Conv(self.features, (size, size), name=name, **dtypes)
        y = conv(3, "conv1")(nn.silu(norm("norm1")(x)))
        if time is not None:
            y = y + nn.Dense(self.features, name="time", **dtypes)(time)[:, None, None]
        y = conv(3, "conv2")(nn.silu(norm("norm2")(y)))
        return y + (conv(1, "shortcut")(x) if x.shape[-1] != self.features else x)


class Downsample(nn.Module):
    """Convolution of stride 2: [B, H, W, C] -> [B, H / 2, W / 2, C], rounded up with `PAD_AROUND`, down with the other.

    Attributes:
      padding: `PAD_AROUND` (UNet) or `PAD_AFTER` (image autoencoder).
    """

    padding: tuple
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        return nn.Conv(x.shape[-1], (3, 3), (2, 2), self.padding, name="conv", **dtypes)(x)


class Upsample(nn.Module):
    """Equation 3: [B, H, W, C] -> [B, 2H, 2W, C], or cut to `size`, where a stride of 2 made H of 2H - 1 rows."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        x = x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
        return nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, param_dtype=self.param_dtype, name="conv")(x)
