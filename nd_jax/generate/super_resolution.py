"""The last part of the pipeline: QuickSRNet makes a video's frames larger, 320 x 512 into 640 x 1024 with 2x.

The network is in the subfolder `quicksrnet` of a model folder, which is ours: the released layout has none (see
docs/super_resolution.md for where the weights come from). It takes what a file would hold, frames of 8 bits.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError
from nd_jax.generate.parts import Timings, place_params
from nd_jax.models.quicksrnet import QuickSRNet, QuickSRNetConfig
from nd_jax.weights.folder import read_config
from nd_jax.weights.networks import QUICKSRNET

FOLDER = "quicksrnet"


def has_super_resolution(folder: Path) -> bool:
    """Whether a model folder makes frames larger."""
    return (folder / FOLDER).is_dir()


def open_super_resolution(folder: Path) -> QuickSRNetConfig:
    """The sizes of a model folder's network.

    Raises:
      UserError: there is none, or its config is damaged.
    """
    if not has_super_resolution(folder):
        raise UserError(f"{folder}: has no {FOLDER}; import one (docs/super_resolution.md), or leave the frames small")
    return read_config(folder / FOLDER, QUICKSRNET)[1]


def upscaler(folder: Path, timings: Timings | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Loads the network; the result turns a frame, uint8 [H, W, 3], into a larger one, uint8 [r H, r W, 3].

    It computes in float32: bfloat16 resolves no more than the 8 bits of a frame, and would round at every layer.

    Args:
      folder: the model folder.
      timings: gets the part "super_resolution".

    Raises:
      UserError: there is none, or its weights are damaged.
    """
    timings = timings or Timings()
    network = QuickSRNet(open_super_resolution(folder))
    with timings.of("super_resolution", "load"):
        params = place_params(folder / FOLDER, QUICKSRNET, jnp.float32)
    program = jax.jit(lambda params, x: jnp.round(255 * network.apply({"params": params}, x)).astype(jnp.uint8))

    @functools.cache
    def compiled(shape: tuple[int, ...]) -> jax.stages.Compiled:
        with timings.of("super_resolution", "compile"):
            return program.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32)).compile()

    def enlarge(frame: np.ndarray) -> np.ndarray:
        pictures = (frame.astype(np.float32) / 255)[None]
        larger = compiled(pictures.shape)
        with timings.of("super_resolution", "run"):
            return np.asarray(larger(params, pictures))[0]

    return enlarge
