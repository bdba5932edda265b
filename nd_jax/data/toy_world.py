"""A small deterministic world: clips of one moving, coloured shape, with captions. Everything is known, so a clip that
a model generates from a caption can be checked (`toy_checker`) on a CPU in milliseconds.

Lengths are in sides: a side is the shorter edge of the picture, s = min(H, W). In frame t = 0 .. T - 1 the shape of
diameter d = SIZE[size] s has its centre of mass at

    p(t) = p(0) + direction TRAVEL[speed] s t / (clip_frames - 1)                                                  (1)

so a speed is a distance per frame that depends on the picture and on `clip_frames`, not on how many frames are shown: a
clip of fewer frames is the beginning of the long one. p(0) leaves room for the whole path of `clip_frames` frames, so
the shape is inside the picture in every frame. A pixel's value is the background plus coverage times (colour -
background), with the coverage

    a(x) = clip(1/2 - D(x - p(t)), 0, 1)                                                                           (2)

where D is the signed distance to the shape's outline in pixels: edges are one pixel wide, and motion by parts of a
pixel shows.
"""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from nd_jax.data import toy_prompts as grammar
from nd_jax.errors import UserError

# sRGB in [0, 1]. The closest pair of colours (cyan and blue) is 0.58 apart, colours and backgrounds at least 0.46.
PALETTE = {
    "red": (0.90, 0.15, 0.15),
    "yellow": (0.94, 0.86, 0.15),
    "green": (0.15, 0.75, 0.22),
    "cyan": (0.15, 0.82, 0.88),
    "blue": (0.18, 0.24, 0.93),
    "magenta": (0.88, 0.22, 0.84),
}
BACKGROUND = {
    "black": (0.04, 0.04, 0.04),
    "grey": (0.32, 0.32, 0.32),
    "brown": (0.29, 0.20, 0.12),
    "navy": (0.06, 0.09, 0.25),
}
# The background is this much darker at the top and brighter at the bottom, relative to its mean.
SHADING = 0.15

# Diameters and distances in sides; the largest sum leaves room for margins.
SIZE = {"small": 0.32, "large": 0.42}
TRAVEL = {"slow": 0.13, "medium": 0.25, "fast": 0.48}
# x to the right, y downwards.
DIRECTION = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

CLIP_FRAMES = 17
MIN_SIDE = 32
_MARGIN = 1.5  # pixels between the shape and the edge of the picture: soft outlines reach that far at a corner


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a clip shows. Words are those of `toy_prompts`.

    Attributes:
      place: (across, along) in [0, 1]: where the path lies in the room that it has, across and along its direction.
    """

    colour: str
    shape: str
    direction: str
    speed: str
    size: str
    background: str
    place: tuple[float, float]


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute uniform and independent."""
    words = (
        grammar.COLOURS,
        grammar.SHAPES,
        grammar.DIRECTIONS,
        grammar.SPEEDS,
        grammar.SIZES,
        grammar.BACKGROUNDS,
    )
    across, along = rng.random(2)
    return Scene(*(_choose(choices, rng) for choices in words), place=(float(across), float(along)))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence about the scene in random wording; size and background are each named in half of the captions."""
    return grammar.caption_text(
        _choose(grammar.TEMPLATES, rng),
        _choose(("", scene.size), rng),
        scene.colour,
        scene.shape,
        _choose(grammar.VERBS, rng),
        _choose(grammar.DIRECTION_PHRASES[scene.direction], rng),
        _choose(grammar.SPEED_PHRASES[scene.speed], rng),
        _choose(("", scene.background), rng),
    )


def centres(scene: Scene, video_frames: int, height: int, width: int, clip_frames: int = CLIP_FRAMES) -> np.ndarray:
    """Centre of mass (x, y) in every frame, float64 [video_frames, 2], in pixels; pixel i covers [i, i + 1].

    Raises:
      UserError: a side is below 32 pixels, or the clip has more than `clip_frames` frames.
    """
    if min(height, width) < MIN_SIDE:
        raise UserError(f"toy clips of {height}x{width} pixels are too small to read; use at least {MIN_SIDE}")
    if not 1 <= video_frames <= clip_frames or clip_frames < 2:
        raise UserError(
            f"{video_frames} video_frames do not fit clip_frames {clip_frames}, in which a shape ends its path; "
            "use 1 or more frames, or raise clip_frames"
        )
    side = min(height, width)
    step = np.array(DIRECTION[scene.direction])
    path = step * TRAVEL[scene.speed] * side
    reach = SIZE[scene.size] * side / 2 + _MARGIN
    across, along = scene.place
    place = np.where(step == 0, across, along)
    low = reach + np.maximum(-path, 0)
    high = np.array([width, height]) - reach - np.maximum(path, 0)
    start = low + place * (high - low)
    return start + path * (np.arange(video_frames) / (clip_frames - 1))[:, None]


def outline_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline, negative inside, of a shape with its centre of mass at the origin.

    Exact beside edges, too small beyond corners, which only sharpens them. All shapes lie in [-radius, radius]^2.

    Args:
      x, y: coordinates that broadcast together, y downwards.
      radius: half the diameter, in the same unit.
    """
    if shape == "circle":
        return np.hypot(x, y) - 0.95 * radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86 * radius
    if shape == "triangle":
        # Corners (0, -1), (-1, 1/2), (1, 1/2): the slanted edges are |x| 3/2 - y = 1.
        return np.maximum((1.5 * abs(x) - y - radius) / np.hypot(1.5, 1.0), y - 0.5 * radius)
    if shape == "cross":
        arm = 0.34 * radius
        return np.minimum(
            np.maximum(abs(x) - radius, abs(y) - arm),
            np.maximum(abs(x) - arm, abs(y) - radius),
        )
    raise UserError(f"shape {shape!r} is not of the toy world; use one of {', '.join(grammar.SHAPES)}")


