"""Rounding of weights layer by layer, each on what the rounded layers before it hand on (GPTAQ, arXiv:2504.02692).

`converters.rounding` looks at every layer as if the others were exact, so that errors add up from layer to layer. Here
a layer with the weights W sees x^ from rounded layers where the float graph has x, and is to give what it gives there:

    min over q   mean |W x - q x^|^2 / mean |x|^2                                                    (1)

With H = mean x^ x^^T and C = mean x x^^T, both over samples that are divided by their mean |x|^2, this is

    (V - q) H (V - q)^T + a number,   V = W (C + r) (H + r)^-1                                        (2)

so q is what `converters.rounding.round_rows` makes of V instead of W, and part of the error of the layers before is
undone. r is a small multiple of the identity, which keeps V at W where inputs do not vary. The division in equation 1
makes a dark picture count as much as a bright one, as it does in an SNR. Steps are searched: for every output channel,
of `SHARES` of the step that puts the largest weight on the largest level, the one at which equation 2 is smallest after
rounding. One large weight, such as the 1 of a kernel that passes a picture on, otherwise sets a step by which the sum
of the others is off.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from converters import onnx_check
from converters.rounding import channel_scales, compensation, round_rows
from converters.samples import Sample

# Steps to try, as shares of the one that puts the largest weight on the largest level.
SHARES = np.linspace(0.5, 1.1, 31)
# Share of H's mean diagonal that r is.
RIDGE = 1e-4


def asymmetric_rows(
    weight_ON: np.ndarray, own_NN: np.ndarray, cross_NN: np.ndarray, levels: int = 127
) -> tuple[np.ndarray, np.ndarray]:
    """Equation 2: rounded weights and the steps of their channels.

    Args:
      weight_ON: W, one row per output channel.
      own_NN: H.
      cross_NN: C, rows by x and columns by x^.
      levels: largest multiple of a step.

    Returns:
      (multiples int8 [O, N], steps float32 [O]).
    """
    ridge = max(RIDGE * float(np.mean(np.diag(own_NN))), 1e-12) * np.eye(len(own_NN))
    h = own_NN.astype(np.float64) + ridge
    target = np.linalg.solve(h, (weight_ON @ (cross_NN + ridge)).T).T
    made, largest = compensation(own_NN), channel_scales(target, levels)
    best_steps, best_scales = np.zeros(weight_ON.shape, np.int8), largest.copy()
    best = np.full(len(weight_ON), np.inf)
    for share in SHARES:
        scales = (share * largest).astype(np.float32)
        steps = round_rows(target, made, scales, levels)
        error = target - steps * scales[:, None].astype(np.float64)
        loss = np.einsum("on,on->o", error @ h, error)
        better = loss < best
        best[better], best_steps[better], best_scales[better] = loss[better], steps[better], scales[better]
    return best_steps, best_scales


def paired_values(
    onnx_path: Path,
    weights: Mapping[str, np.ndarray],
    names: list[str],
    samples: Callable[[], Iterable[Sample]],
) -> Iterator[Iterator[tuple[str, np.ndarray, np.ndarray]]]:
    """Sample by sample (name, value, value with other weights) of values inside the graph.

    Args:
      onnx_path: the float graph.
      weights: initializer -> what takes its place.
      names: of the values.
      samples: called for both graphs.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        model = onnx.load(str(onnx_path))
        for tensor in model.graph.initializer:
            if tensor.name in weights:
                tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
        path = Path(folder) / "rounded.onnx"
        onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
        del model
        floats = onnx_check.inner_values(onnx_path, names, samples())
        others = onnx_check.inner_values(path, names, samples())
        for one, other in zip(floats, others, strict=True):
            yield ((name, x, made) for (name, x), (_, made) in zip(one, other, strict=True))
