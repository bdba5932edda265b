"""Constant buffers of released checkpoints: computed from the config, compared with a file, written again."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError
from nd_jax.weights.network import Network
from nd_jax.weights.sources import TensorSource

# Another library's sines differ in the last digits; another table differs by its amplitude, which is 1.
TOLERANCE = 1e-4


def check_buffers(network: Network, config: Any, source: TensorSource, where: str) -> dict[str, np.ndarray]:
    """Compares the buffers that a source holds with those of the config.

    Returns:
      The source's arrays that agree, but not in every bit in the source's dtype: who wants to write the same file again
      has to keep them.

    Raises:
      UserError: a buffer is of another shape or other values: weights and config do not belong together.
    """
    held, unlike = set(source.keys()), {}
    for key, make in network.buffers(config).items():
        if key not in held:
            continue
        theirs, ours = source.read(key), make()
        if theirs.shape != ours.shape:
            raise UserError(
                f"{where}: {key} is {list(theirs.shape)} and config.json makes it {list(ours.shape)}; "
                "give the config.json of these weights"
            )
        if np.array_equal(theirs, ours.astype(theirs.dtype)):
            continue
        error = float(np.abs(theirs.astype(np.float32) - ours).max())
        if not error <= max(TOLERANCE, float(jnp.finfo(theirs.dtype).eps)):
            raise UserError(
                f"{where}: {key} differs by {error:.2g} from what config.json makes it; "
                "give the config.json of these weights"
            )
        unlike[key] = theirs
    return unlike


def make_buffers(network: Network, config: Any) -> dict[str, np.ndarray]:
    """Every buffer of a config, float32."""
    return {key: make() for key, make in network.buffers(config).items()}
