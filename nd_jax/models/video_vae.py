"""Causal video VAE: the encoder that Neodragon and Pyramid-Flow share, and their two decoders.

    moments = conv_1x1x1(encoder(video));   mean, logvar = halves(moments),  logvar in [-30, 20]     (1)
    z       = mean + exp(logvar / 2) * noise                                                         (2)
    latent  = (z - shift) * scale,  one pair for the first latent frame, one for the others          (3)
    video   = decoder(conv_1x1x1(z))                                                                 (4)
    KL      = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar)                                             (5)

`CausalVideoVAE` is Pyramid-Flow's with the native decoder below, `AsymmetricCausalVideoVAE` Neodragon's with the tiny
one of `taehv.py`. 8k + 1 video frames are k + 1 latent frames, and 8 x 8 pixels are one latent pixel (rounded up) at
the released settings. All arrays are channel-last: video [B, F, H, W, 3] in [-1, 1], latents [B, T, h, w, C].

Clips that are too long for one call are encoded and decoded in chunks of time, see `nd_jax.models.video_chunks`; for
large frames there is `bands`. Neither changes the numbers.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from nd_jax.errors import UserError
from nd_jax.models.taehv import States, TAEHVConfig, TAEHVDecoder
from nd_jax.models.vae_layers import (
    CausalConv,
    Compute,
    FrameNorm,
    MidBlock,
    SpatialUpsample,
    TemporalUpsample,
    residual_block,
)

LOGVAR_RANGE = (-30.0, 20.0)

# Kernels are (time, row, column, in, out), shorter ones lack the first axes: their output channels are split.
LOGICAL_AXES = ((r"kernel$", (None, None, None, None, "embed")),)


@dataclasses.dataclass(frozen=True)
class VideoEncoderConfig:
    """Names and defaults of the public classes for the encoder, and the normalisation of its latents.

    Attributes:
      encoder_out_channels: latent channels.
      latent_shift: of the first latent frame and of the others, equation 3.
      latent_scale: likewise. Pyramid-Flow's own pair is (1 / 1.8415, 1 / 3.0986).
    """

    encoder_in_channels: int = 3
    encoder_out_channels: int = 16
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_spatial_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_temporal_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_norm_num_groups: int = 32
    latent_shift: tuple[float, float] = (0.1490, -0.2343)
    latent_scale: tuple[float, float] = (0.5430, 0.3031)

    def __post_init__(self):
        _check_blocks(self, "encoder", "down")

    @property
    def time_factor(self) -> int:
        """Video frames per latent frame, the first one excepted."""
        return 2 ** sum(self.encoder_temporal_down_sample)

    @property
    def space_factor(self) -> int:
        return 2 ** sum(self.encoder_spatial_down_sample)


@dataclasses.dataclass(frozen=True)
class CausalVideoVAEConfig(VideoEncoderConfig):
    """Pyramid-Flow's `CausalVideoVAE` with the 16 latent channels of the released weights."""

    decoder_in_channels: int = 16
    decoder_out_channels: int = 3
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_spatial_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_temporal_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_norm_num_groups: int = 32
    latent_scale: tuple[float, float] = (1 / 1.8415, 1 / 3.0986)

    def __post_init__(self):
        super().__post_init__()
        _check_blocks(self, "decoder", "up")
        if self.decoder_in_channels != self.encoder_out_channels:
            raise ValueError(
                f"decoder_in_channels is {self.decoder_in_channels} and encoder_out_channels "
                f"{self.encoder_out_channels}: they must be equal"
            )


@dataclasses.dataclass(frozen=True)
class AsymmetricVideoVAEConfig(VideoEncoderConfig):
    """Neodragon's `AsymmetricCausalVideoVAE`."""

    decoder_num_features: tuple[int, ...] = (256, 128, 64, 64)
    decoder_time_upscale: tuple[bool, ...] = (True, True, True)
    decoder_space_upscale: tuple[bool, ...] = (True, True, True)

    def __post_init__(self):
        super().__post_init__()
        _ = self.decoder  # Checks its sizes.

    @property
    def decoder(self) -> TAEHVConfig:
        return TAEHVConfig(
            latent_channels=self.encoder_out_channels,
            num_features=self.decoder_num_features,
            time_upscale=self.decoder_time_upscale,
            space_upscale=self.decoder_space_upscale,
            out_channels=self.encoder_in_channels,
        )


def _check_blocks(config: Any, part: str, direction: str) -> None:
    """Per-block settings have one entry per block, and channels divide into norm groups."""
    widths = getattr(config, f"{part}_block_out_channels")
    groups = getattr(config, f"{part}_norm_num_groups")
    others = ("layers_per_block", f"spatial_{direction}_sample", f"temporal_{direction}_sample")
    for name in (f"{part}_{other}" for other in others):
        if len(getattr(config, name)) != len(widths):
            raise ValueError(
                f"{name} has {len(getattr(config, name))} entries, {part}_block_out_channels {len(widths)}"
            )
    for width in widths:
        if width % groups:
            raise ValueError(f"{part}_norm_num_groups {groups} does not divide the width {width}")


