"""Does a clip show what its caption says? Reads colour, shape, direction and speed back from the pixels alone.

    colour      background + least-squares contrast of the object's patch against its template; nearest palette entry
    shape       best normalised correlation of the patch with templates of every shape, many sizes and blurs
    direction   of the line through the centres, if it is close to an axis
    speed       nearest, as a ratio, of the distances that the world uses

What cannot be read is `UNREADABLE` and never right. Thresholds are set for distorted and generated clips: an attribute
is refused when the evidence is nearer to nothing than to any answer, not when it is merely worse than a clean clip.
"""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from nd_jax.data.toy_prompts import ATTRIBUTES, SHAPES, parse_caption
from nd_jax.data.toy_tracker import PATCH_SIZE, PATCH_STEP, REACH, Track, as_video, track
from nd_jax.data.toy_world import CLIP_FRAMES, DIRECTION, PALETTE, TRAVEL, outline_distance
from nd_jax.errors import UserError

UNREADABLE = "unreadable"

# An object: this contrast, this many times the noise, this part of the mask in one place, in this part of the frames.
_MIN_CONTRAST = 0.15
_MIN_CONTRAST_TO_NOISE = 2.0
_MIN_INSIDE = 0.6
_MIN_FRAMES = 0.7
# Half of the distance between the closest two colours would be 0.29; washed-out colours are further from all.
_MAX_COLOUR_DISTANCE = 0.42
_MIN_CORRELATION = 0.75
# Motion: the centres follow a line, at most 31 degrees (tangent 0.6) from an axis, at a speed within a factor of
# 1.6 of a known one (neighbours are a factor of 1.9 apart).
_MAX_JITTER = 0.06
_MAX_TANGENT = 0.6
_MAX_SPEED_RATIO = 1.6

