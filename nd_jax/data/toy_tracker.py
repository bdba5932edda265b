"""Finds the one moving object of a toy clip: what `toy_checker` reads and `toy_features` measures.

Classical image processing, made for blurred, noisy, compressed and generated clips:

    background   a plane a + b x + c y per frame and colour channel, fitted to the pixels that agree with it
    strength     s = smooth(video - background) . u,  u the mean colour direction of the strongest pixels
    mask         m = clip(s / contrast, 0, 1), weak values cut off so that noise does not pull the centre
    path         centre of mass of m per frame, a straight line through the centres by least squares, weighted by mass;
                 twice more with m restricted to a window around the line
    patch        video - background around the line, averaged over frames: the object at rest

Lengths are in sides (the shorter edge), time runs from 0 to 1 over `clip_frames` frames, as in `toy_world`.
"""

import dataclasses

import numpy as np

from nd_jax.data.toy_world import CLIP_FRAMES
from nd_jax.errors import UserError

# The patch covers [-REACH, REACH]^2 around the centre, in sides; the largest shape reaches 0.21.
REACH = 0.34
PATCH_SIZE = 35
PATCH_STEP = 2 * REACH / (PATCH_SIZE - 1)

# The smallest shape, a cross, covers at least this part of a picture of 16:9.
_OBJECT_PART = 0.025
_WORKING_SIDE = 32
_STRONG = 0.7
_CUT = 0.4
_WINDOW = 0.3
# A pixel is background if it is within this many median deviations, or within half a step of 8 bits, of the plane.
_INLIER = 3.0
_QUANTUM = 0.5 / 255
_TINY = 1e-9


@dataclasses.dataclass(frozen=True)
class Track:
    """What was found; T frames, all finite even when there is no object.

    Attributes:
      background: float64 [3], mean colour of the fitted background.
      noise: root mean square of what the background does not explain outside the object.
      contrast: length of (object - background) in colour, 0 when the strongest pixels agree on no colour.
      mass: float64 [T], area of the mask within the window, in square sides.
      inside: part of the whole mask that lies within the window, in [0, 1].
      start: float64 [2], (x, y) of the line in frame 0, sides.
      travel: float64 [2], displacement along the line in `clip_frames` frames, sides.
      jitter: root mean square distance of the centres from the line, sides.
      patch: float64 [PATCH_SIZE, PATCH_SIZE, 3], video - background around the line, mean over frames.
      frame_colours: float64 [T, 3], mean colour of the object in each frame, weighted by the mask.
    """

    background: np.ndarray
    noise: float
    contrast: float
    mass: np.ndarray
    inside: float
    start: np.ndarray
    travel: np.ndarray
    jitter: float
    patch: np.ndarray
    frame_colours: np.ndarray


def as_video(video: np.ndarray) -> np.ndarray:
    """float64 [T, H, W, 3] in [0, 1] from uint8, or from floats in [0, 1]; floats beyond are clipped, NaN stays NaN.

    Raises:
      UserError: another shape or dtype, or a picture below 8 pixels.
    """
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or not video.shape[0] or min(video.shape[1:3]) < 8:
        raise UserError(f"a video of shape {video.shape} is not [frames, height, width, 3] of at least 8x8 pixels")
    if video.dtype == np.uint8:
        return video / 255.0
    if not np.issubdtype(video.dtype, np.floating):
        raise UserError(f"a video of dtype {video.dtype} cannot be read; give uint8, or floats in [0, 1]")
    return np.clip(video.astype(np.float64), 0, 1)