class Posterior(NamedTuple):
    """Gaussian of every latent value, equation 1: `mean` and `logvar` float32 [B, T, h, w, C], or [B, h, w, C]."""

    mean: jax.Array
    logvar: jax.Array

    def sample(self, noise: jax.Array) -> jax.Array:
        """Equation 2; `noise` is standard normal, of the shape of `mean`."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def sample_with_key(self, key: jax.Array) -> jax.Array:
        """Equation 2 with noise drawn from a key."""
        return self.sample(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def kl(self) -> jax.Array:
        """Equation 5, divergence from N(0, 1) in nats, summed over a clip or image: [B]."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum(axis=tuple(range(1, terms.ndim)))


def posterior(moments: jax.Array) -> Posterior:
    """Equation 1 behind the convolution: moments [..., 2C] -> `Posterior`."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))


def normalize_latents(config: VideoEncoderConfig, z: jax.Array, first_frame: int = 0) -> jax.Array:
    """Equation 3: z [B, T, h, w, C] -> latents for the transformer.

    Args:
      config: holds shift and scale.
      z: latent frames of a clip.
      first_frame: place in the clip of `z`'s first frame; only frame 0 has the pair of the first frame.
    """
    shift, scale = _frame_constants(config, z, first_frame)
    return (z - shift) * scale


def denormalize_latents(config: VideoEncoderConfig, latents: jax.Array, first_frame: int = 0) -> jax.Array:
    """The inverse of `normalize_latents`, in front of a decoder."""
    shift, scale = _frame_constants(config, latents, first_frame)
    return latents / scale + shift


def _frame_constants(config: VideoEncoderConfig, z: jax.Array, first_frame: int) -> tuple[jax.Array, jax.Array]:
    later = [min(frame, 1) for frame in range(first_frame, first_frame + z.shape[1])]
    return tuple(
        jnp.asarray([pair[k] for k in later], z.dtype)[None, :, None, None, None]
        for pair in (config.latent_shift, config.latent_scale)
    )


def latent_frames(config: VideoEncoderConfig, video_frames: int) -> int:
    """Latent frames of a whole clip.

    Raises:
      UserError: the number of video frames is not 8k + 1 (at the released settings).
    """
    factor = config.time_factor
    if video_frames < 1 or (video_frames - 1) % factor:
        cut = max(1, (video_frames - 1) // factor * factor + 1)
        raise UserError(
            f"a clip of {video_frames} video frames does not fit the video VAE, which takes {factor}k + 1; "
            f"give {cut} or {cut + factor}"
        )
    return (video_frames - 1) // factor + 1


class VideoEncoder(nn.Module):
    """`encoder` of both classes: video [B, F, H, W, 3] -> [B, T, h, w, 2C], before `quant_conv`."""

    config: VideoEncoderConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, compute = self.config, self.compute
        conv = lambda features, name, strides=(1, 1, 1): CausalConv(features, 3, strides, compute, name=name)
        x = conv(cfg.encoder_block_out_channels[0], "conv_in")(x)
        for i, width in enumerate(cfg.encoder_block_out_channels):
            for j in range(cfg.encoder_layers_per_block[i]):
                block = residual_block(compute)
                x = block(width, cfg.encoder_norm_num_groups, compute, name=f"down_{i}_block_{j}")(x)
            if cfg.encoder_spatial_down_sample[i]:
                x = conv(width, f"down_{i}_space", (1, 2, 2))(x)
            if cfg.encoder_temporal_down_sample[i]:
                x = conv(width, f"down_{i}_time", (2, 1, 1))(x)
        x = MidBlock(cfg.encoder_norm_num_groups, compute, name="mid")(x)
        norm = FrameNorm(cfg.encoder_norm_num_groups, compute.param_dtype, name="norm_out")(x)
        return conv(2 * cfg.encoder_out_channels, "conv_out")(x, norm)


class NativeDecoder(nn.Module):
    """`decoder` of Pyramid-Flow: [B, T, h, w, C] behind `post_quant_conv` -> video [B, F, H, W, 3], not clamped."""

    config: CausalVideoVAEConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array, return_blocks: bool = False) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Also returns the outputs of `conv_in`, the mid block and every up block, or an empty tuple."""
        cfg, compute = self.config, self.compute
        widths = cfg.decoder_block_out_channels[::-1]
        x = CausalConv(widths[0], compute=compute, name="conv_in")(x)
        blocks = [x]
        x = MidBlock(cfg.decoder_norm_num_groups, compute, name="mid")(x)
        blocks.append(x)
        for i, width in enumerate(widths):
            for j in range(cfg.decoder_layers_per_block[i]):
                block = residual_block(compute)
                x = block(width, cfg.decoder_norm_num_groups, compute, name=f"up_{i}_block_{j}")(x)
            if cfg.decoder_spatial_up_sample[i]:
                x = SpatialUpsample(compute, name=f"up_{i}_space")(x)
            if cfg.decoder_temporal_up_sample[i]:
                x = TemporalUpsample(compute, name=f"up_{i}_time")(x)
            blocks.append(x)
        norm = FrameNorm(cfg.decoder_norm_num_groups, compute.param_dtype, name="norm_out")(x)
        video = CausalConv(cfg.decoder_out_channels, compute=compute, name="conv_out")(x, norm)
        return video, tuple(blocks) if return_blocks else ()


