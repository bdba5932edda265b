"""Quantised graphs: their integer inputs and outputs, and the two halves of their error.

A value x of encoding (scale, zero_point) is stored as

    q = clip(round(x / scale) + zero_point, 0, 65535),     x ~ (q - zero_point) scale                (1)
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from converters.samples import Sample

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# Key of the model's metadata under which the encodings of its inputs and outputs stand, as JSON.
ENCODINGS = "nd_jax.encodings"
# The same for the states: {output: the input that takes it at the next call}.
CARRIED = "nd_jax.carried"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Equation 1 for one input or output; `dtype` is a numpy name."""

    scale: float
    zero_point: int
    dtype: str

    def quantize(self, x: np.ndarray) -> np.ndarray:
        limits = np.iinfo(self.dtype)
        q = np.round(x.astype(np.float64) / self.scale) + self.zero_point
        return np.clip(q, limits.min, limits.max).astype(self.dtype)

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        return ((q.astype(np.float64) - self.zero_point) * self.scale).astype(np.float32)


def is_quantised(model: "onnx.ModelProto") -> bool:
    return any(node.op_type == "DequantizeLinear" for node in model.graph.node)


def encodings(model: "onnx.ModelProto") -> dict[str, Encoding]:
    """Input or output name -> encoding, of those that are integers on behalf of float32; see `integer_ends`."""
    return {name: Encoding(**values) for name, values in _metadata(model, ENCODINGS).items()}


def carried_states(model: "onnx.ModelProto") -> dict[str, str]:
    """Output -> the input that takes it at the next call; see `set_carried`."""
    return _metadata(model, CARRIED)


def _metadata(model: "onnx.ModelProto", key: str) -> dict:
    return json.loads(next((entry.value for entry in model.metadata_props if entry.key == key), "{}"))


def to_integers(sample: Sample, encoded: Mapping[str, Encoding]) -> Sample:
    """float32 -> the graph's integers, where it has some."""
    return {name: encoded[name].quantize(x) if name in encoded else x for name, x in sample.items()}


def to_floats(sample: Sample, encoded: Mapping[str, Encoding]) -> Sample:
    """The graph's integers -> float32."""
    return {name: encoded[name].dequantize(x) if name in encoded else x for name, x in sample.items()}


# --- edits of `onnx_ir` models ----------------------------------------------------------------------------------------


def set_carried(model: "ir.Model", carried: Mapping[str, str]) -> None:
    """Notes the carried states in the model's metadata."""
    model.metadata_props[CARRIED] = json.dumps(dict(carried))


def integer_ends(model: "ir.Model", ranges: Mapping[str, tuple[float, float]]) -> dict[str, Encoding]:
    """Removes the QuantizeLinear behind inputs and the DequantizeLinear in front of outputs, which keep their names.

    Half of the bytes cross the border of the graph, and states that are carried from call to call are not rounded
    again. An input that only floating point reads, such as a mask, gets a DequantizeLinear. The encodings go into the
    model's metadata.

    Args:
      model: edited.
      ranges: value name -> smallest and largest number, of the inputs that no QuantizeLinear reads.
    """
    import onnx_ir as ir
    import onnx_ir.convenience as convenience

    found = {}
    for value in model.graph.inputs:
        readers = [use.node for use in value.uses()]
        if not any(node.op_type == "QuantizeLinear" for node in readers):
            if readers and value.dtype == ir.DataType.FLOAT and value.name in ranges:
                found[value.name] = _dequantized_input(model, value, *ranges[value.name])
            continue
        if any(node.op_type != "QuantizeLinear" for node in readers):
            continue
        for node in readers:
            found[value.name] = _encoding(node)
            quantised = node.outputs[0]
            convenience.replace_all_uses_with(quantised, value)
            value.type = quantised.type or _tensor_type(found[value.name].dtype)
            model.graph.remove(node, safe=True)
    for i, value in enumerate(model.graph.outputs):
        node = value.producer()
        if node is None or node.op_type != "DequantizeLinear" or node.inputs[0].is_initializer():
            continue
        found[value.name] = _encoding(node)
        quantised, name = node.inputs[0], value.name
        model.graph.outputs[i] = quantised
        if value.uses():
            value.name = f"{name}/float32"
        else:
            model.graph.remove(node, safe=True)
        shape = value.shape
        quantised.name, quantised.shape = name, shape
        quantised.type = _tensor_type(found[name].dtype)
    model.metadata_props[ENCODINGS] = json.dumps({name: dataclasses.asdict(e) for name, e in found.items()})
    return found


