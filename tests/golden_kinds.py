"""How a golden case runs: a network behind its weights, or pure functions.

Both kinds offer `official`, `run(case, file)` -> every output that such a case may have, by its name, and
`numbers(case)` -> expected outputs that the JSON holds beside the tensors.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from nd_jax.weights.folder import load_params
from nd_jax.weights.networks import Network
from nd_jax.weights.safetensors_io import SafetensorsFile

Arrays = Mapping[str, np.ndarray]
Outputs = dict[str, jax.Array | np.ndarray]


def tensors(file: SafetensorsFile, prefix: str) -> dict[str, np.ndarray]:
    """Tensors whose name starts with `prefix`, without it."""
    return {key.removeprefix(prefix): file.read(key) for key in file.keys() if key.startswith(prefix)}


@dataclasses.dataclass(frozen=True)
class Kind:
    """How cases of one network run.

    Attributes:
      official: the JSON's `official`, up to its argument list.
      network: reads config and weights.
      outputs: (our config, parameters, inputs) -> outputs.
    """

    official: str
    network: Network
    outputs: Callable[[Any, dict, Arrays], Outputs]

    def run(self, case: dict, file: SafetensorsFile) -> Outputs:
        config = self.network.read_config(case["config"])
        params = load_params(self.network, config, WeightsOf(file), str(file.path))
        return self.outputs(config, params, tensors(file, "in."))

    def numbers(self, case: dict) -> Arrays:
        return {}


@dataclasses.dataclass(frozen=True)
class FunctionKind:
    """How cases of pure functions, without weights, run.

    Attributes:
      official: the JSON's `official`, up to its argument list.
      outputs: (the whole JSON, inputs) -> outputs.
      expected_numbers: the JSON -> expected outputs in it. They are stated in full, so they must agree in float64.
    """

    official: str
    outputs: Callable[[dict, Arrays], Outputs]
    expected_numbers: Callable[[dict], Arrays] = lambda case: {}

    def run(self, case: dict, file: SafetensorsFile) -> Outputs:
        return self.outputs(case, tensors(file, "in."))

    def numbers(self, case: dict) -> Arrays:
        return self.expected_numbers(case)


class WeightsOf:
    """The `w.` tensors of a case as a `TensorSource`."""

    def __init__(self, file: SafetensorsFile):
        self._file = file

    def keys(self) -> list[str]:
        return [key.removeprefix("w.") for key in self._file.keys() if key.startswith("w.")]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._file.shape(f"w.{key}")

    def dtype(self, key: str) -> np.dtype:
        return self._file.dtype(f"w.{key}")

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._file.read(f"w.{key}", start, stop)

    def close(self) -> None:
        self._file.close()
