"""TAEHV decoder: the tiny video decoder of Neodragon, parallel over frames or one latent frame at a time.

    x_0   = relu(conv(3 tanh(z / 3)))                                        z: latent after `post_quant_conv`     (1)
    m(x)  = relu(x[t] + conv(relu(conv(relu(conv([x[t], x[t-1]]))))))        memory block; x[-1] = 0               (2)
    group = conv . grow . nearest_2x . m . m . m                             three groups                          (3)
    grow  : 1x1 convolution C -> 2C, the first C channels are the earlier of two frames                            (4)
    video = conv(relu(x_3)), without its first 2^3 - 1 = 7 frames                                                  (5)

Time steps meet only in equation 2, one step back, so a memory block carries one frame from call to call. `__call__`
folds time into the batch and shifts it (training); `stream` keeps every frame an array of its own, [B, H, W, C], and
carries the 9 frames (deployment: accelerators without rank-5 tensors, and memory that does not grow with the
clip). Both use the same parameters and agree to float tolerance.

Agrees with `decoder` of `neodragon.asymmetric_causal_video_vae.AsymmetricCausalVideoVAE`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

GROUPS = 3
MEMORY_BLOCKS = 3

States = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class TAEHVConfig:
    """Sizes of the decoder.

    Attributes:
      latent_channels: of the latent.
      num_features: width of each group and, last, of the output convolution.
      time_upscale: which groups double the frames.
      space_upscale: which groups double rows and columns.
      out_channels: of the video.
    """

    latent_channels: int = 16
    num_features: tuple[int, ...] = (256, 128, 64, 64)
    time_upscale: tuple[bool, ...] = (True, True, True)
    space_upscale: tuple[bool, ...] = (True, True, True)
    out_channels: int = 3

    def __post_init__(self):
        for name, count in (("num_features", GROUPS + 1), ("time_upscale", GROUPS), ("space_upscale", GROUPS)):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} is {list(getattr(self, name))}: the decoder needs {count} entries")

    @property
    def time_factor(self) -> int:
        """Video frames per latent frame."""
        return 2 ** sum(self.time_upscale)

    @property
    def space_factor(self) -> int:
        return 2 ** sum(self.space_upscale)

    @property
    def dropped_frames(self) -> int:
        """Frames at the start of a clip that are not part of the video."""
        return self.time_factor - 1


def initial_states(config: TAEHVConfig, batch: int, height: int, width: int, dtype: Any = jnp.float32) -> States:
    """What `stream` carries in front of a clip: 9 zero arrays [batch, rows, columns, features], in order of use.

    Args:
      config: the decoder.
      batch: clips.
      height: rows of the latent.
      width: columns of the latent.
      dtype: the decoder's computation dtype.
    """
    states, scale = [], 1
    for features, grows in zip(config.num_features, config.space_upscale, strict=False):
        shape = (batch, height * scale, width * scale, features)
        states += [jnp.zeros(shape, dtype) for _ in range(MEMORY_BLOCKS)]
        scale *= 2 if grows else 1
    return tuple(states)


class MemoryBlock(nn.Module):
    """Equation 2: (x [N, H, W, C], the frames before them [N, H, W, C]) -> [N, H, W, C]."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        self.convs = [_conv(self.features, 3, True, self.dtype, self.param_dtype) for _ in range(3)]

    def __call__(self, x: jax.Array, past: jax.Array) -> jax.Array:
        y = self.convs[0](jnp.concatenate([x, past], axis=-1))
        y = self.convs[2](nn.relu(self.convs[1](nn.relu(y))))
        return nn.relu(x + y)


