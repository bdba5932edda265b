"""onnxruntime's quantiser, set up for QNN, with ranges and weights that were found elsewhere."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from converters.weight_rounding import Rounded


def write_qdq(
    onnx_path: Path,
    output: Path,
    ranges: Mapping[str, tuple[float, float]],
    excluded: list[str],
    rounded: Mapping[str, Rounded],
) -> None:
    """Float32 graph -> graph with QuantizeLinear and DequantizeLinear: uint16 activations, int8 weights per channel.

    Args:
      onnx_path: the float graph.
      output: the file to write, with external data beside it; working files are put there for a moment.
      ranges: value name -> smallest and largest number.
      excluded: nodes that stay in floating point.
      rounded: kernels and their steps, in place of rounding to nearest.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    overrides = {
        name: [
            {"axis": 0, "quant_type": QuantType.QInt8, "scale": scale, "zero_point": np.int8(0)} for scale in r.scales
        ]
        for name, r in rounded.items()
    }
    with _quiet():
        model = onnx.load(str(onnx_path))
        for tensor in model.graph.initializer:
            if tensor.name in rounded:
                tensor.CopyFrom(onnx.numpy_helper.from_array(rounded[tensor.name].kernel, tensor.name))
        source, cache = output.with_suffix(".float.onnx"), output.with_suffix(".ranges.json")
        onnx.save(model, str(source), save_as_external_data=True, location=f"{source.name}.data")
        del model
        pairs = {name: (np.array(low, np.float32), np.array(high, np.float32)) for name, (low, high) in ranges.items()}
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, pairs), cache)
        config = get_qnn_qdq_config(
            str(source),
            None,
            activation_type=QuantType.QUInt16,
            weight_type=QuantType.QInt8,
            per_channel=True,
            init_overrides=overrides,
            nodes_to_exclude=excluded,
        )
        quantize_static(
            str(source),
            str(output),
            None,
            op_types_to_quantize=config.op_types_to_quantize,
            per_channel=config.per_channel,
            activation_type=config.activation_type,
            weight_type=config.weight_type,
            nodes_to_exclude=config.nodes_to_exclude,
            use_external_data_format=config.use_external_data_format,
            # Otherwise what only moves a graph input, such as a Transpose, would move it in float32.
            extra_options={**config.extra_options, "ForceQuantizeNoInputCheck": True},
            calibration_cache_path=cache,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime advises a preprocessing step, which the export has made."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