def render(scene: Scene, video_frames: int, height: int, width: int, clip_frames: int = CLIP_FRAMES) -> np.ndarray:
    """The clip, uint8 [video_frames, height, width, 3] in sRGB; equations (1) and (2).

    Raises:
      UserError: as for `centres`.
    """
    path = centres(scene, video_frames, height, width, clip_frames)
    x = np.arange(width) + 0.5 - path[:, :1]
    y = np.arange(height) + 0.5 - path[:, 1:]
    distance = outline_distance(scene.shape, x[:, None, :], y[:, :, None], SIZE[scene.size] * min(height, width) / 2)
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    shading = 1 + SHADING * np.linspace(-1, 1, height)[:, None, None]
    background = np.array(BACKGROUND[scene.background]) * shading
    video = background + coverage * (np.array(PALETTE[scene.colour]) - background)
    return np.round(255 * video).astype(np.uint8)


class ToyWorld:
    """Clips with captions, a function of (seed, index) alone; a `Source` of `nd_jax.data.loader`.

    Args:
      num_clips: length.
      seed: of everything; different seeds for training and held-out clips.
      video_frames, height, width: of a clip.
      clip_frames: frames in which a shape ends its path, see equation (1); needed for clips of more than 17 frames.

    Raises:
      UserError: no clips, or sizes that `render` cannot draw.
    """

    def __init__(
        self,
        num_clips: int,
        seed: int = 0,
        video_frames: int = CLIP_FRAMES,
        height: int = 64,
        width: int = 64,
        clip_frames: int = CLIP_FRAMES,
    ):
        if num_clips < 1 or seed < 0:
            raise UserError(f"a toy world of {num_clips} clips with seed {seed}: use 1 or more clips and a seed >= 0")
        self._num_clips = num_clips
        self._seed = seed
        self._shape = (video_frames, height, width, clip_frames)
        # A drawn clip is part of the fingerprint, so a change of the drawing or of the grammar changes it as well.
        first = self[0]
        identity = json.dumps([num_clips, seed, *self._shape, first["caption"]])
        self.fingerprint = hashlib.sha256(identity.encode() + first["video"].tobytes()).hexdigest()

    def __len__(self) -> int:
        return self._num_clips

    @property
    def ids(self) -> list[str]:
        """Names of all clips."""
        return [self._id(index) for index in range(self._num_clips)]

    def _id(self, index: int) -> str:
        return f"toy-{self._seed}-{index:06d}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"video": uint8 [video_frames, height, width, 3], "caption": str, "scene": Scene, "id": str}.

        Raises:
          IndexError: `index` is not in 0 .. num_clips - 1.
        """
        if not 0 <= index < self._num_clips:
            raise IndexError(f"clip {index} of {self._num_clips}")
        rng = np.random.default_rng([self._seed, index])
        scene = sample_scene(rng)
        words = {"caption": caption(scene, rng), "scene": scene, "id": self._id(index)}
        return {"video": render(scene, *self._shape), **words}


def _choose(options, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]
