"""The image autoencoder of the first frame (SDXL's VAE): image <-> latents of an eighth of its size.

    moments = conv_1x1(encoder(image));   mean, logvar = halves(moments),  logvar in [-30, 20]       (1)
    latent  = z * scaling_factor,   z a sample of (1)                                                (2)
    image   = decoder(conv_1x1(z))                                                                   (3)

Strided convolutions have zeros behind the last row and column alone, unlike those of the video VAE. Arrays are
channel-last: image [B, H, W, 3] in [-1, 1], latents [B, H / 8, W / 8, 4] at the released settings. Agrees with
`diffusers.AutoencoderKL`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from nd_jax.models.image_layers import PAD_AFTER, Downsample, GroupNorm, ResidualBlock, Upsample
from nd_jax.models.vae_layers import NORM_EPSILON, Compute, FrameAttention
from nd_jax.models.video_vae import Posterior, posterior

# Kernels are (row, column, in, out), those of attention (in, out): their output channels are split.
LOGICAL_AXES = ((r"kernel$", (None, None, None, "embed")),)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Names of `diffusers.AutoencoderKL`; the defaults are SDXL's.

    Attributes:
      scaling_factor: equation 2.
      sample_size, force_upcast: what the public pipelines read; carried along.

    Raises:
      ValueError: channels that do not divide into norm groups.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025
    sample_size: int = 1024
    force_upcast: bool = True

    def __post_init__(self):
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide the width {width}")

    @property
    def space_factor(self) -> int:
        """Pixels per latent pixel on one axis."""
        return 2 ** (len(self.block_out_channels) - 1)


def normalize_latents(config: AutoencoderKLConfig, z: jax.Array) -> jax.Array:
    """Equation 2: what the encoder makes -> what the UNet works on."""
    return z * config.scaling_factor


def denormalize_latents(config: AutoencoderKLConfig, latents: jax.Array) -> jax.Array:
    """The inverse of `normalize_latents`, in front of the decoder."""
    return latents / config.scaling_factor


class ImageMidBlock(nn.Module):
    """Residual block, attention of all pixels in one head, residual block: [B, h, w, C] -> the same."""

    groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        block = lambda name: ResidualBlock(x.shape[-1], self.groups, NORM_EPSILON, name=name, **dtypes)
        x = block("block_0")(x)
        # An image is a clip of one frame.
        x = FrameAttention(self.groups, Compute(**dtypes), name="attention")(x[:, None])[:, 0]
        return block("block_1")(x)


class ImageEncoder(nn.Module):
    """image [B, H, W, 3] -> [B, h, w, 2C], before `quant_conv`."""

    config: AutoencoderKLConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        last = len(cfg.block_out_channels) - 1
        x = nn.Conv(cfg.block_out_channels[0], (3, 3), name="conv_in", **dtypes)(x)
        for i, width in enumerate(cfg.block_out_channels):
            for j in range(cfg.layers_per_block):
                x = ResidualBlock(width, cfg.norm_num_groups, NORM_EPSILON, name=f"down_{i}_block_{j}", **dtypes)(x)
            if i < last:
                x = Downsample(PAD_AFTER, name=f"down_{i}_sample", **dtypes)(x)
        x = ImageMidBlock(cfg.norm_num_groups, name="mid", **dtypes)(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, NORM_EPSILON, self.param_dtype, name="norm_out")(x))
        return nn.Conv(2 * cfg.latent_channels, (3, 3), name="conv_out", **dtypes)(x)


class ImageDecoder(nn.Module):
    """[B, h, w, C] behind `post_quant_conv` -> image [B, H, W, 3], not clamped."""

    config: AutoencoderKLConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        widths = cfg.block_out_channels[::-1]
        x = nn.Conv(widths[0], (3, 3), name="conv_in", **dtypes)(x)
        x = ImageMidBlock(cfg.norm_num_groups, name="mid", **dtypes)(x)
        for i, width in enumerate(widths):
            for j in range(cfg.layers_per_block + 1):
                x = ResidualBlock(width, cfg.norm_num_groups, NORM_EPSILON, name=f"up_{i}_block_{j}", **dtypes)(x)
            if i < len(widths) - 1:
                x = Upsample(name=f"up_{i}_sample", **dtypes)(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, NORM_EPSILON, self.param_dtype, name="norm_out")(x))
        return nn.Conv(cfg.out_channels, (3, 3), name="conv_out", **dtypes)(x)


class AutoencoderKL(nn.Module):
    """The image autoencoder: parameters `encoder`, `quant_conv`, `post_quant_conv`, `decoder`.

    Attributes:
      config: sizes.
      dtype: computation dtype; norms and attention logits are float32 whatever it is.
      param_dtype: dtype of initialised parameters.
    """

    config: AutoencoderKLConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.encoder = ImageEncoder(cfg, **dtypes)
        self.quant_conv = nn.Conv(2 * cfg.latent_channels, (1, 1), **dtypes)
        self.post_quant_conv = nn.Conv(cfg.latent_channels, (1, 1), **dtypes)
        self.decoder = ImageDecoder(cfg, **dtypes)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Reconstruction from the posterior's mean."""
        return self.decode(self.encode(image).mean)

    def encode(self, image: jax.Array) -> Posterior:
        """Equation 1: [B, H, W, 3] in [-1, 1] -> float32 mean and logvar [B, h, w, C]; H and W are rounded down."""
        return posterior(self.quant_conv(self.encoder(image.astype(self.dtype))))

    def decode(self, z: jax.Array) -> jax.Array:
        """Equation 3: de-normalised latents [B, h, w, C] -> image [B, 8h, 8w, 3] in `dtype`, not clamped."""
        return self.decoder(self.post_quant_conv(z.astype(self.dtype)))