class VideoVAEEncoder(nn.Module):
    """The half that stays frozen: parameters `encoder` and `quant_conv` of either class.

    Attributes:
      config: sizes and normalisation; the config of a whole VAE will do.
      dtype: computation dtype.
      param_dtype: dtype of initialised parameters.
      bands: bands of rows per convolution (`vae_layers`); saves memory, changes no number.
      remat: recompute residual blocks in the backward pass.
    """

    config: VideoEncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    bands: int = 1
    remat: bool = False

    @property
    def compute(self) -> Compute:
        return Compute(self.dtype, self.param_dtype, self.bands, self.remat)

    def setup(self):
        self.encoder = VideoEncoder(self.config, self.compute)
        self.quant_conv = CausalConv(2 * self.config.encoder_out_channels, 1, compute=self.compute)

    def __call__(self, video: jax.Array) -> Posterior:
        return self.encode(video)

    def encode(self, video: jax.Array) -> Posterior:
        """Equation 1: video [B, 8k + 1, H, W, 3] in [-1, 1] -> posterior of k + 1 latent frames.

        Raises:
          UserError: another number of frames.
        """
        latent_frames(self.config, video.shape[1])
        return self.encode_chunk(video)

    def encode_chunk(self, video: jax.Array) -> Posterior:
        """`encode` without the check, for the chunks of a clip: those that continue it have 8k frames."""
        return posterior(self.quant_conv(self.encoder(video)))


class CausalVideoVAE(VideoVAEEncoder):
    """Pyramid-Flow's VAE: parameters `encoder`, `quant_conv`, `post_quant_conv`, `decoder`."""

    config: CausalVideoVAEConfig

    def setup(self):
        super().setup()
        self.post_quant_conv = CausalConv(self.config.decoder_in_channels, 1, compute=self.compute)
        self.decoder = NativeDecoder(self.config, self.compute)

    def __call__(self, video: jax.Array) -> jax.Array:
        """Reconstruction from the posterior's mean."""
        return self.decode(self.encode(video).mean)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Equation 4: de-normalised latents [B, T, h, w, C] -> video [B, 8T - 7, 8h, 8w, 3], not clamped."""
        return self.decoder(self.post_quant_conv(latents))[0]

    def decode_blocks(self, latents: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(video, outputs of the decoder's `conv_in`, mid block and up blocks)."""
        return self.decoder(self.post_quant_conv(latents), return_blocks=True)


class AsymmetricCausalVideoVAE(VideoVAEEncoder):
    """Neodragon's VAE: parameters `encoder`, `quant_conv`, `post_quant_conv`, `decoder`."""

    config: AsymmetricVideoVAEConfig

    def setup(self):
        super().setup()
        self.post_quant_conv = CausalConv(self.config.encoder_out_channels, 1, compute=self.compute)
        self.decoder = TAEHVDecoder(self.config.decoder, self.dtype, self.param_dtype)

    def __call__(self, video: jax.Array) -> jax.Array:
        """Reconstruction from the posterior's mean."""
        return self.decode(self.encode(video).mean)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Equation 4: de-normalised latents [B, T, h, w, C] -> video [B, 8T - 7, 8h, 8w, 3], not clamped."""
        return self.decoder(self.post_quant_conv(latents))[0]

    def decode_blocks(self, latents: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(video, `post_quant_conv` and the outputs of the decoder's 23 blocks)."""
        quantised = self.post_quant_conv(latents)
        video, blocks = self.decoder(quantised, return_blocks=True)
        return video, (quantised, *blocks)

    def decode_frame(self, latent: jax.Array, states: States) -> tuple[tuple[jax.Array, ...], States]:
        """Equation 4 for one latent frame [B, h, w, C]; see `TAEHVDecoder.stream` and `taehv.initial_states`."""
        return self.decoder.stream(self.post_quant_conv(latent[:, None])[:, 0], states)


def latent_size(config: VideoEncoderConfig, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the latents of height x width pixels."""
    return math.ceil(height / config.space_factor), math.ceil(width / config.space_factor)
