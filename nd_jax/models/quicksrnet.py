"""QuickSRNet: plain convolutions that upscale pictures 2, 3 or 4 times, the last network of Neodragon's pipeline.

    f_0     = c(conv(x)),   f_i = c(conv(f_{i-1})),   i = 1 .. n       c(x) = min(max(x, 0), 1); conv: 3 x 3         (1)
    y       = c(conv(f_n))               or, with an input-to-output connection,   y = c(anchor(x) + conv(f_n))      (2)
    picture = depth_to_space(y)          channel k r^2 + i r + j of a pixel is colour k of its r x r block at (i, j) (3)
    start:  every convolution of (1) adds its input to what random kernels make of it; the last one, or the anchor,
            repeats each colour r^2 times                                                                            (4)

Pictures are in [0, 1], and so is everything between two layers, which suits integers of 8 bits. The anchor is a 1 x 1
convolution; only the large network has one.

Source: arXiv 2303.04336; agrees with `QuickSRNetBase` of the AIMET model zoo at the same parameters. Equation 4 keeps
the three channels that carry the picture free of random numbers, and the last convolution reads only those, so an
untrained network is nearest-neighbour upsampling exactly. The zoo adds the identity to kernels that are random
everywhere, so that its untrained networks are so only roughly.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

COLOURS = 3
SCALES = (2, 3, 4)
# num_channels, num_intermediate_layers, use_ito_connection
VARIANTS = {"small": (32, 2, False), "medium": (32, 5, False), "large": (64, 11, True)}

# As large as PyTorch's own initialisation: uniform, variance 1 / (3 fan_in).
_RANDOM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class QuickSRNetConfig:
    """Sizes, by the names of the public class; the defaults are the small network's.

    Attributes:
      scaling_factor: r. The public 1.5x networks have another last layer and are not supported.
      num_channels: width of the convolutions.
      num_intermediate_layers: n.
      use_ito_connection: the input-to-output connection of equation 2.
    """

    scaling_factor: int = 2
    num_channels: int = 32
    num_intermediate_layers: int = 2
    use_ito_connection: bool = False

    def __post_init__(self):
        if not isinstance(self.scaling_factor, int) or self.scaling_factor not in SCALES:
            raise ValueError(f"scaling_factor is {self.scaling_factor}: use {', '.join(map(str, SCALES))}")
        if self.num_channels < COLOURS or self.num_intermediate_layers < 0:
            raise ValueError(
                f"num_channels is {self.num_channels} and num_intermediate_layers {self.num_intermediate_layers}: "
                f"use {COLOURS} or more channels, which carry the picture, and 0 or more layers"
            )


def variant_config(variant: str, scaling_factor: int) -> QuickSRNetConfig:
    """Sizes of "small", "medium" or "large".

    Raises:
      ValueError: there is no such variant or scaling factor.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}: use {', '.join(VARIANTS)}")
    return QuickSRNetConfig(scaling_factor, *VARIANTS[variant])


def depth_to_space(x_NHWC: jax.Array, scaling_factor: int) -> jax.Array:
    """Equation 3: [N, H, W, C r^2] -> [N, r H, r W, C]; PyTorch's PixelShuffle with channels last."""
    batch, height, width, channels = x_NHWC.shape
    r = scaling_factor
    blocks = x_NHWC.reshape(batch, height, width, channels // r**2, r, r)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * r, width * r, channels // r**2)


class QuickSRNet(nn.Module):
    """Pictures in [0, 1], larger. Parameters `conv_in`, `convs_{0..n-1}`, `conv_last` and, if connected, `anchor`."""

    config: QuickSRNetConfig = QuickSRNetConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        cfg = self.config
        pixels = COLOURS * cfg.scaling_factor**2
        self.conv_in = self._conv(cfg.num_channels, 3, _init_carrying)
        self.convs = [self._conv(cfg.num_channels, 3, _init_carrying) for _ in range(cfg.num_intermediate_layers)]
        connected = cfg.use_ito_connection
        self.conv_last = self._conv(pixels, 3, nn.initializers.zeros if connected else _init_nearest)
        if connected:
            self.anchor = self._conv(pixels, 1, _init_nearest)

    def _conv(self, features: int, size: int, kernel_init: nn.initializers.Initializer) -> nn.Conv:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        return nn.Conv(features, (size, size), kernel_init=kernel_init, **dtypes)

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Upscales.

        Args:
          pictures: [N, H, W, 3] in [0, 1], of any height and width.

        Returns:
          [N, r H, r W, 3] in [0, 1], in the dtype of the computation.

        Raises:
          ValueError: another shape.
        """
        if pictures.ndim != 4 or pictures.shape[-1] != COLOURS:
            raise ValueError(f"pictures are {list(pictures.shape)}: give an array [N, H, W, {COLOURS}]")
        x = features = pictures.astype(self.dtype)
        for conv in (self.conv_in, *self.convs):
            features = _clip(conv(features))
        y = self.conv_last(features)
        if self.config.use_ito_connection:
            y = self.anchor(x) + y
        return depth_to_space(_clip(y), self.config.scaling_factor)


def _clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 1.0)


def _init_carrying(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Kernel [3, 3, in, out] of equation 1: the input plus random maps of it, of which the first channels are free."""
    kernel = _RANDOM(key, shape, dtype).at[..., :COLOURS].set(0)
    passed = jnp.arange(min(shape[2:]))
    return kernel.at[shape[0] // 2, shape[1] // 2, passed, passed].add(1)


def _init_nearest(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Kernel [k, k, in, 3 r^2] that repeats the first channels r^2 times each."""
    pixels = jnp.arange(shape[-1])
    colours = pixels // (shape[-1] // COLOURS)
    return jnp.zeros(shape, dtype).at[shape[0] // 2, shape[1] // 2, colours, pixels].set(1)