def _dequantized_input(model: "ir.Model", value: "ir.Value", low: float, high: float) -> Encoding:
    """Makes a float32 input uint16, with a DequantizeLinear in front of its readers."""
    import onnx_ir as ir
    import onnx_ir.convenience as convenience

    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max(high - low, np.finfo(np.float16).tiny) / np.iinfo(np.uint16).max)
    encoding = Encoding(float(scale), round(-low / float(scale)), "uint16")
    constants = []
    for kind, number in (("scale", scale), ("zero_point", np.uint16(encoding.zero_point))):
        constants.append(ir.val(f"{value.name}/{kind}", const_value=ir.tensor(np.array(number))))
        model.graph.register_initializer(constants[-1])
    node = ir.node("DequantizeLinear", [value, *constants], name=f"DequantizeLinear:{value.name}")
    floats = node.outputs[0]
    floats.name, floats.type, floats.shape = f"{value.name}/float32", value.type, value.shape
    convenience.replace_all_uses_with(value, floats)
    node.replace_input_with(0, value)
    value.type = _tensor_type(encoding.dtype)
    model.graph.insert_before(model.graph[0], node)
    return encoding


def _encoding(node: "ir.Node") -> Encoding:
    scale, zero_point = (value.const_value.numpy() for value in node.inputs[1:3])
    return Encoding(float(scale.reshape(())), int(zero_point.reshape(())), zero_point.dtype.name)


def _tensor_type(dtype: str) -> "ir.TensorType":
    import onnx_ir as ir

    return ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))


def rounded_weights(model: "ir.Model") -> "dict[str, ir.LazyTensor]":
    """Float weights, by their names in the float graph, that the quantised graph's integers stand for.

    They are computed when they are read, so that not all of them are in memory.
    """
    import onnx_ir as ir

    found = {}
    for node in model.graph:
        if _holds_weight(node):
            integers = node.inputs[0].const_value
            found[_weight_name(node)] = ir.LazyTensor(
                functools.partial(_dequantized_constant, node), ir.DataType.FLOAT, integers.shape
            )
    return found


def _dequantized_constant(node: "ir.Node") -> "ir.Tensor":
    import onnx_ir as ir

    q, scale, zero_point = (value.const_value.numpy() for value in node.inputs)
    zero_point = _along(node, zero_point.astype(np.float32), q.shape)
    return ir.tensor((q.astype(np.float32) - zero_point) * _along(node, scale, q.shape))


def _holds_weight(node: "ir.Node") -> bool:
    """Whether a node is the DequantizeLinear of an 8-bit constant; biases have 32 bits, whose error is nothing."""
    constant = node.inputs[0].const_value if node.op_type == "DequantizeLinear" else None
    return constant is not None and constant.dtype.numpy().itemsize == 1


def _weight_name(node: "ir.Node") -> str:
    """onnxruntime's quantiser stores weight W as W_quantized."""
    return node.inputs[0].name.removesuffix("_quantized")


def set_weights(model: "ir.Model", weights: "Mapping[str, ir.TensorProtocol]") -> None:
    """Gives a quantised graph the integers of float weights, rounded to the steps that it has for them.

    They are computed when they are read, so that not all of them are in memory.

    Args:
      model: edited.
      weights: name in the float graph -> weight.
    """
    import onnx_ir as ir

    for node in model.graph:
        if not (_holds_weight(node) and _weight_name(node) in weights):
            continue
        stored, weight = node.inputs[0], weights[_weight_name(node)]
        steps = functools.partial(_steps, node, weight)
        stored.const_value = ir.LazyTensor(steps, stored.dtype, weight.shape, name=stored.name)
        stored.shape = weight.shape


def _steps(node: "ir.Node", weight: "ir.TensorProtocol") -> "ir.Tensor":
    import onnx_ir as ir

    scale, zero_point = (value.const_value.numpy() for value in node.inputs[1:])
    limits, scale = np.iinfo(zero_point.dtype), _along(node, scale, weight.shape)
    steps = np.round(weight.numpy() / scale) + _along(node, zero_point, weight.shape)
    return ir.tensor(np.clip(steps, limits.min, limits.max).astype(zero_point.dtype))


def _along(node: "ir.Node", numbers: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """One number per channel, or one for all, to be broadcast over a weight."""
    axis = node.attributes.get_int("axis", 1)
    return numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))] if numbers.ndim else [])


def with_float_weights(model: "ir.Model", weights: "Mapping[str, ir.TensorProtocol]") -> None:
    """Puts the weights of the float graph back, so that only activations are rounded."""
    import onnx_ir as ir
    import onnx_ir.convenience as convenience

    for node in list(model.graph):
        if not _holds_weight(node):
            continue
        name = _weight_name(node)
        restored = ir.val(f"{name}/float32", const_value=weights[name])
        model.graph.register_initializer(restored)
        convenience.replace_all_uses_with(node.outputs[0], restored)
        model.graph.remove(node, safe=True)
