"""onnxruntime's quantiser, set up for QNN, with ranges and weights that were found elsewhere."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters import qdq
from converters.shared_ranges import wider_than_clip
from converters.weight_rounding import Rounded, output_axis

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

    onnxruntime's quantiser would hold all weights as floats and as integers. It needs no more of a kernel than the
    largest number of every channel, and gets a kernel of that; the integers are made as they are written.

    Args:
      onnx_path: the float graph.
      output: the file to write, with external data beside it; working files are put there for a moment.
      ranges: value name -> smallest and largest number.
      excluded: nodes that stay in floating point.
      rounded: weights as integers, in place of rounding to nearest.
    """
    import onnx
    import onnx_ir as ir
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    with _quiet():
        # Shapes are taken from the whole kernels.
        model = onnx.shape_inference.infer_shapes(onnx.load(str(onnx_path), load_external_data=False))
        separate_constants(model, excluded)
        overrides = _weight_overrides(model, excluded, rounded)
        kernels = _kernels(model, excluded)
        for value in [value for value in model.graph.value_info if value.name in kernels]:
            model.graph.value_info.remove(value)
        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor, str(onnx_path.parent))
            kept = _largest(array) if tensor.name in kernels else array
            tensor.CopyFrom(onnx.numpy_helper.from_array(kept, tensor.name))
        keep_clips = bool(wider_than_clip(model, ranges))
        source, cache, small = (output.with_suffix(f".{end}") for end in ("float.onnx", "ranges.json", "small.onnx"))
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
            str(small),
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
    floats = ir.load(onnx_path).graph.initializers
    weights = {name: floats[name].const_value for name in kernels}
    for name in kernels & set(rounded):
        make = lambda name=name: ir.tensor(rounded[name].weight())
        weights[name] = ir.LazyTensor(make, ir.DataType.FLOAT, weights[name].shape)
    model = ir.load(small)
    qdq.set_weights(model, weights)
    ir.save(model, output, external_data=f"{output.name}.data", size_threshold_bytes=1024)
    for file in (source, small):
        for one in (file, file.with_name(f"{file.name}.data")):
            one.unlink(missing_ok=True)  # Without large weights there is no second one.


def _kernels(model: "onnx.ModelProto", excluded: list[str]) -> set[str]:
    """Constants that are the weight of quantised convolutions and matrix products, and nothing else."""
    kept, rank = set(excluded), {"Conv": 4, "MatMul": 2}
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    found, others = set(), {output.name for output in model.graph.output}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            kernel = i == 1 and node.name not in kept and name in ranks and ranks[name] == rank.get(node.op_type)
            (found if kernel else others).add(name)
    return found - others


def _largest(weight: np.ndarray) -> np.ndarray:
    """Largest absolute value of every output channel: [O, 1, 1, 1] of a kernel, [1, O] of a matrix."""
    axis = output_axis(weight)
    return np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis), keepdims=True)


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
