"""Weights of a graph's convolutions on their 8-bit grid, rounded with regard to what the convolutions see."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters import onnx_check
from converters.precision_plan import PrecisionPlan
from converters.rounding import channel_scales, patch_moments, round_with_compensation
from converters.samples import Sample

if TYPE_CHECKING:
    import onnx

# Patches that are looked at in one sample for one kernel, over all convolutions that use it.
PATCHES = 2048


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A kernel [O, I, rows, columns] of multiples of its channels' steps; float32 both."""

    kernel: np.ndarray
    scales: np.ndarray


def round_weights(
    onnx_path: Path, plan: PrecisionPlan, excluded: Iterable[str], samples: Iterable[Sample], seed: int
) -> dict[str, Rounded]:
    """Initializer -> rounded kernel, of every convolution; empty for a plan that rounds to nearest.

    Args:
      onnx_path: the float graph.
      plan: says how.
      excluded: nodes that stay in floating point.
      samples: inputs of the graph.
      seed: of the patches.
    """
    import onnx

    if plan.rounding == "nearest":
        return {}
    model = onnx.load(str(onnx_path))
    kernels = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    layers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.name not in set(excluded) and _is_plain(node):
            layers.setdefault(node.input[1], []).append(node)
    sums = _moments(onnx_path, layers, kernels, samples, np.random.default_rng(seed))
    rounded = {}
    for name in layers:
        rows = kernels[name].reshape(len(kernels[name]), -1)
        scales = channel_scales(rows)
        rounded[name] = Rounded(round_with_compensation(rows, sums[name], scales).reshape(kernels[name].shape), scales)
    return rounded


def _is_plain(node: "onnx.NodeProto") -> bool:
    """Strides and dilations of 1, one group: what `patch_moments` sees."""
    values = {a.name: list(a.ints) or [a.i] for a in node.attribute}
    return all(set(values.get(name, [1])) == {1} for name in ("strides", "dilations", "group"))


def _moments(
    onnx_path: Path,
    layers: "dict[str, list[onnx.NodeProto]]",
    kernels: dict[str, np.ndarray],
    samples: Iterable[Sample],
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Kernel -> mean x x^T over all convolutions that use it."""
    sums = {name: (0.0, 0) for name in layers}
    readers: dict[str, set[str]] = {}
    for name, nodes in layers.items():
        for node in nodes:
            readers.setdefault(node.input[0], set()).add(name)
    for values in onnx_check.inner_values(onnx_path, list(readers), samples):
        for value, picture in values:
            for name in readers[value]:
                size, limit = kernels[name].shape[2:], -(-PATCHES // len(layers[name]))
                total, count = patch_moments(picture, size, (size[0] // 2, size[1] // 2), limit, rng)
                sums[name] = (sums[name][0] + total, sums[name][1] + count)
    return {name: total / count for name, (total, count) in sums.items()}
