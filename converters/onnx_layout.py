"""Rewrites that remove transposes and reshapes which TFLite puts around matrix products."""

from typing import TYPE_CHECKING

import numpy as np

from converters.onnx_edit import replace_value

if TYPE_CHECKING:
    import onnx_ir as ir

SWAP_LAST_TWO = {2: [1, 0], 3: [0, 2, 1], 4: [0, 1, 3, 2]}


def transpose_outputs_instead(model: "ir.Model") -> int:
    """A P^T -> (P A^T)^T where A and the product are transposed anyway.

    TFLite contracts p v as v^T p^T. The attention weights p are the largest activation: this leaves them where they
    are, and the transposes that it adds merge into those of v and of the result.
    """
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        if node.op_type != "MatMul":
            continue
        a, p_transposed = node.inputs
        turned = p_transposed.producer()
        readers = [use.node for use in node.outputs[0].uses()]
        if (
            turned is None
            or _perm(turned) != SWAP_LAST_TWO.get(len(turned.inputs[0].shape or ()))
            or _perm(a.producer()) is None
            or len(readers) != 1
            or _perm(readers[0]) is None
        ):
            continue
        swap = SWAP_LAST_TWO[len(a.shape)]
        a_swapped = ir.node("Transpose", [a], attributes={"perm": swap})
        product = ir.node("MatMul", [turned.inputs[0], a_swapped.outputs[0]])
        back = ir.node("Transpose", [product.outputs[0]], attributes={"perm": swap})
        stem, dtype = node.outputs[0].name, node.outputs[0].type
        for new, shape, suffix in (
            (a_swapped.outputs[0], ir.Shape([a.shape[i] for i in swap]), "right"),
            (product.outputs[0], ir.Shape([node.outputs[0].shape[i] for i in swap]), "product"),
        ):
            new.name, new.shape, new.type = f"{stem}/{suffix}", shape, dtype
        model.graph.insert_before(node, [a_swapped, product])
        replace_value(model, node.outputs[0], back)
        count += 1
    return count


def transpose_before_concat(model: "ir.Model") -> int:
    """Transpose of a Concat -> Concat of Transposes, where an input of the Concat is one and they merge."""
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        concat = node.inputs[0].producer() if _perm(node) is not None else None
        if concat is None or concat.op_type != "Concat" or len(node.inputs[0].uses()) != 1:
            continue
        if node.inputs[0].is_graph_output() or all(_perm(value.producer()) is None for value in concat.inputs):
            continue
        perm, turned = _perm(node), []
        for i, value in enumerate(concat.inputs):
            turn = ir.node("Transpose", [value], attributes={"perm": perm})
            turn.outputs[0].name, turn.outputs[0].type = f"{node.outputs[0].name}/part{i}", value.type
            turn.outputs[0].shape = ir.Shape([value.shape[axis] for axis in perm])
            model.graph.insert_before(node, turn)
            turned.append(turn.outputs[0])
        axis = concat.attributes["axis"].as_int() % len(perm)
        replace_value(model, node.outputs[0], ir.node("Concat", turned, attributes={"axis": perm.index(axis)}))
        count += 1
    return count


def merge_transposes(model: "ir.Model") -> int:
    """Transpose after Transpose -> one Transpose, or none."""
    import onnx_ir as ir
    import onnx_ir.convenience as convenience

    count = 0
    for node in list(model.graph):
        outer = _perm(node)
        before = node.inputs[0].producer() if outer is not None else None
        inner = _perm(before)
        if inner is None:
            continue
        merged, source = [inner[i] for i in outer], before.inputs[0]
        if merged == sorted(merged) and not node.outputs[0].is_graph_output():
            convenience.replace_all_uses_with(node.outputs[0], source)
        else:
            replace_value(model, node.outputs[0], ir.node("Transpose", [source], attributes={"perm": merged}))
        count += 1
    return count


def _perm(node: "ir.Node | None") -> list[int] | None:
    if node is None or node.op_type != "Transpose":
        return None
    return list(node.attributes["perm"].as_ints())


def merge_reshapes(model: "ir.Model") -> int:
    """Reshape after Reshape -> one; a Reshape that changes nothing -> none."""
    import onnx_ir.convenience as convenience

    count = 0
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        before = node.inputs[0].producer()
        if before is not None and before.op_type == "Reshape":
            node.replace_input_with(0, before.inputs[0])
            count += 1
        source, target = node.inputs[0], node.outputs[0]
        if source.shape is not None and source.shape == target.shape and not target.is_graph_output():
            convenience.replace_all_uses_with(target, source)
            count += 1
    return count


def matmul_before_reshape(model: "ir.Model") -> int:
    """Reshape(x) W -> Reshape(x W) where the Reshape only merges or splits leading axes.

    TFLite flattens the input of some fully connected layers and not of others, also for the same layer twice. With
    the Reshapes moved down they meet and vanish, and the twins become one node.
    """
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        if node.op_type != "MatMul":
            continue
        reshape, weight = node.inputs[0].producer(), node.inputs[1]
        if reshape is None or reshape.op_type != "Reshape" or weight.shape is None or len(weight.shape) != 2:
            continue
        x, flat = reshape.inputs[0], reshape.outputs[0]
        if x.shape is None or flat.shape is None or x.shape[-1] != flat.shape[-1]:
            continue
        product = ir.node("MatMul", [x, weight])
        shape = ir.val(
            f"{node.outputs[0].name}/shape", const_value=ir.tensor(np.array(node.outputs[0].shape.numpy(), np.int64))
        )
        model.graph.register_initializer(shape)
        value = product.outputs[0]
        value.name, value.type = f"{node.outputs[0].name}/product", node.outputs[0].type
        value.shape = ir.Shape([*x.shape[:-1], weight.shape[-1]])
        model.graph.insert_before(node, product)
        replace_value(model, node.outputs[0], ir.node("Reshape", [value, shape]))
        count += 1
    return count


def drop_leading_ones(model: "ir.Model") -> int:
    """Reshape that only adds or removes leading axes of size one, before an operator that broadcasts anyway -> none."""
    count = 0
    for node in list(model.graph):
        if node.op_type not in ("Add", "Sub", "Mul", "Div"):
            continue
        # Twice, because an operand can become droppable by the other one.
        for i in (0, 1, 0):
            value = node.inputs[i]
            reshape = value.producer()
            if reshape is None or reshape.op_type != "Reshape":
                continue
            source, shapes = reshape.inputs[0], [v.shape.numpy() for v in node.inputs]
            shapes[i] = source.shape.numpy()
            if _without_leading_ones(shapes[i]) != _without_leading_ones(value.shape.numpy()):
                continue
            if np.broadcast_shapes(*shapes) == tuple(node.outputs[0].shape.numpy()):
                node.replace_input_with(i, source)
                count += 1
    return count


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])