_TEMPLATE_RADII = np.geomspace(0.12, 0.27, 9)
_TEMPLATE_BLURS = (0.0, 0.02, 0.035, 0.055)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a clip shows; an attribute is a word of `toy_prompts` or `UNREADABLE`.

    Attributes:
      reason: why attributes are unreadable, empty when none is.
      correlation: of the object with the best template, in [-1, 1]; 0 when no object was found.
      margin: `correlation` minus that of the best template of another shape.
      colour_distance: from the object's colour to the nearest of the palette, in [0, 1]^3.
      diameter: of the best template, in sides.
      travel: (x, y) displacement in `clip_frames` frames, in sides.
    """

    colour: str
    shape: str
    direction: str
    speed: str
    reason: str = ""
    correlation: float = 0.0
    margin: float = 0.0
    colour_distance: float = 0.0
    diameter: float = 0.0
    travel: tuple[float, float] = (0.0, 0.0)


def read_scene(video: np.ndarray, clip_frames: int = CLIP_FRAMES) -> Reading:
    """Reads a clip.

    Args:
      video: [T, H, W, 3], uint8 or floats in [0, 1].
      clip_frames: the world's, in which a shape ends its path.

    Raises:
      UserError: not a video, by shape or dtype. A bad picture is a reading, not an error.
    """
    if clip_frames < 2:
        raise UserError(f"clip_frames {clip_frames} is no motion; use the world's value, 2 or more")
    video = as_video(video)
    nothing = Reading(UNREADABLE, UNREADABLE, UNREADABLE, UNREADABLE)
    if not np.isfinite(video).all():
        return dataclasses.replace(nothing, reason="the video has values that are not finite")
    found = track(video, clip_frames)
    reason = _no_object(found)
    if reason:
        return dataclasses.replace(nothing, reason=reason)

    shape, correlation, margin, template = _match(found)
    colour, distance = _colour(found, template)
    direction, speed, still = _motion(found)
    reasons = [
        f"colour {distance:.2f} from every palette entry" if colour == UNREADABLE else "",
        f"correlation {correlation:.2f} with the nearest shape" if shape == UNREADABLE else "",
        still,
    ]
    return Reading(
        colour=colour,
        shape=shape,
        direction=direction,
        speed=speed,
        reason="; ".join(reason for reason in reasons if reason),
        correlation=correlation,
        margin=margin,
        colour_distance=distance,
        diameter=2 * float(_TEMPLATE_RADII[template // len(_TEMPLATE_BLURS) % len(_TEMPLATE_RADII)]),
        travel=(float(found.travel[0]), float(found.travel[1])),
    )


def check(video: np.ndarray, caption: str, clip_frames: int = CLIP_FRAMES) -> dict[str, bool]:
    """For each of colour, shape, direction and speed, whether the video shows what the caption says.

    Raises:
      UserError: the caption is not of the toy grammar, or this is not a video.
    """
    wanted, reading = parse_caption(caption), read_scene(video, clip_frames)
    return {name: getattr(reading, name) == wanted[name] for name in ATTRIBUTES}


def accuracy(
    videos: Iterable[np.ndarray], captions: Iterable[str], clip_frames: int = CLIP_FRAMES
) -> dict[str, dict[str, float]]:
    """How many videos show what their captions say.

    Returns:
      {"colour": {"correct", "unreadable", "count", "rate", "low", "high"}, "shape": ..., "direction": ..., "speed":
      ..., "all": ...}. `low` and `high` are the 95 % Wilson interval of the rate; "all" counts videos with all four
      attributes right, and as unreadable those with any attribute unreadable. Unreadable is counted as wrong.

    Raises:
      UserError: no videos, or not one caption for each.
    """
    correct = dict.fromkeys((*ATTRIBUTES, "all"), 0)
    unreadable = dict(correct)
    count = 0
    try:
        for video, caption in zip(videos, captions, strict=True):
            wanted, reading = parse_caption(caption), read_scene(video, clip_frames)
            right = {name: getattr(reading, name) == wanted[name] for name in ATTRIBUTES}
            missing = {name: getattr(reading, name) == UNREADABLE for name in ATTRIBUTES}
            for name in ATTRIBUTES:
                correct[name] += right[name]
                unreadable[name] += missing[name]
            correct["all"] += all(right.values())
            unreadable["all"] += any(missing.values())
            count += 1
    except ValueError as error:
        raise UserError(f"videos and captions differ in number after {count}; give one caption for each") from error
    if not count:
        raise UserError("no videos to check; give at least one")
    return {
        name: {"correct": correct[name], "unreadable": unreadable[name], "count": count, "rate": correct[name] / count}
        | dict(zip(("low", "high"), wilson_interval(correct[name], count), strict=True))
        for name in correct
    }


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """(low, high) of a rate that was measured as correct / count; z = 1.96 gives 95 % (Wilson, 1927)."""
    rate = correct / count
    spread = z * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    centre = rate + z**2 / (2 * count)
    return float(max((centre - spread) / scale, 0)), float(min((centre + spread) / scale, 1))


def _no_object(found: Track) -> str:
    """Why there is no object to read, or an empty string."""
    if found.contrast < _MIN_CONTRAST:
        return f"nothing stands out from the background (contrast {found.contrast:.2f})"
    if found.contrast < _MIN_CONTRAST_TO_NOISE * found.noise:
        return f"contrast {found.contrast:.2f} is lost in noise of {found.noise:.2f}"
    if found.inside < _MIN_INSIDE:
        return f"no single object: {100 * found.inside:.0f} % of what stands out is in one place"
    present = float((found.mass > 0.4 * np.median(found.mass)).mean()) if found.mass.any() else 0.0
    if present < _MIN_FRAMES:
        return f"the object is in {100 * present:.0f} % of the frames"
    return ""


def _match(found: Track) -> tuple[str, float, float, int]:
    """(shape, correlation, margin to the next shape, number of the best template)."""
    patch = found.patch @ (found.patch.sum((0, 1)) / max(np.linalg.norm(found.patch.sum((0, 1))), 1e-9))
    scores = _templates()[1] @ _normalised(patch.reshape(1, -1))[0]
    best = int(scores.argmax())
    by_shape = scores.reshape(len(SHAPES), -1).max(1)
    order = np.argsort(by_shape)
    correlation = float(by_shape[order[-1]])
    shape = SHAPES[order[-1]] if correlation >= _MIN_CORRELATION else UNREADABLE
    return shape, correlation, correlation - float(by_shape[order[-2]]), best


def _colour(found: Track, template: int) -> tuple[str, float]:
    """(nearest palette entry, distance); the regression undoes the mixing with the background at soft edges."""
    weights = _templates()[0][template]
    contrast = weights @ found.patch.reshape(-1, 3) / (weights @ weights)
    measured = found.background + contrast
    distances = {name: float(np.linalg.norm(measured - entry)) for name, entry in PALETTE.items()}
    nearest = min(distances, key=distances.__getitem__)
    return (nearest if distances[nearest] <= _MAX_COLOUR_DISTANCE else UNREADABLE), distances[nearest]


def _motion(found: Track) -> tuple[str, str, str]:
    """(direction, speed, reason if one of them is unreadable)."""
    if len(found.mass) < 2:
        return UNREADABLE, UNREADABLE, "one frame shows no motion"
    if found.jitter > _MAX_JITTER:
        return UNREADABLE, UNREADABLE, f"the object jumps by {found.jitter:.2f} sides"
    distance = float(np.linalg.norm(found.travel))
    if distance * _MAX_SPEED_RATIO < min(TRAVEL.values()):
        return UNREADABLE, UNREADABLE, f"the object stands still (travel {distance:.2f} sides)"
    along = {name: float(found.travel @ step) for name, step in DIRECTION.items()}
    direction = max(along, key=along.__getitem__)
    reasons = []
    if np.sqrt(max(distance**2 - along[direction] ** 2, 0)) > _MAX_TANGENT * along[direction]:
        direction = UNREADABLE
        reasons.append("the object moves diagonally")
    ratios = {name: abs(np.log(distance / value)) for name, value in TRAVEL.items()}
    speed = min(ratios, key=ratios.__getitem__)
    if ratios[speed] > np.log(_MAX_SPEED_RATIO):
        speed = UNREADABLE
        reasons.append(f"travel {distance:.2f} sides is no known speed")
    return direction, speed, "; ".join(reasons)


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """(coverage, the same normalised), float64 [shapes * radii * blurs, PATCH_SIZE^2], in that order of axes."""
    axis = np.linspace(-REACH, REACH, PATCH_SIZE)
    x, y = axis[None, :], axis[:, None]
    drawn = []
    for shape in SHAPES:
        for radius in _TEMPLATE_RADII:
            coverage = np.clip(0.5 - outline_distance(shape, x, y, radius) / PATCH_STEP, 0, 1)
            drawn += [_blur(coverage, blur / PATCH_STEP) for blur in _TEMPLATE_BLURS]
    flat = np.stack(drawn).reshape(len(drawn), -1)
    return flat, _normalised(flat)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a square image as a product with one matrix from both sides; sigma in pixels, 0 for none."""
    if sigma == 0:
        return image
    index = np.arange(len(image))
    kernel = np.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ image @ kernel.T


def _normalised(rows: np.ndarray) -> np.ndarray:
    """Rows with mean 0 and length 1, so that their products are correlations; constant rows become 0."""
    centred = rows - rows.mean(1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
