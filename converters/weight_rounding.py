"""Weights of a graph's convolutions and matrix products on their 8-bit grid, rounded with regard to what they see."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters import onnx_check
from converters.adaround import learn_rounding
from converters.precision_plan import PrecisionPlan
from converters.rounding import channel_scales, compensation, patch_moments, round_rows, row_moments
from converters.samples import Sample
from converters.sequential_rounding import asymmetric_rows, paired_values

if TYPE_CHECKING:
    import onnx

# Patches that are looked at in one sample for one kernel, over all convolutions that use it.
PATCHES = 2048
# Of moments that are summed up in one pass over the samples.
MOMENT_BYTES = 1_000_000_000
# Weights with more inputs (a 3 x 3 convolution of 1280 channels has 11,520) are rounded to nearest: some five float64
# matrices of that many rows and columns are in memory at a time.
MAX_WIDTH = 8192


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A weight as integer multiples of its channels' steps.

    Attributes:
      steps: int8, of the weight's shape.
      scales: float32, one per output channel.
      axis: of the output channels: 0 of a convolution's kernel, 1 of the weight of a matrix product.
    """

    steps: np.ndarray
    scales: np.ndarray
    axis: int

    def weight(self) -> np.ndarray:
        """What the integers stand for, float32."""
        shape = [-1 if i == self.axis else 1 for i in range(self.steps.ndim)]
        return self.steps * self.scales.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Window:
    """Where a layer looks: a value, and of a picture the size, strides and pads of the patches; rows without a size."""

    value: str
    size: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Work:
    """Weights to round.

    Attributes:
      onnx_path: the float graph.
      groups: where a layer looks -> the weights that look there.
      weights: initializer -> value.
      widths: where a layer looks -> numbers that a row of its weight multiplies; of those that are rounded.
      samples: called for every pass over the inputs of the graph.
      rng: of the patches.
    """

    onnx_path: Path
    groups: Mapping[tuple[Window, ...], list[str]]
    weights: Mapping[str, np.ndarray]
    widths: Mapping[tuple[Window, ...], int]
    samples: Callable[[], Iterable[Sample]]
    rng: np.random.Generator


def round_weights(
    onnx_path: Path, plan: PrecisionPlan, excluded: Iterable[str], samples: Callable[[], Iterable[Sample]], seed: int
) -> dict[str, Rounded]:
    """Initializer -> rounded weight; empty for a plan that rounds to nearest.

    Weights that are seen with fewer inputs than they have rows, such as those that only read the conditioning, are left
    out and rounded to nearest: the samples say nothing about the rest. So are those with more than `MAX_WIDTH`, or half
    of it where layers are rounded in order.

    Args:
      onnx_path: the float graph.
      plan: says how.
      excluded: nodes that stay in floating point.
      samples: called for every pass over the inputs of the graph; as many as `MOMENT_BYTES` asks for.
      seed: of the patches.
    """
    import onnx
    import onnx_ir as ir

    if plan.rounding == "nearest":
        return {}
    layers = weight_windows(onnx.load(str(onnx_path), load_external_data=False), excluded)
    tensors = ir.load(onnx_path).graph.initializers
    groups: dict[tuple[Window, ...], list[str]] = {}
    for name, windows in layers.items():
        groups.setdefault(windows, []).append(name)
    weights = {name: tensors[name].const_value.numpy() for name in layers}
    widths = {windows: _rows(weights[names[0]]).shape[1] for windows, names in groups.items()}
    # Moments of pairs have twice the sides.
    limit = MAX_WIDTH // 2 if plan.rounding == "sequential" else MAX_WIDTH
    widths = {windows: width for windows, width in widths.items() if width <= limit}
    work = _Work(onnx_path, groups, weights, widths, samples, np.random.default_rng(seed))
    if plan.rounding == "sequential":
        return _round_in_order(work)
    return _round_apart(work, compensate=plan.rounding == "compensated")


def _round_apart(work: _Work, compensate: bool) -> dict[str, Rounded]:
    """Every layer on the inputs that it has in the float graph: `compensation`, or `learn_rounding`."""
    rounded = {}
    for batch in batches(work.widths):
        sums = _moments(work.onnx_path, batch, work.widths, work.samples(), work.rng)
        for windows in batch:
            total, count = sums.pop(windows)
            if count < work.widths[windows]:
                continue
            total /= count
            made = compensation(total) if compensate else None
            for name in work.groups[windows]:
                rows = _rows(work.weights[name])
                scales = channel_scales(rows)
                steps = learn_rounding(rows, total, scales) if made is None else round_rows(rows, made, scales)
                rounded[name] = _rounded(work.weights[name], steps, scales)
    return rounded


def _round_in_order(work: _Work) -> dict[str, Rounded]:
    """Every layer on the inputs that it has behind the layers that are rounded (`converters.sequential_rounding`)."""
    rounded: dict[str, Rounded] = {}
    for windows, width in work.widths.items():
        made = {name: weight.weight() for name, weight in rounded.items()}
        moments, count = _paired_moments(work, made, windows, width)
        if count < width:
            continue
        own, cross = moments[width:, width:], moments[:width, width:]
        for name in work.groups[windows]:
            rounded[name] = _rounded(work.weights[name], *asymmetric_rows(_rows(work.weights[name]), own, cross))
    return rounded


