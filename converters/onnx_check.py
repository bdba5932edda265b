"""Running an exported graph in onnxruntime's CPU provider, in float32: outputs, agreement, ranges."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.numerics import FP16_MAX, snr_db
from converters.packages import need

Sample = Mapping[str, np.ndarray]


def run_on_cpu(onnx_path: Path, samples: list[Sample]) -> list[dict[str, np.ndarray]]:
    """{output name: array} per sample."""
    session = _cpu_session(str(onnx_path))
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(sample)), strict=True)) for sample in samples]


def _cpu_session(model: "str | bytes") -> Any:
    need("onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Otherwise a float weight between rounded activations is rounded too, to 8 bits, on its way into the session.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # A matrix is packed as it is used, out of the mapped file: packed at once, all of them are in memory a second time.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # An arena keeps what it has had, and doubles when it is full.
    options.enable_cpu_mem_arena = False
    # Otherwise weights that are stored as integers are all turned into floats at once.
    return ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )


def worst_snr_db(references: list[Sample], results: list[Sample]) -> dict[str, float]:
    """Output name -> smallest SNR over the samples; NaN if any sample of it has a value that is not finite."""
    return {
        name: float(np.min([snr_db(ref[name], got[name]) for ref, got in zip(references, results, strict=True)]))
        for name in references[0]
    }


def value_extremes(onnx_path: Path, samples: Iterable[Sample]) -> dict[str, tuple[float, float]]:
    """Smallest and largest number of every float32 value of the graph over the samples, inputs and outputs included.

    The graph computes them itself, so that no more values are alive than in a plain run. It is written next to the
    original for a moment, where it finds the external data.

    onnxruntime orders nodes by a depth-first search from the ends of the graph, of which it takes the last one first:
    with the ends listed from the last value to the first, each value is reduced as soon as it is there. In the other
    order all values of the graph would be alive at once.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(str(onnx_path), load_external_data=False))
    graph, float32 = model.graph, onnx.TensorProto.FLOAT
    values = (*graph.input, *graph.value_info, *graph.output)
    constants = {tensor.name for tensor in graph.initializer}
    names = [v.name for v in values if v.type.tensor_type.elem_type == float32 and v.name not in constants]
    made = {name: i for i, node in enumerate(graph.node) for name in node.output}
    names = sorted(dict.fromkeys(names), key=lambda name: made.get(name, -1))
    del graph.output[:]
    ends = {name: [(op, f"{op}:{name}") for op in ("ReduceMin", "ReduceMax")] for name in names}
    for name in reversed(names):
        graph.node.extend(onnx.helper.make_node(op, [name], [end], keepdims=0) for op, end in ends[name])
    for name in names:
        graph.output.extend(onnx.helper.make_tensor_value_info(end, float32, []) for _, end in ends[name])
    extremes = {name: (math.inf, -math.inf) for name in names}
    reduced = onnx_path.with_name(f".{onnx_path.stem}.extremes.onnx")
    try:
        onnx.save(model, str(reduced))
        session = _cpu_session(str(reduced))
        for sample in samples:
            found = iter(session.run(None, dict(sample)))
            for name, low, high in zip(names, found, found, strict=True):
                extremes[name] = (
                    float(np.minimum(extremes[name][0], low)),
                    float(np.maximum(extremes[name][1], high)),
                )
    finally:
        reduced.unlink(missing_ok=True)
    return extremes


def inner_values(
    onnx_path: Path, names: Sequence[str], samples: Iterable[Sample], at_once: int = 8
) -> Iterator[Iterator[tuple[str, np.ndarray]]]:
    """(name, array) of values inside the graph, sample by sample, computed `at_once` of them at a time."""
    import onnx

    model = onnx.load(str(onnx_path), load_external_data=False)
    opened = onnx_path.with_name(f".{onnx_path.stem}.opened.onnx")
    for name in set(names) - {output.name for output in model.graph.output}:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    try:
        onnx.save(model, str(opened))
        session = _cpu_session(str(opened))
        for sample in samples:
            parts = (names[i : i + at_once] for i in range(0, len(names), at_once))
            yield ((n, x) for part in parts for n, x in zip(part, session.run(part, dict(sample)), strict=True))
    finally:
        opened.unlink(missing_ok=True)


def value_ranges(onnx_path: Path, samples: Iterable[Sample]) -> dict[str, float]:
    """Largest absolute value of every float32 value of the graph over the samples, largest first."""
    extremes = value_extremes(onnx_path, samples)
    ranges = {name: float(np.max(np.abs(pair))) for name, pair in extremes.items()}
    return dict(sorted(ranges.items(), key=lambda item: -item[1]))


def beyond_fp16(ranges: Mapping[str, float]) -> list[str]:
    """Names of the values that FP16 cannot hold."""
    return [name for name, largest in ranges.items() if not largest <= FP16_MAX]


def json_number(value: float) -> float | None:
    """JSON has no NaN and no infinity: None for NaN, 999 dB and the like for infinity."""
    if math.isnan(value):
        return None
    return round(value, 3) if math.isfinite(value) else math.copysign(999.0, value)
