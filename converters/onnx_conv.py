"""Rewrites around convolutions: kernels and biases in ONNX's own layout, native DepthToSpace."""

from typing import TYPE_CHECKING

import numpy as np

from converters.onnx_edit import channel_weight, replace_value
from converters.scalar_cones import scalar_constant

if TYPE_CHECKING:
    import onnx_ir as ir

_TANH_ENDS = {"low": -9.0, "high": 9.0}
# Order of the transposition in a depth to space -> mode, and the axes of row, column and channel before it.
_BLOCK_AXES = {(0, 1, 3, 2, 4, 5): ("DCR", (3, 4, 5)), (0, 1, 4, 2, 5, 3): ("CRD", (4, 5, 3))}


def bias_into_conv(model: "ir.Model") -> int:
    """Add(Conv(x, kernel, 0), Reshape(bias)) -> Conv(x, kernel, bias), and Conv(x, kernel, 0) -> Conv(x, kernel).

    TFLite's convolutions have a bias, so that each comes with zeros.
    """
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        if node.op_type != "Conv" or not _has_zero_bias(node):
            continue
        target, bias = node.outputs[0], []
        readers = [use.node for use in target.uses()]
        if len(readers) == 1 and readers[0].op_type == "Add" and not target.is_graph_output():
            added = channel_weight(next(value for value in readers[0].inputs if value is not target))
            if added is not None and added.shape[0] == target.shape[1]:
                target, bias = readers[0].outputs[0], [added]
        replace_value(model, target, ir.node("Conv", [*node.inputs[:2], *bias], attributes=dict(node.attributes)))
        count += 1
    return count


def _has_zero_bias(conv: "ir.Node") -> bool:
    bias = conv.inputs[2].const_value if len(conv.inputs) > 2 else None
    return bias is not None and not np.any(bias.numpy())


def pad_into_conv(model: "ir.Model") -> int:
    """Conv of zeros around a picture -> Conv with padding of its own. TFLite's only pads as much as a stride needs."""
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        pad = node.inputs[0].producer() if node.op_type == "Conv" else None
        if pad is None or pad.op_type != "Pad" or pad.attributes.get_string("mode", "constant") != "constant":
            continue
        sizes, fill = pad.inputs[1].const_value, pad.inputs[2] if len(pad.inputs) > 2 else None
        if sizes is None or len(pad.inputs) > 3 or (fill is not None and scalar_constant(fill) != 0):
            continue
        begin, end = np.split(sizes.numpy(), 2)
        if np.any(begin[:2]) or np.any(end[:2]) or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
            continue
        own = np.array(node.attributes.get_ints("pads", [0] * 4))
        total = own + np.concatenate([begin[2:], end[2:]])
        attributes = {**node.attributes, "pads": ir.AttrInt64s("pads", total.tolist())}
        conv = ir.node("Conv", [pad.inputs[0], *node.inputs[1:]], attributes=attributes)
        replace_value(model, node.outputs[0], conv)
        count += 1
    return count


def transpose_weights(model: "ir.Model") -> int:
    """Transpose of a weight -> the weight transposed, under its own name. TFLite keeps kernels as HWIO."""
    import onnx_ir as ir
    import onnx_ir.convenience as convenience

    count = 0
    for weight in list(model.graph.initializers.values()):
        readers = [use.node for use in weight.uses()]
        if not readers or any(node.op_type != "Transpose" or node.outputs[0].is_graph_output() for node in readers):
            continue
        perms = {tuple(node.attributes["perm"].as_ints()) for node in readers}
        if len(perms) != 1:
            continue
        turned = np.ascontiguousarray(weight.const_value.numpy().transpose(perms.pop()))
        weight.const_value, weight.shape = ir.tensor(turned, name=weight.name), ir.Shape(turned.shape)
        for node in readers:
            convenience.replace_all_uses_with(node.outputs[0], weight)
            model.graph.remove(node, safe=True)
            count += 1
    return count


