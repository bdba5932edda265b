"""onnxruntime's quantiser, set up for QNN, with ranges and weights that were found elsewhere."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.shared_ranges import wider_than_clip
from converters.weight_rounding import Rounded

if TYPE_CHECKING:
    import onnx


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
      rounded: weights as integers, in place of rounding to nearest.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    with _quiet():
        model = onnx.load(str(onnx_path))
        for tensor in model.graph.initializer:
            if tensor.name in rounded:
                tensor.CopyFrom(onnx.numpy_helper.from_array(rounded[tensor.name].weight(), tensor.name))
        separate_constants(model, excluded)
        overrides = _weight_overrides(model, excluded, rounded)
        keep_clips = bool(wider_than_clip(model, ranges))
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
            keep_removable_activations=keep_clips,
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
        for file in (source, source.with_name(f"{source.name}.data")):
            file.unlink(missing_ok=True)  # Without large weights there is no second one.


def _weight_overrides(
    model: "onnx.ModelProto", excluded: list[str], rounded: Mapping[str, Rounded]
) -> dict[str, list[dict[str, Any]]]:
    """What the quantiser would not do by itself: for every weight its axis, or its steps where they are known.

    A matrix product would get one step for all output channels, and the weight of a LayerNormalization signed
    integers, which the HTP does not take.
    """
    from onnxruntime.quantization import QuantType

    constants, kept = {tensor.name for tensor in model.graph.initializer}, set(excluded)
    found: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        weight = node.input[1] if len(node.input) > 1 else ""
        if node.name in kept or weight not in constants:
            continue
        if weight in rounded:
            one = {"axis": rounded[weight].axis, "quant_type": QuantType.QInt8, "zero_point": np.int8(0)}
            found[weight] = [{**one, "scale": scale} for scale in rounded[weight].scales]
        elif node.op_type == "MatMul":
            found[weight] = [{"axis": 1, "quant_type": QuantType.QInt8, "symmetric": True}]
        elif node.op_type == "LayerNormalization":
            found[weight] = [{"quant_type": QuantType.QUInt8, "symmetric": False}]
    return found


def separate_constants(model: "onnx.ModelProto", excluded: list[str]) -> None:
    """Gives the nodes that stay in floating point float32 constants of their own.

    Otherwise they would read integers on behalf of nodes that share a constant with them, which the HTP does not take.
    """
    import onnx

    kept = set(excluded)
    shared = {name for node in model.graph.node if node.name not in kept for name in node.input}
    constants = {t.name: t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    copies: dict[str, onnx.TensorProto] = {}
    for node in model.graph.node:
        if node.name not in kept:
            continue
        for i, name in enumerate(node.input):
            if name in constants and name in shared:
                if name not in copies:
                    copies[name] = onnx.TensorProto()
                    copies[name].CopyFrom(constants[name])
                    copies[name].name = f"{name}/float"
                node.input[i] = copies[name].name
    model.graph.initializer.extend(copies.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime advises a preprocessing step, which the export has made."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
