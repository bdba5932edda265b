"""The optional safety checker, with the interface of the public code: (images, clip_input) -> (images, flags).

    checker = safety_checker(folder)
    images, has_nsfw_concept = checker(images=images, clip_input=clip_input(frames, checker_config.image_size))

The network is in the subfolder `safety_checker` of a model folder, which the released layout does not have: it is the
one of Stable Diffusion, and a checker of your own with the same interface can take its place. As in the public code,
some frames of a finished video are looked at, by default the first one.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.generate.parts import Timings, place_params
from nd_jax.models.safety_checker import SafetyChecker, SafetyCheckerConfig, unsafe
from nd_jax.weights.folder import read_config
from nd_jax.weights.networks import SAFETY_CHECKER

FOLDER = "safety_checker"

# Of CLIP's image processor: means and standard deviations of red, green and blue.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

Checker = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, list[bool]]]


def has_safety_checker(folder: Path) -> bool:
    """Whether a model folder holds a checker."""
    return (folder / FOLDER).is_dir()


def open_safety_checker(folder: Path) -> SafetyCheckerConfig:
    """The sizes of a model folder's checker.

    Raises:
      UserError: there is none, or its config is damaged.
    """
    return read_config(folder / FOLDER, SAFETY_CHECKER)[1]


def clip_input(frames: Sequence[np.ndarray], size: int) -> np.ndarray:
    """What CLIP sees of frames: the square in their middle, uint8 [H, W, 3] each -> float32 [N, size, size, 3].

    Agrees with `transformers.CLIPImageProcessor`: the shorter side becomes `size`, bicubic.
    """
    from PIL import Image

    squares = []
    for frame in frames:
        height, width = frame.shape[:2]
        shorter = min(height, width)
        height, width = int(size * height / shorter), int(size * width / shorter)
        resized = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        top, left = (height - size) // 2, (width - size) // 2
        squares.append(resized[top : top + size, left : left + size])
    return (np.stack(squares).astype(np.float32) / 255 - MEAN[None, None, None]) / STD[None, None, None]


def safety_checker(folder: Path, dtype: Any = jnp.float32, timings: Timings | None = None) -> Checker:
    """Loads the checker of a model folder.

    Args:
      folder: the model folder.
      dtype: of parameters and computation.
      timings: gets the part "safety_checker".

    Returns:
      A function of `images` [N, H, W, 3] in [0, 1] and `clip_input` [N, size, size, 3]: the images, a copy in which
      the flagged ones are black, and a flag for each.

    Raises:
      UserError: there is none, or its weights are damaged.
    """
    timings = timings or Timings()
    network = SafetyChecker(open_safety_checker(folder), dtype=dtype)
    with timings.of("safety_checker", "load"):
        params = place_params(folder / FOLDER, SAFETY_CHECKER, dtype)
    program = jax.jit(lambda params, pixels: network.apply({"params": params}, pixels))

    @functools.cache
    def compiled(shape: tuple[int, ...]) -> jax.stages.Compiled:
        with timings.of("safety_checker", "compile"):
            return program.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32)).compile()

    def check(images: np.ndarray, clip_input: np.ndarray) -> tuple[np.ndarray, list[bool]]:
        score = compiled(clip_input.shape)
        with timings.of("safety_checker", "run"):
            flags = unsafe(jax.device_get(score(params, clip_input)))
        images = np.where(flags[:, None, None, None], np.zeros_like(images), images)
        return images, flags.tolist()

    return check


def is_unsafe(checker: Checker, size: int, frames: Sequence[np.ndarray], count: int) -> bool:
    """Whether a checker flags one of `count` frames, evenly spaced from the first to the last; of one, the first.

    Args:
      checker: of `safety_checker`, or another one with its interface.
      size: of the pictures that it takes.
      frames: of a video, uint8 [H, W, 3] each.
      count: how many to look at.
    """
    looked_at = [frames[k] for k in np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    images = np.stack(looked_at).astype(np.float32) / 255
    return any(checker(images=images, clip_input=clip_input(looked_at, size))[1])
