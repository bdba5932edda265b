"""Measures of videos against their originals that need no other network, and the loss made of two of them.

    PSNR(a, b) = 10 log10(R^2 / mean (a - b)^2)                          over all values of a clip, in dB            (1)
    SSIM(x, y) = (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))                        (2)
        m, s: means, variances and covariance under a Gaussian window of 11 x 11 pixels, deviation 1.5, around every
        pixel where it fits; C1 = (0.01 R)^2, C2 = (0.03 R)^2; the mean over pixels, colours and frames
    F(x)       = mean |x[t] - x[t - 1]|,   flicker(a, b) = F(a) - F(b)   over t >= 1, pixels and colours             (3)
    L          = Lg + 1/S sum_s (1 - SSIM_s),   s = 0 .. S - 1                                                       (4)
        Lg: equation 3 of `video_vae`, a mean over S scales; SSIM_s: of frames averaged over 2^s x 2^s pixels

R is the range of values, peak to peak, of pictures that are symmetric about 0, as all videos here are: [-1, 1] has
R = 2. Equation 2 is defined for intensities of 0 and more, so R / 2 is added to the pictures first; its value is then
that of the same pictures in [0, 255] with R = 255.

Source of equation 2: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
Equation 4 is what trains a decoder where no LPIPS weights are at hand. It asks for the edges and the local contrast of
the original; unlike LPIPS it knows nothing of what people overlook.

Everything computes in float32 and gives one number a clip.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.distill.video_vae import VIDEO_RANGE, gradient_distance

WINDOW = 11
WINDOW_SIGMA = 1.5
K1, K2 = 0.01, 0.03
# Equal clips have an infinite ratio, which no mean over clips survives.
LARGEST_PSNR_DB = 300.0


def psnr_db(a_BFHWC: jax.Array, b_BFHWC: jax.Array, value_range: float) -> jax.Array:
    """Equation 1 for every clip, float32 [B]; 300 dB for equal ones.

    Args:
      a_BFHWC, b_BFHWC: clips of one shape.
      value_range: R, 2 for clips in [-1, 1].
    """
    a, b = _clips(a_BFHWC, b_BFHWC)
    error = jnp.square(a - b).mean((1, 2, 3, 4)) / value_range**2
    return -10.0 * jnp.log10(jnp.maximum(error, 10.0 ** (-LARGEST_PSNR_DB / 10)))


def ssim(a_BFHWC: jax.Array, b_BFHWC: jax.Array, value_range: float) -> jax.Array:
    """Equation 2 for every clip, float32 [B], at most 1. Differentiable.

    Args:
      a_BFHWC, b_BFHWC: clips of one shape with values in [-R / 2, R / 2], frames of at least 11 x 11 pixels.
      value_range: R.

    Raises:
      ValueError: shapes that differ or are no clips, or frames smaller than the window.
    """
    a, b = _clips(a_BFHWC, b_BFHWC)
    if min(a.shape[2:4]) < WINDOW:
        raise ValueError(
            f"frames are {a.shape[2]} x {a.shape[3]} pixels, smaller than the window of SSIM: give {WINDOW} or more"
        )
    c1, c2 = (K1 * value_range) ** 2, (K2 * value_range) ** 2
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    # Variances do not see the offset, and round less without it.
    variances = _window_mean(a * a + b * b) - mean_a * mean_a - mean_b * mean_b
    covariance = _window_mean(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + value_range / 2, mean_b + value_range / 2
    luminance = (2.0 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    return (luminance * (2.0 * covariance + c2) / (variances + c2)).mean((1, 2, 3, 4))


def flicker(a_BFHWC: jax.Array, b_BFHWC: jax.Array) -> jax.Array:
    """Equation 3 for every clip, float32 [B]: by how much consecutive frames of `a` differ more than those of `b`.

    Args:
      a_BFHWC: the reconstruction.
      b_BFHWC: the original, of the same shape; two frames or more.

    Raises:
      ValueError: shapes that differ or are no clips, or a single frame.
    """
    a, b = _clips(a_BFHWC, b_BFHWC)
    if a.shape[1] < 2:
        raise ValueError("clips have a single frame: flicker is a difference of frames, give 2 or more")
    change = lambda x: jnp.abs(jnp.diff(x, axis=1)).mean((1, 2, 3, 4))
    return change(a) - change(b)


def gradient_ssim_loss(a_BFHWC: jax.Array, b_BFHWC: jax.Array, scales: int) -> jax.Array:
    """Equation 4 for every clip, float32 [B]; 0 for equal ones.

    Args:
      a_BFHWC, b_BFHWC: clips of one shape in [-1, 1]. Sides are multiples of 2^(S - 1), and at least 11 times that.
      scales: S.

    Raises:
      ValueError: shapes that differ or are no clips, or sides that do not fit the scales.
    """
    a, b = _clips(a_BFHWC, b_BFHWC)
    coarsest = 2 ** (scales - 1) if scales > 0 else 0
    if not coarsest or any(side % coarsest or side // coarsest < WINDOW for side in a.shape[2:4]):
        raise ValueError(
            f"frames of {a.shape[2]} x {a.shape[3]} pixels do not fit {scales} scales: sides have to be multiples of "
            f"2^(scales - 1), and {WINDOW} times that or more; give other frames or a smaller positive number"
        )
    total = gradient_distance(a, b, scales)
    for scale in range(scales):
        if scale:
            a, b = _halved(a), _halved(b)
        total = total + (1.0 - ssim(a, b, VIDEO_RANGE)) / scales
    return total


def measure_clips(reconstruction: jax.Array, video: jax.Array, value_range: float) -> dict[str, jax.Array]:
    """Every measure of every clip, {"psnr_db", "ssim", "flicker"} -> float32 [B].

    The reconstruction is brought into the range first, as a file or a screen would do. Clips of one frame have no
    `flicker`, which is left out.

    Args:
      reconstruction, video: [B, F, H, W, C]; the video is in [-R / 2, R / 2].
      value_range: R, 2 for videos in [-1, 1].

    Raises:
      ValueError: shapes that differ or are no clips, or frames of less than 11 x 11 pixels.
    """
    shown = jnp.clip(reconstruction, -value_range / 2, value_range / 2)
    measures = {"psnr_db": psnr_db(shown, video, value_range), "ssim": ssim(shown, video, value_range)}
    return measures | ({"flicker": flicker(shown, video)} if video.shape[1] > 1 else {})


def _clips(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in float32, after a look at their shapes."""
    if a.ndim != 5 or a.shape != b.shape:
        raise ValueError(f"clips are {list(a.shape)} and {list(b.shape)}: give two arrays [B, F, H, W, C] of one shape")
    return a.astype(jnp.float32), b.astype(jnp.float32)


def _halved(x: jax.Array) -> jax.Array:
    """[B, F, H, W, C] -> means of 2 x 2 pixels."""
    batch, frames, height, width, channels = x.shape
    return x.reshape(batch, frames, height // 2, 2, width // 2, 2, channels).mean((3, 5))


def _window_mean(x: jax.Array) -> jax.Array:
    """[B, F, H, W, C] -> Gaussian means [B, F, H - 10, W - 10, C], by rows and columns in turn.

    As products with banded matrices, which on a CPU at 128 x 128 pixels, forward and backward, take a tenth of the time
    that sums of shifted copies do.
    """
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("oh,bfhwc->bfowc", _window_matrix(x.shape[2]), x, precision=exact)
    return jnp.einsum("ow,bfhwc->bfhoc", _window_matrix(x.shape[3]), x, precision=exact)


def _window_matrix(length: int) -> np.ndarray:
    """float32 [length - 10, length]: row i holds the window's weights from column i on."""
    offsets = np.arange(length)[None] - np.arange(length - WINDOW + 1)[:, None] - WINDOW // 2
    weights = np.where(np.abs(offsets) <= WINDOW // 2, np.exp(-0.5 * (offsets / WINDOW_SIGMA) ** 2), 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