def restore_depth_to_space(model: "ir.Model") -> int:
    """[N, H, W, r r C] reshaped, transposed, reshaped to [N, r H, r W, C] -> DepthToSpace between two transposes.

    The form between has rank 6, which the HTP does not take. Channels are (row, column, C), ONNX's mode DCR, or
    (C, row, column), CRD.
    """
    import onnx_ir as ir

    count = 0
    for last in list(model.graph):
        turn = last.inputs[0].producer() if last.op_type == "Reshape" else None
        if turn is None or turn.op_type != "Transpose" or tuple(turn.attributes["perm"].as_ints()) not in _BLOCK_AXES:
            continue
        first = turn.inputs[0].producer()
        if first is None or first.op_type != "Reshape":
            continue
        x, y, split = first.inputs[0], last.outputs[0], first.outputs[0].shape.numpy()
        mode, axes = _BLOCK_AXES[tuple(turn.attributes["perm"].as_ints())]
        (n, height, width), (rows, columns, channels) = split[:3], (split[axis] for axis in axes)
        small, large = (n, height, width, rows * columns * channels), (n, rows * height, columns * width, channels)
        if rows != columns or tuple(x.shape.numpy()) != small or tuple(y.shape.numpy()) != large:
            continue
        to_first = ir.node("Transpose", [x], attributes={"perm": [0, 3, 1, 2]})
        move = ir.node("DepthToSpace", to_first.outputs, attributes={"blocksize": int(rows), "mode": mode})
        to_last = ir.node("Transpose", move.outputs, attributes={"perm": [0, 2, 3, 1]})
        for value, shape, name in (
            (to_first.outputs[0], [small[i] for i in (0, 3, 1, 2)], "channels_first"),
            (move.outputs[0], [large[i] for i in (0, 3, 1, 2)], "depth_to_space"),
        ):
            value.name, value.shape, value.type = f"{y.name}/{name}", ir.Shape(shape), x.type
        model.graph.insert_before(last, [to_first, move])
        replace_value(model, y, to_last)
        count += 1
    return count


def restore_resize(model: "ir.Model") -> int:
    """DepthToSpace of a picture beside itself r r times -> Resize to r times the rows and columns, nearest.

    JAX repeats pixels at rank 5. The HTP computes this coordinate transformation right, and half_pixel wrong.
    """
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        concat = node.inputs[0].producer() if node.op_type == "DepthToSpace" else None
        if concat is None or concat.op_type != "Concat" or len(set(concat.inputs)) != 1:
            continue
        factor = node.attributes["blocksize"].as_int()
        in_channels = concat.attributes["axis"].as_int() in (1, -3)
        if len(concat.inputs) != factor**2 or not in_channels or node.attributes["mode"].as_string() != "DCR":
            continue
        name = f"resize/{factor}"
        if name not in model.graph.initializers:
            scales = np.array([1, 1, factor, factor], np.float32)
            model.graph.register_initializer(ir.val(name, const_value=ir.tensor(scales, name=name)))
        form = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        resize = ir.node("Resize", [concat.inputs[0], None, model.graph.initializers[name]], attributes=form)
        replace_value(model, node.outputs[0], resize)
        count += 1
    return count


def reshape_weights(model: "ir.Model") -> int:
    """Reshape of a weight [C] for a product or a sum with pictures -> the weight [C, 1, 1], under its own name."""
    import onnx_ir as ir
    import onnx_ir.convenience as convenience

    count = 0
    for weight in list(model.graph.initializers.values()):
        readers = [use.node for use in weight.uses()]
        if weight.shape is None or len(weight.shape) != 1 or not readers:
            continue
        wide = (1, weight.shape[0], 1, 1)
        if any(n.op_type != "Reshape" or n.outputs[0].shape != wide or n.inputs[0] is not weight for n in readers):
            continue
        if any(use.node.op_type not in ("Add", "Mul") for node in readers for use in node.outputs[0].uses()):
            continue
        turned = weight.const_value.numpy().reshape(wide[1:])
        weight.const_value, weight.shape = ir.tensor(turned, name=weight.name), ir.Shape(turned.shape)
        for node in readers:
            convenience.replace_all_uses_with(node.outputs[0], weight)
            model.graph.remove(node, safe=True)
            count += 1
    return count


def clip_before_tanh(model: "ir.Model") -> int:
    """Tanh of a Conv -> Tanh of Clip(Conv) to [-9, 9], beyond which a float32 tanh is 1.

    The Hexagon compiler fuses a convolution with the Tanh behind it, also through a factor, to something that has 40 to
    44 dB; with an operator between them the two have 65 dB and more.
    """
    import onnx_ir as ir

    count, bounds = 0, []
    for node in list(model.graph):
        if node.op_type != "Tanh" or not _follows_conv(node.inputs[0]):
            continue
        if not bounds:
            bounds = [ir.val(f"tanh/{name}", const_value=ir.tensor(np.float32(x))) for name, x in _TANH_ENDS.items()]
            for value in bounds:
                model.graph.register_initializer(value)
        x = node.inputs[0]
        clip = ir.node("Clip", [x, *bounds])
        clip.outputs[0].name, clip.outputs[0].shape, clip.outputs[0].type = f"{x.name}/clipped", x.shape, x.type
        model.graph.insert_before(node, clip)
        node.replace_input_with(0, clip.outputs[0])
        count += 1
    return count


def _follows_conv(value: "ir.Value") -> bool:
    node = value.producer()
    while node is not None and node.op_type == "Mul":
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "Conv"
