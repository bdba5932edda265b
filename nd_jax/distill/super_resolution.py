"""Training of QuickSRNet: frames from their own reductions.

    s = q(reduce(x))              x: frames in [0, 1]; reduce: antialiased bicubic, r times fewer rows and columns  (1)
                                  q: to the nearest of 256 levels, which is what a file or a screen holds
    y = network(s)                                                                                                  (2)
    L = mean |y - x|              a mean over clips                                                                 (3)

Bicubic is the cubic convolution of Keys with a = -1/2, stretched r times for the reduction, with weights that sum to 1
at the border too: PyTorch's and Pillow's antialiased bicubic, and MATLAB's `imresize`, which the public benchmarks use,
but for the two outermost pixels, where that one reflects the picture.

Held-out frames are measured beside nearest-neighbour and bicubic enlargements of the same s.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.distill import perceptual
from nd_jax.distill.base import Batch, Distillation, Mean, Role, Roles
from nd_jax.distill.video_vae import VIDEO_RANGE
from nd_jax.models.quicksrnet import QuickSRNet, QuickSRNetConfig
from nd_jax.weights.quicksrnet import QUICKSRNET

ROLE = COMPONENT = "quicksrnet"
LEVELS = 255.0


def reduce_frames(frames_NHWC: jax.Array, scaling_factor: int) -> jax.Array:
    """Equation 1: [N, r H, r W, C] in [0, 1] -> float32 [N, H, W, C] in [0, 1], in steps of 1/255.

    Raises:
      ValueError: sides that are no multiples of r.
    """
    batch, height, width, channels = frames_NHWC.shape
    if height % scaling_factor or width % scaling_factor:
        raise ValueError(f"frames are {height} x {width} pixels: give multiples of {scaling_factor}")
    small = (batch, height // scaling_factor, width // scaling_factor, channels)
    reduced = jax.image.resize(frames_NHWC.astype(jnp.float32), small, "cubic", antialias=True)
    return jnp.round(LEVELS * jnp.clip(reduced, 0.0, 1.0)) / LEVELS


def enlarge_nearest(frames_NHWC: jax.Array, scaling_factor: int) -> jax.Array:
    """[N, H, W, C] -> [N, r H, r W, C], every pixel repeated."""
    return frames_NHWC.repeat(scaling_factor, axis=1).repeat(scaling_factor, axis=2)


def enlarge_bicubic(frames_NHWC: jax.Array, scaling_factor: int) -> jax.Array:
    """[N, H, W, C] in [0, 1] -> [N, r H, r W, C] in [0, 1]."""
    batch, height, width, channels = frames_NHWC.shape
    large = (batch, height * scaling_factor, width * scaling_factor, channels)
    return jnp.clip(jax.image.resize(frames_NHWC, large, "cubic"), 0.0, 1.0)


def super_resolution_training(config: QuickSRNetConfig, network: Role, dtype: Any = jnp.float32) -> Distillation:
    """The method as data. Batches hold `video` float32 [B, F, H, W, 3] in [-1, 1], whose sides are multiples of r.

    Args:
      config: sizes.
      network: parameters of `QuickSRNet`; all of them train.
      dtype: computation dtype.
    """
    model = QuickSRNet(config, dtype=dtype)

    def reduced(video: jax.Array) -> jax.Array:
        frames = video.reshape(-1, *video.shape[2:])
        return reduce_frames((frames + 1.0) / 2.0, config.scaling_factor)

    def as_video(frames: jax.Array, video: jax.Array) -> jax.Array:
        """[N, H, W, 3] in [0, 1] -> the shape and range of `video`."""
        return 2.0 * frames.astype(jnp.float32).reshape(video.shape) - 1.0

    def upscale(roles: Roles, small: jax.Array) -> jax.Array:
        return model.apply({"params": roles[ROLE]}, small)

    def network_loss(roles: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        x = batch["video"]
        y = as_video(upscale(roles, reduced(x)), x)
        over_clips = lambda per_clip: Mean(jnp.sum(per_clip), jnp.float32(len(x)))
        # Half of it, because videos have twice the range of equation 3.
        loss = over_clips(jnp.abs(y - x).mean((1, 2, 3, 4)) / VIDEO_RANGE)
        return loss, {"psnr_db": over_clips(perceptual.psnr_db(y, x, VIDEO_RANGE))}

    def evaluate(roles: Roles, batch: Batch) -> dict[str, Mean]:
        x, valid = batch["video"], batch["valid"].astype(jnp.float32)
        small = reduced(x)
        metrics: dict[str, jax.Array] = {}
        for prefix, frames in (
            ("", upscale(roles, small)),
            ("nearest_", enlarge_nearest(small, config.scaling_factor)),
            ("bicubic_", enlarge_bicubic(small, config.scaling_factor)),
        ):
            measures = perceptual.measure_clips(as_video(frames, x), x, VIDEO_RANGE)
            metrics |= {prefix + name: per_clip for name, per_clip in measures.items()}
        return {name: Mean(jnp.sum(per_clip * valid), jnp.sum(valid)) for name, per_clip in metrics.items()}

    return Distillation(
        name="super_resolution",
        roles={ROLE: dataclasses.replace(network, trainable=("^",))},
        losses={ROLE: network_loss},
        schedule=(ROLE,),
        evaluate=evaluate,
        summarize=lambda means: means,
        deploy=lambda roles: {COMPONENT: (QUICKSRNET, config, roles[ROLE])},
    )
