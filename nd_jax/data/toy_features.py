"""Simple features of toy clips, and the Frechet distance between two sets of clips.

The distance is that between the two normal distributions with the sets' means m and covariances C:

    d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))                                                        (1)

With centred rows X_a / sqrt(n_a - 1) = Q_a R_a, so that C_a = R_a^T R_a, the last trace is the sum of the singular
values of R_a R_b^T (C_a C_b = R_a^T R_a R_b^T R_b has the squares of these as eigenvalues). No square root of a
matrix is taken, so (1) holds for fewer samples than features too, where covariances are singular.

Equal distributions have a distance above zero with finite sets, falling as 1 / n: compare distances of sets of equal
size, and put two sets of real clips beside them to see the floor.
"""

import numpy as np

from nd_jax.data.toy_prompts import COLOURS
from nd_jax.data.toy_tracker import PATCH_SIZE, REACH, Track, as_video, track
from nd_jax.data.toy_world import CLIP_FRAMES, PALETTE
from nd_jax.errors import UserError

# Name -> the difference that counts as one. Real clips spread over a few units in what captions say, and stay far below
# one unit in what is always wrong: noise, jitter, flicker.
FEATURES = {
    **{f"object_{channel}": 0.5 for channel in "rgb"},
    **{f"part_{colour}": 1.0 for colour in COLOURS},
    **{f"background_{channel}": 0.2 for channel in "rgb"},
    "contrast": 0.3,
    "noise": 0.1,
    "inside": 0.5,
    "start_x": 0.5,
    "start_y": 0.5,
    "travel_x": 0.25,
    "travel_y": 0.25,
    "jitter": 0.1,
    "diameter": 0.1,
    "diameter_flicker": 0.2,
    "colour_flicker": 0.2,
    "spread": 0.4,
    "skew_x": 0.1,
    "skew_y": 0.1,
    "fourfold": 0.5,
    "sharpness": 0.3,
    "change": 0.03,
}
# Larger values are cut: of a clip without an object some are arbitrary, and one such clip should not be the distance.
_LIMIT = 5.0
# Width in RGB over which a pixel counts to a colour of the histogram.
_COLOUR_WIDTH = 0.2
_TINY = 1e-9


def features(video: np.ndarray, clip_frames: int = CLIP_FRAMES) -> np.ndarray:
    """The numbers of `FEATURES` in its units, cut to [-5, 5]: float32 [len(FEATURES)], defined without an object too.

    Before division by the units colours are in [0, 1], lengths in sides, travel per `clip_frames` frames.

    Args:
      video: [T, H, W, 3], uint8 or floats in [0, 1].

    Raises:
      UserError: not a video by shape or dtype, or with values that are not finite.
    """
    video = as_video(video)
    if not np.isfinite(video).all():
        raise UserError("the video has values that are not finite, so it has no features; leave it out and say so")
    found = track(video, clip_frames)
    mass = found.mass.sum()
    weights = found.mass[:, None] / max(mass, _TINY)
    colour = (weights * found.frame_colours).sum(0)
    diameters = np.sqrt(found.mass)
    diameter = diameters.mean()
    change = np.abs(np.diff(video, axis=0)).mean() if len(video) > 1 else 0.0
    values = [
        *colour,
        *_histogram(found),
        *found.background,
        found.contrast,
        found.noise,
        found.inside,
        *found.start,
        *found.travel,
        found.jitter,
        diameter,
        diameters.std() / max(diameter, _TINY),
        np.sqrt((weights * (found.frame_colours - colour) ** 2).sum()),
        *_moments(_mask(found)),
        _sharpness(video) / max(found.contrast, 0.05),
        change,
    ]
    return np.clip(np.array(values) / np.array(list(FEATURES.values())), -_LIMIT, _LIMIT).astype(np.float32)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """d^2 of equation (1), at least 0.

    Args:
      first, second: features [n, D], a row per clip; n may differ and be smaller than D, but is at least 2.

    Raises:
      UserError: not two sets of the same features, fewer than 2 rows, or values that are not finite.
    """
    sets = [np.asarray(rows, np.float64) for rows in (first, second)]
    if any(rows.ndim != 2 or len(rows) < 2 for rows in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise UserError(
            f"feature sets of shapes {sets[0].shape} and {sets[1].shape} cannot be compared; give [clips, features] "
            "with 2 clips or more and the same features"
        )
    if not all(np.isfinite(rows).all() for rows in sets):
        raise UserError("features are not all finite; leave out the clips they come from and say so")
    means = [rows.mean(0) for rows in sets]
    factors = [
        np.linalg.qr((rows - mean) / np.sqrt(len(rows) - 1), mode="r") for rows, mean in zip(sets, means, strict=True)
    ]
    cross = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    squares = sum((factor**2).sum() for factor in factors)
    return float(max(((means[0] - means[1]) ** 2).sum() + squares - 2 * cross, 0.0))


def _mask(found: Track) -> np.ndarray:
    """Strength of the object's patch relative to its maximum, in [0, 1] [PATCH_SIZE, PATCH_SIZE]."""
    mean = found.patch.sum((0, 1))
    strength = found.patch @ (mean / max(np.linalg.norm(mean), _TINY))
    strength = np.clip(strength / max(strength.max(), _TINY), 0, 1)
    return strength * (strength > 0.25)


def _histogram(found: Track) -> np.ndarray:
    """Part of the object in each colour of the palette [6]; pixels far from all count to none."""
    mask = _mask(found)[..., None]
    entries = np.array([PALETTE[name] for name in COLOURS])
    distance = np.linalg.norm(found.background + found.patch[:, :, None] - entries, axis=-1)
    return (mask * np.exp(-0.5 * (distance / _COLOUR_WIDTH) ** 2)).sum((0, 1)) / max(mask.sum(), _TINY)


def _moments(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(spread, skew in x, skew in y, fourfold symmetry) of a mask; its size and its place do not matter.

    `spread` is the polar moment of inertia over area^2 times 2 pi, 1 for a disc; `fourfold` is mean(r^4 cos 4 phi) /
    mean(r^2)^2, 0 for a disc, negative for an upright square, positive for an upright cross.
    """
    total = mask.sum()
    if total < _TINY:
        return 0.0, 0.0, 0.0, 0.0
    weights = mask / total
    axis = np.linspace(-REACH, REACH, PATCH_SIZE)
    x = axis[None, :] - (weights @ axis).sum()
    y = axis[:, None] - (axis @ weights).sum()
    square = max((weights * (x**2 + y**2)).sum(), _TINY)
    area = total * (axis[1] - axis[0]) ** 2
    return (
        2 * np.pi * square / area,
        (weights * x**3).sum() / square**1.5,
        (weights * y**3).sum() / square**1.5,
        (weights * (x**4 - 6 * x**2 * y**2 + y**4)).sum() / square**2,
    )


def _sharpness(video: np.ndarray) -> float:
    """Largest differences of neighbouring pixels: mean over frames of the 99 % quantile, length in colour."""
    horizontal = np.linalg.norm(np.diff(video, axis=2), axis=-1).reshape(len(video), -1)
    vertical = np.linalg.norm(np.diff(video, axis=1), axis=-1).reshape(len(video), -1)
    return float(np.quantile(np.concatenate([horizontal, vertical], axis=1), 0.99, axis=1).mean())