class TAEHVDecoder(nn.Module):
    """Latents behind `post_quant_conv` -> video in about [-1, 1], not clamped.

    Parameters `conv_in`, `memory_{0..8}`, `grow_{0..2}`, `conv_{0..2}`, `conv_out`.
    """

    config: TAEHVConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        cfg, dtypes = self.config, (self.dtype, self.param_dtype)
        self.conv_in = _conv(cfg.num_features[0], 3, True, *dtypes)
        self.memory = [
            MemoryBlock(features, *dtypes) for features in cfg.num_features[:GROUPS] for _ in range(MEMORY_BLOCKS)
        ]
        self.grow = [
            _conv(features * (2 if doubles else 1), 1, False, *dtypes)
            for features, doubles in zip(cfg.num_features, cfg.time_upscale, strict=False)
        ]
        self.conv = [_conv(features, 3, False, *dtypes) for features in cfg.num_features[1:]]
        self.conv_out = _conv(cfg.out_channels, 3, True, *dtypes)

    def __call__(self, latents: jax.Array, return_blocks: bool = False) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """All frames at once.

        Args:
          latents: [B, T, h, w, latent_channels].
          return_blocks: whether to return the outputs of the public class's blocks as well.

        Returns:
          (video [B, 8T - 7, 8h, 8w, out_channels] at the released factors, 23 block outputs [B, frames, H, W, C] or an
          empty tuple).
        """
        batch, blocks = latents.shape[0], []

        def keep(x: jax.Array) -> jax.Array:
            if return_blocks:
                blocks.append(x.reshape(batch, -1, *x.shape[1:]))
            return x

        x = latents.astype(self.dtype).reshape(-1, *latents.shape[2:])
        x = keep(nn.relu(keep(self.conv_in(keep(_soft_clamp(x))))))
        for group in range(GROUPS):
            for block in self.memory[group * MEMORY_BLOCKS : (group + 1) * MEMORY_BLOCKS]:
                clip = x.reshape(batch, -1, *x.shape[1:])
                past = jnp.pad(clip[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0))).reshape(x.shape)
                x = keep(block(x, past))
            x = keep(self._enlarge(x, group))
            # The two halves of the channels are consecutive frames.
            frames = jnp.stack(self._grow(x, group), axis=1)
            x = keep(frames.reshape(-1, *frames.shape[2:]))
            x = keep(self.conv[group](x))
        x = keep(self.conv_out(keep(nn.relu(x))))
        return x.reshape(batch, -1, *x.shape[1:])[:, self.config.dropped_frames :], tuple(blocks)

    def stream(self, latent: jax.Array, states: States) -> tuple[tuple[jax.Array, ...], States]:
        """One latent frame.

        Args:
          latent: [B, h, w, latent_channels].
          states: from the call before, or `initial_states`.

        Returns:
          (8 frames [B, 8h, 8w, out_channels] at the released factors, the next states). The caller drops the first 7
          frames of a clip, which are not part of the video.
        """
        frames, following = [nn.relu(self.conv_in(_soft_clamp(latent.astype(self.dtype))))], []
        for group in range(GROUPS):
            for index in range(group * MEMORY_BLOCKS, (group + 1) * MEMORY_BLOCKS):
                pasts = [states[index], *frames[:-1]]
                following.append(frames[-1])
                frames = [self.memory[index](x, past) for x, past in zip(frames, pasts, strict=True)]
            grown = [part for x in frames for part in self._grow(self._enlarge(x, group), group)]
            frames = [self.conv[group](x) for x in grown]
        return tuple(self.conv_out(nn.relu(x)) for x in frames), tuple(following)

    def _enlarge(self, x: jax.Array, group: int) -> jax.Array:
        """Nearest 2x of [N, H, W, C]."""
        return x.repeat(2, axis=1).repeat(2, axis=2) if self.config.space_upscale[group] else x

    def _grow(self, x: jax.Array, group: int) -> list[jax.Array]:
        """Equation 4: [N, H, W, C] -> the frames that it becomes, earlier first."""
        return jnp.split(self.grow[group](x), 2 if self.config.time_upscale[group] else 1, axis=-1)


def _conv(features: int, size: int, use_bias: bool, dtype: Any, param_dtype: Any) -> nn.Conv:
    return nn.Conv(features, (size, size), use_bias=use_bias, dtype=dtype, param_dtype=param_dtype)


def _soft_clamp(x: jax.Array) -> jax.Array:
    return 3.0 * jnp.tanh(x / 3.0)
