"""Rewrites that restore native norms with a mean, layer norms and group norms.

    LayerNormalization(x) = (x - mean) / sqrt(var + eps) * scale + bias,   moments over the last axis

Decomposed, squares saturate in FP16 from 256 on, and 1 / sqrt is a power that has 5 dB on the HTP. All pieces are
elementwise or sums, so nothing else in a graph looks like this.

A group norm is such a norm of [B, G, rest of the group] between two Reshapes, with a scale and a bias of the channels
behind them. The HTP has no GroupNormalization. Of pictures that leave room for a second one in its memory (VTCM) it
moves the fewest bytes, and runs up to two fifths fewer operations in a network, as

    Reshape, LayerNormalization, Reshape, BatchNormalization      (BatchNormalization(x) = x * scale + bias here)

and of larger ones, whose LayerNormalization would move the picture several times, as

    Reshape, InstanceNormalization, Reshape, Mul, Add.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from converters.onnx_edit import channel_weight, replace_value
from converters.scalar_cones import scalar_constant

if TYPE_CHECKING:
    import onnx_ir as ir

# Numbers of a picture: 3.5 MB in FP16, of the 8 MB of VTCM. In networks 3.1 MB pays and 4 MB does not: docs/routes.md.
SMALL_PICTURE = 7 * 2**18


def restore_layer_norm(model: "ir.Model") -> int:
    """(x - mean) * 1 / sqrt(mean((x - mean)^2) + eps) -> LayerNormalization with a scale of ones."""
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        found = _standardised(node)
        if found is not None:
            x, epsilon = found
            scale = _filled(model, 1.0, x.shape[-1])
            norm = ir.node("LayerNormalization", [x, scale], attributes={"axis": -1, "epsilon": epsilon})
            replace_value(model, node.outputs[0], norm)
            count += 1
    return count


def scale_into_layer_norm(model: "ir.Model") -> int:
    """LayerNormalization with a scale of ones * scale + bias -> LayerNormalization with both, of one per channel."""
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        if node.op_type != "LayerNormalization" or len(node.inputs) > 2 or not _is_filled(node.inputs[1], 1.0):
            continue
        scaled, scale = _only_reader(node.outputs[0], "Mul")
        shifted, bias = _only_reader(scaled.outputs[0], "Add") if scaled is not None else (None, None)
        width = node.inputs[0].shape[-1:]
        if shifted is None or any(v.const_value is None or v.shape != width for v in (scale, bias)):
            continue
        norm = ir.node("LayerNormalization", [node.inputs[0], scale, bias], attributes=dict(node.attributes))
        replace_value(model, shifted.outputs[0], norm)
        count += 1
    return count


def restore_instance_norm(model: "ir.Model") -> int:
    """The LayerNormalization of a group norm -> InstanceNormalization, of pictures above `SMALL_PICTURE`.

    Rows of rank 3 are what the HTP tiles well in a whole network: docs/routes.md.
    """
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        if not _is_group_norm(node) or np.prod(node.inputs[0].shape.numpy()) <= SMALL_PICTURE:
            continue
        groups = node.inputs[0].shape[1]
        ends = [_filled(model, value, groups) for value in (1.0, 0.0)]
        attributes = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
        norm = ir.node("InstanceNormalization", [node.inputs[0], *ends], attributes=attributes)
        replace_value(model, node.outputs[0], norm)
        count += 1
    return count


def scale_into_batch_norm(model: "ir.Model") -> int:
    """Scale and bias of the channels behind the LayerNormalization of a group norm -> BatchNormalization.

    The HTP computes Mul and Add with the channels before the rows, where eight of them fill a tile of 2 kB, and
    BatchNormalization with the channels last. Its mean is 0 and its variance 1.
    """
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        if not _is_group_norm(node):
            continue
        back = next(use.node for use in node.outputs[0].uses())
        scaled, scale = _only_reader(back.outputs[0], "Mul")
        shifted, bias = _only_reader(scaled.outputs[0], "Add") if scaled is not None else (None, None)
        weights = [] if shifted is None else [channel_weight(value) for value in (scale, bias)]
        if not weights or any(weight is None or weight.shape[0] != back.outputs[0].shape[1] for weight in weights):
            continue
        moments = [_filled(model, value, weights[0].shape[0]) for value in (0.0, 1.0)]
        norm = ir.node("BatchNormalization", [back.outputs[0], *weights, *moments], attributes={"epsilon": 0.0})
        replace_value(model, shifted.outputs[0], norm)
        count += 1
    return count


# --- patterns ---------------------------------------------------------------------------------------------------------


def _is_group_norm(node: "ir.Node") -> bool:
    """Whether it is a LayerNormalization of [B, G, rest of the group] with a scale of ones between two Reshapes."""
    if node.op_type != "LayerNormalization" or len(node.inputs) > 2 or len(node.inputs[0].shape or ()) != 3:
        return False
    before, readers = node.inputs[0].producer(), [use.node for use in node.outputs[0].uses()]
    between = before is not None and [n.op_type for n in (before, *readers)] == ["Reshape", "Reshape"]
    return between and _is_filled(node.inputs[1], 1.0)


def _standardised(node: "ir.Node") -> "tuple[ir.Value, float] | None":
    """(x, eps) if the node is the product that ends (x - mean) / sqrt(var + eps) over the last axis of x."""
    if node.op_type != "Mul":
        return None
    for centred, inverse in _both_orders(node):
        sub = _made_by(centred, "Sub")
        if sub is None or _averaged(sub.inputs[1]) is not sub.inputs[0] or sub.inputs[0].shape is None:
            continue
        root = _made_by(_made_by_input(inverse, "Reciprocal"), "Sqrt")
        add = None if root is None else _made_by(_without_reshape(root.inputs[0]), "Add")
        for variance, epsilon in () if add is None else _both_orders(add):
            square = _made_by(_averaged(variance), "Mul")
            if square is not None and all(value is centred for value in square.inputs):
                constant = scalar_constant(epsilon)
                if constant is not None:
                    return sub.inputs[0], float(constant)
    return None


def _averaged(value: "ir.Value | None") -> "ir.Value | None":
    """x if the value is sum(x) * 1 / n over its last axis, also with that axis kept."""
    product = _made_by(_without_reshape(value), "Mul")
    for total, share in () if product is None else _both_orders(product):
        add_up, part = _made_by(_without_reshape(total), "ReduceSum"), scalar_constant(share)
        if add_up is None or part is None or add_up.inputs[0].shape is None:
            continue
        x, axes = add_up.inputs[0], scalar_constant(add_up.inputs[1])
        last = axes is not None and int(axes) in (-1, len(x.shape) - 1)
        if last and abs(float(part) * x.shape[-1] - 1) < 1e-6:
            return x
    return None


def _made_by(value: "ir.Value | None", op_type: str) -> "ir.Node | None":
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _made_by_input(value: "ir.Value", op_type: str) -> "ir.Value | None":
    node = _made_by(value, op_type)
    return None if node is None else node.inputs[0]


def _without_reshape(value: "ir.Value | None") -> "ir.Value | None":
    reshape = _made_by(value, "Reshape")
    return value if reshape is None else reshape.inputs[0]


def _both_orders(node: "ir.Node") -> Iterator[tuple["ir.Value", "ir.Value"]]:
    yield node.inputs[0], node.inputs[1]
    yield node.inputs[1], node.inputs[0]


def _only_reader(value: "ir.Value", op_type: str) -> "tuple[ir.Node, ir.Value] | tuple[None, None]":
    """(reader, its other operand) if a single node of the type reads the value."""
    readers = [use.node for use in value.uses()]
    if len(readers) != 1 or readers[0].op_type != op_type or value.is_graph_output():
        return None, None
    return readers[0], next((v for v in readers[0].inputs if v is not value), value)


# --- constants --------------------------------------------------------------------------------------------------------


def _filled(model: "ir.Model", number: float, size: int) -> "ir.Value":
    """The constant [size] of equal numbers, one for the whole graph."""
    import onnx_ir as ir

    name = f"filled/{number:g}/{size}"
    if name not in model.graph.initializers:
        array = np.full(size, number, np.float32)
        model.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return model.graph.initializers[name]


def _is_filled(value: "ir.Value", number: float) -> bool:
    return value.const_value is not None and bool(np.all(value.const_value.numpy() == number))