def track(video: np.ndarray, clip_frames: int = CLIP_FRAMES) -> Track:
    """Follows the object.

    Args:
      video: float64 [T, H, W, 3] in [0, 1] from `as_video`, finite.
      clip_frames: the world's, to turn a motion per frame into one per clip.
    """
    # At 32 to 63 pixels a side nothing is lost that is read here, noise averages out, and large clips cost no more.
    factor = max(min(video.shape[1:3]) // _WORKING_SIDE, 1)
    side = min(video.shape[1:3]) / factor
    video = _pool(video, factor)
    frames, height, width, _ = video.shape
    residual, background, noise = _without_background(video)
    strength, contrast = _strength(_smooth(residual))
    mask = strength * (strength > _CUT)

    x = (np.arange(width) + 0.5) / side
    y = (np.arange(height) + 0.5) / side
    times = np.arange(frames) / (clip_frames - 1)
    window = np.ones_like(mask)
    for _ in range(3):
        mass, centres = _centres(mask * window, x, y)
        line = _line(times, centres, mass)
        path = line[0] + times[:, None] * line[1]
        distance = np.hypot(x - path[:, 0, None, None], y[:, None] - path[:, 1, None, None])
        window = (distance < _WINDOW).astype(np.float64)
    mass, centres = _centres(mask * window, x, y)
    deviation = ((centres - path) ** 2).sum(1)
    weights = mask * window
    colours = np.einsum("thw,thwc->tc", weights, video) / np.maximum(mass[:, None], _TINY)
    return Track(
        background=background,
        noise=noise,
        contrast=contrast,
        mass=mass / side**2,
        inside=float(mass.sum() / max(mask.sum(), _TINY)),
        start=line[0],
        travel=line[1],
        jitter=float(np.sqrt((mass * deviation).sum() / max(mass.sum(), _TINY))),
        patch=_patch(residual, path * side, side),
        frame_colours=colours,
    )


def _pool(video: np.ndarray, factor: int) -> np.ndarray:
    """Mean over squares of factor^2 pixels; an incomplete square at the right or the bottom is left out."""
    frames, height, width, channels = video.shape
    rows, columns = height // factor, width // factor
    squares = video[:, : rows * factor, : columns * factor].reshape(frames, rows, factor, columns, factor, channels)
    return squares.mean((2, 4))


def _without_background(video: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(video - plane [T, H, W, 3], mean colour of the planes [3], noise beside the object)."""
    frames, height, width, _ = video.shape
    pixels = video.reshape(frames, height * width, 3)
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    basis = np.stack([np.ones(height * width), x.ravel(), y.ravel()], axis=1)
    plane = np.broadcast_to(np.median(pixels, axis=1, keepdims=True), pixels.shape)
    for _ in range(4):
        error = _length(pixels - plane)
        limit = np.maximum(_INLIER * np.median(error, axis=1, keepdims=True), _QUANTUM)
        weights = (error <= limit)[..., None] * basis
        normal = weights.transpose(0, 2, 1) @ basis + _TINY * np.eye(3)
        coefficients = np.linalg.solve(normal, weights.transpose(0, 2, 1) @ pixels)
        plane = basis @ coefficients
    residual = pixels - plane
    # `limit` is never below a median, so this is over at least half of the pixels.
    noise = float(np.sqrt((error[error <= limit] ** 2).mean() / 3))
    return residual.reshape(video.shape), coefficients[:, 0].mean(0), noise


def _length(vectors: np.ndarray) -> np.ndarray:
    """Euclidean length along the last axis; several times faster than `np.linalg.norm` for three channels."""
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))


def _smooth(frames: np.ndarray) -> np.ndarray:
    """Binomial filter (1, 2, 1) / 4 along height and width of [T, H, W, C], edges repeated."""
    for axis in (1, 2):
        padding = [(0, 0)] * 4
        padding[axis] = (1, 1)
        padded = np.moveaxis(np.pad(frames, padding, mode="edge"), axis, 0)
        frames = np.moveaxis((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4, 0, axis)
    return frames


def _strength(residual: np.ndarray) -> tuple[np.ndarray, float]:
    """(strength relative to the object's contrast, in [0, 1] [T, H, W]; the contrast)."""
    size = _length(residual)
    strongest = size >= max(_STRONG * np.quantile(size, 1 - _OBJECT_PART), _TINY)
    mean = residual[strongest].mean(0) if strongest.any() else np.zeros(3)
    contrast = float(np.linalg.norm(mean))
    return np.clip(residual @ (mean / max(contrast**2, _TINY)), 0, 1), contrast


def _centres(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mass [T] in pixels, centre of mass (x, y) [T, 2]); an empty frame has its centre in the picture's."""
    mass = mask.sum((1, 2))
    safe = np.maximum(mass, _TINY)
    centres = np.stack([(mask.sum(1) @ x) / safe, (mask.sum(2) @ y) / safe], axis=1)
    return mass, np.where(mass[:, None] > 0, centres, [x.mean(), y.mean()])


def _line(times: np.ndarray, centres: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """[start, travel], each (x, y), of the straight line through the centres."""
    basis = np.stack([np.ones_like(times), times], axis=1)
    weights = np.sqrt(mass + _TINY)[:, None]
    return np.linalg.lstsq(weights * basis, weights * centres, rcond=1e-9)[0]


def _patch(residual: np.ndarray, path: np.ndarray, side: float) -> np.ndarray:
    """Bilinear samples of the residual around the path (x, y in pixels, [T, 2]), zero outside, mean over frames."""
    frames, height, width, _ = residual.shape
    offsets = np.linspace(-REACH, REACH, PATCH_SIZE) * side
    padded = np.pad(residual, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Pixel i of the picture has its centre at i + 1/2 and is number i + 1 of the padded picture.
    x = np.clip(path[:, :1] + offsets + 0.5, 0, width + 1 - _TINY)
    y = np.clip(path[:, 1:] + offsets + 0.5, 0, height + 1 - _TINY)
    left, top = x.astype(int), y.astype(int)
    right, bottom = (x - left)[:, None, :, None], (y - top)[:, :, None, None]
    t, i, j = np.arange(frames)[:, None, None], top[:, :, None], left[:, None, :]
    upper = padded[t, i, j] * (1 - right) + padded[t, i, j + 1] * right
    lower = padded[t, i + 1, j] * (1 - right) + padded[t, i + 1, j + 1] * right
    return (upper * (1 - bottom) + lower * bottom).mean(0)
