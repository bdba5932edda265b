"""What training on single frames makes of clips: random parts, turned over at random."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nd_jax.data.videos import random_part, symmetric_floats


@dataclasses.dataclass(frozen=True)
class FrameTransform:
    """Record transform: {"video": float32 [F, H, W, 3] in [-1, 1]}. No network has a say in the sizes here.

    Attributes:
      video_frames: consecutive frames from a random start; all by default.
      height, width: of a random cut-out; the whole picture by default.
      flips: turns half of the cut-outs left to right, and half of them upside down.
    """

    video_frames: int | None = None
    height: int | None = None
    width: int | None = None
    flips: bool = False

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        video = random_part(record["video"], (self.video_frames, self.height, self.width), rng)
        if self.flips:
            for axis in (1, 2):
                if rng.integers(2):
                    video = np.flip(video, axis)
        return {"video": symmetric_floats(video)}