def _rounded(weight: np.ndarray, steps_ON: np.ndarray, scales_O: np.ndarray) -> Rounded:
    """Multiples of one row per output channel, in the weight's shape."""
    axis = output_axis(weight)
    shape = weight.shape if axis == 0 else weight.shape[::-1]
    steps = np.ascontiguousarray(np.moveaxis(steps_ON.reshape(shape), 0, axis))
    return Rounded(steps, scales_O, axis)


def output_axis(weight: np.ndarray) -> int:
    """Of [O, I, rows, columns] or [I, O]."""
    return 0 if weight.ndim == 4 else 1


def _rows(weight: np.ndarray) -> np.ndarray:
    """One row per output channel."""
    return weight.reshape(len(weight), -1) if output_axis(weight) == 0 else weight.T


def weight_windows(model: "onnx.ModelProto", excluded: Iterable[str]) -> dict[str, tuple[Window, ...]]:
    """Weight of every plain convolution and matrix product that is not excluded -> where it looks, in all its uses."""
    excluded = set(excluded)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found: dict[str, set[Window]] = {}
    for node in model.graph.node:
        if node.name in excluded or len(node.input) < 2 or node.input[1] not in shapes:
            continue
        shape = shapes[node.input[1]]
        if node.op_type == "Conv" and _is_plain(node):
            attributes = {a.name: tuple(a.ints) for a in node.attribute}
            strides, pads = attributes.get("strides", (1, 1)), attributes.get("pads", (0,) * 4)
            window = Window(node.input[0], shape[2:], strides, pads)
        elif node.op_type == "MatMul" and len(shape) == 2:
            window = Window(node.input[0])
        else:
            continue
        found.setdefault(node.input[1], set()).add(window)
    return {name: tuple(sorted(windows, key=lambda w: w.value)) for name, windows in found.items()}


def _is_plain(node: "onnx.NodeProto") -> bool:
    """Two dimensions, dilations of 1, one group and explicit pads: what `patch_moments` sees."""
    values = {a.name: list(a.ints) or [a.i] for a in node.attribute if a.name != "auto_pad"}
    pads = values.get("pads", [0] * 4)
    automatic = any(a.name == "auto_pad" and a.s != b"NOTSET" for a in node.attribute)
    one = all(set(values.get(name, [1])) == {1} for name in ("dilations", "group"))
    return one and len(pads) == 4 and not automatic


def batches(widths: Mapping[tuple[Window, ...], int]) -> Iterator[list[tuple[Window, ...]]]:
    """The groups, as many at a time as `MOMENT_BYTES` allows; one at least."""
    batch, used = [], 0
    for windows, width in widths.items():
        if batch and used + 8 * width**2 > MOMENT_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(windows)
        used += 8 * width**2
    if batch:
        yield batch


def _moments(
    onnx_path: Path,
    batch: list[tuple[Window, ...]],
    widths: Mapping[tuple[Window, ...], int],
    samples: Iterable[Sample],
    rng: np.random.Generator,
) -> dict[tuple[Window, ...], tuple[np.ndarray, int]]:
    """Group of windows -> (sum of x x^T, number of x) over all its windows and samples."""
    sums = {windows: (np.zeros((widths[windows],) * 2), 0) for windows in batch}
    readers: dict[str, list[tuple[tuple[Window, ...], Window]]] = {}
    for windows in batch:
        for window in windows:
            readers.setdefault(window.value, []).append((windows, window))
    for values in onnx_check.inner_values(onnx_path, list(readers), samples):
        for value, x in values:
            for windows, window in readers[value]:
                limit = -(-PATCHES // len(windows))
                total, count = _window_moments(window, x, limit, rng)
                sums[windows][0][...] += total
                sums[windows] = sums[windows][0], sums[windows][1] + count
    return sums


def _window_moments(window: Window, x: np.ndarray, limit: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    if not window.size:
        return row_moments(x)
    return patch_moments(x, window.size, window.strides, window.pads, limit, rng)


def _paired_moments(
    work: _Work, rounded: Mapping[str, np.ndarray], windows: tuple[Window, ...], width: int
) -> tuple[np.ndarray, int]:
    """Mean z z^T of z = (x, x^) over samples divided by their mean x^2, and the number of z; see `paired_values`."""
    total, count, limit = np.zeros((2 * width,) * 2), 0, -(-PATCHES // len(windows))
    names = list(dict.fromkeys(window.value for window in windows))
    for values in paired_values(work.onnx_path, rounded, names, work.samples):
        for name, x, made in values:
            for window in (window for window in windows if window.value == name):
                both = np.concatenate([x, made], axis=1 if window.size else -1)
                moments, number = _window_moments(window, both, limit, work.rng)
                total += moments / max(float(np.mean(np.square(x))), 1e-12)
                count += number
    return total / max(count, 1), count
