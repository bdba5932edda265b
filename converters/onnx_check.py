"""Running an exported graph in onnxruntime's CPU provider, in float32: outputs, agreement, ranges."""

import math
from collections.abc import Mapping
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
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def worst_snr_db(references: list[Sample], results: list[Sample]) -> dict[str, float]:
    """Output name -> smallest SNR over the samples; NaN if any sample of it has a value that is not finite."""
    return {
        name: float(np.min([snr_db(ref[name], got[name]) for ref, got in zip(references, results, strict=True)]))
        for name in references[0]
    }


def value_ranges(onnx_path: Path, samples: list[Sample]) -> dict[str, float]:
    """Largest absolute value of every float32 value inside the graph over the samples, largest first.

    Written next to the graph for a moment, so that it finds the external data.
    """
    import onnx

    model = onnx.load(str(onnx_path), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model)
    outputs = {output.name for output in model.graph.output}
    floats = [v for v in inferred.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    model.graph.output.extend(value for value in floats if value.name not in outputs)
    exposed = onnx_path.with_name(f".{onnx_path.stem}.ranges.onnx")
    try:
        onnx.save(model, str(exposed))
        results = run_on_cpu(exposed, samples)
    finally:
        exposed.unlink(missing_ok=True)
    ranges = {name: max(float(np.max(np.abs(result[name]))) for result in results) for name in results[0]}
    return dict(sorted(ranges.items(), key=lambda item: -item[1]))


def beyond_fp16(ranges: Mapping[str, float]) -> list[str]:
    """Names of the values that FP16 cannot hold."""
    return [name for name, largest in ranges.items() if not largest <= FP16_MAX]


def json_number(value: float) -> float | None:
    """JSON has no NaN and no infinity: None for NaN, 999 dB and the like for infinity."""
    if math.isnan(value):
        return None
    return round(value, 3) if math.isfinite(value) else math.copysign(999.0, value)
