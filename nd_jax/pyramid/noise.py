"""Noise and latents at every resolution of the pyramid, and the jump from one stage to the next.

Down(.) halves rows and columns bilinearly without antialiasing, which is the mean of every 2x2 block where the size is
even. U(.) repeats every value in a 2x2 block. Every function treats frames and channels alone.

    z_{S-1} = z,   z_{i-1} = Down(z_i)                                         latent pyramid   (1)
    ε_{S-1} = ε,   ε_{i-1} = 2 Down(ε_i)          noise pyramid: unit variance at every stage   (2)
    n = √(1 + γ) (w - m) + √(1 - 3γ) m,   w ~ N(0, I),  m = mean of w over its block            (3)
    Cov(n) = (1 + γ) I - γ J   in every 2x2 block, J all ones, blocks independent               (4)
    x_i = α_i U(x_{i-1}) + β_i n                             jump into stage i                  (5)

(3) is the symmetric square root of (4): the block's mean is the eigenvector of J with eigenvalue 4, everything
orthogonal to it has 0. At γ = 1/3 it is √(4/3) (w - m) and every block sums to zero, where a Cholesky factor does not
exist. α_i and β_i: `schedule.PyramidSchedule.renoise_weights`. Source: Pyramid-Flow, arXiv 2410.05954, section 3.2 and
appendix A; (2) is `_downsample_noise_2x` of the public Neodragon code.

Shapes: [B, T, H, W, C] = batch, latent frames, rows, columns, channels, channel-last throughout; any float dtype.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError

ROWS, COLUMNS = 2, 3


def halve(x: jax.Array) -> jax.Array:
    """Down(x): [B, T, H, W, C] -> [B, T, H // 2, W // 2, C].

    Raises:
      UserError: a side is shorter than 2.
    """
    if min(x.shape[ROWS], x.shape[COLUMNS]) < 2:
        raise UserError(f"latents of {x.shape[ROWS]} x {x.shape[COLUMNS]} cannot be halved: use larger frames")
    return _halve_axis(_halve_axis(x, ROWS), COLUMNS)


def _halve_axis(x: jax.Array, axis: int) -> jax.Array:
    size = x.shape[axis]
    if size % 2 == 0:
        first, second = (jax.lax.slice_in_dim(x, start, size, stride=2, axis=axis) for start in (0, 1))
        return 0.5 * (first + second)
    # Output centres in input coordinates; for a single halving they never reach beyond the edges.
    centre = (np.arange(size // 2) + 0.5) * (size / (size // 2)) - 0.5
    low = np.floor(centre).astype(np.int32)
    weight = jnp.asarray(centre - low, x.dtype).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    below, above = (jnp.take(x, index, axis=axis) for index in (low, low + 1))
    return below + weight * (above - below)


def upsample(x: jax.Array) -> jax.Array:
    """U(x): nearest-neighbour, [B, T, H, W, C] -> [B, T, 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=ROWS), 2, axis=COLUMNS)


def latent_pyramid(latents: jax.Array, stages: int) -> tuple[jax.Array, ...]:
    """z_0 .. z_{S-1} (1), coarsest first, from the finest latents [B, T, H, W, C]."""
    levels = [latents]
    for _ in range(stages - 1):
        levels.append(halve(levels[-1]))
    return tuple(reversed(levels))


def noise_pyramid(noise: jax.Array, stages: int) -> tuple[jax.Array, ...]:
    """ε_0 .. ε_{S-1} (2), coarsest first, from white noise of the finest size [B, T, H, W, C]."""
    levels = [noise]
    for _ in range(stages - 1):
        levels.append(2 * halve(levels[-1]))
    return tuple(reversed(levels))


def block_noise(white: jax.Array, gamma: float) -> jax.Array:
    """n (3) from white noise of the same shape [B, T, H, W, C]; H and W even.

    Raises:
      UserError: gamma has no such noise, or a side is odd.
    """
    if not 0 < gamma <= 1 / 3:
        raise UserError(f"gamma is {gamma}: block noise of covariance (1 + gamma) I - gamma J needs 0 < gamma <= 1/3")
    if white.shape[ROWS] % 2 or white.shape[COLUMNS] % 2:
        raise UserError(f"noise of {white.shape[ROWS]} x {white.shape[COLUMNS]} has no 2x2 blocks: use even sides")
    mean = upsample(halve(white))
    return math.sqrt(1 + gamma) * (white - mean) + math.sqrt(1 - 3 * gamma) * mean


def draw_block_noise(key: jax.Array, shape: tuple[int, ...], gamma: float, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Block noise (3) of the shape [B, T, H, W, C] from a key."""
    return block_noise(jax.random.normal(key, shape, dtype), gamma)


def stage_jump(latents: jax.Array, noise: jax.Array, alpha: float, beta: float) -> jax.Array:
    """x_i (5).

    Args:
      latents: [B, T, H, W, C], where the coarser stage ended.
      noise: block noise [B, T, 2H, 2W, C].
      alpha, beta: `PyramidSchedule.renoise_weights(i)`.

    Returns:
      [B, T, 2H, 2W, C], where stage i starts.
    """
    return alpha * upsample(latents) + beta * noise
