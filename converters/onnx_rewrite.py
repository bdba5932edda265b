"""Turns what tf2onnx writes into what the HTP computes right: native operators of opset 23, few nodes, readable names.

Every rewrite is one function (model -> number of places), in the order of `REWRITES`. `docs/conversion.md` has the
measurement behind each. A rewrite that does not find its pattern leaves the graph as it is; `onnx_lint` then names the
operator that must not be there, and `missing_native_ops` the one that should.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from converters import onnx_conv, onnx_gelu, onnx_layout, onnx_norm
from converters.onnx_edit import node_positions, op_counts, replace_value, scope
from converters.packages import need
from converters.scalar_cones import cones, scalar_constant

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23
# The first ONNX file format version that has opset 23.
IR_VERSION = 11


def restore_native(model: "ir.Model") -> dict[str, int]:
    """Applies `REWRITES` in place to a model from `tflite_route.trace`.

    Returns:
      Name of the rewrite -> number of places that it changed.
    """
    need("onnx_ir", "onnxscript")
    import onnx_ir.passes.common as passes

    model.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    # Constant nodes become initializers, where the patterns look for constants.
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    counts = {}
    for rewrite in REWRITES:
        passes.ShapeInferencePass()(model)
        counts[rewrite.__name__] = rewrite(model)
        passes.CommonSubexpressionEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
    return counts


def missing_native_ops(model: "ir.Model", expected: Mapping[str, int]) -> list[str]:
    """One phrase for every operator whose number differs from the graph's declaration; of `A or B`, both together."""
    counts = op_counts(model)
    found = {ops: sum(counts.get(op, 0) for op in ops.split(" or ")) for ops in expected}
    return [f"{ops} {found[ops]} instead of {n}" for ops, n in expected.items() if found[ops] != n]


# --- Gather -----------------------------------------------------------------------------------------------------------


def restore_gather(model: "ir.Model") -> int:
    """GatherND with computed int64 indices -> Gather with the int32 ids themselves.

    The HTP computed GatherND wrong in 3 of 5 cases. JAX's lookup also wraps negative ids and writes NaN for ids
    outside of the table: for 0 <= id < rows, which is the graph's contract, all of that is the identity, and this
    is checked on every id before the nodes go.
    """
    import onnx_ir as ir

    positions, count = node_positions(model), 0
    for node in list(model.graph):
        if node.op_type != "GatherND" or node.attributes.get_int("batch_dims", 0) != 0:
            continue
        table, index = node.inputs
        if table.shape is None or len(table.shape) != 2:
            continue
        every_id = np.arange(table.shape[0], dtype=np.int32)
        ids = _same_numbers(index, node.outputs[0], every_id, positions)
        if ids is None:
            continue
        old = _after_range_check(node.outputs[0], ids, every_id, positions)
        replace_value(model, old, ir.node("Gather", [table, ids], attributes={"axis": 0}))
        positions = node_positions(model)
        count += 1
    return count


def _same_numbers(index: "ir.Value", gathered: "ir.Value", every_id: np.ndarray, positions: dict) -> "ir.Value | None":
    """The earliest value that holds the numbers of `index` and that Gather could read in its place."""
    found = None
    for cone in cones(index, positions, reshaping=True):
        fits = cone.source.shape is not None and [*cone.source.shape] == [*gathered.shape][:-1]
        if fits and np.array_equal(cone(every_id), every_id):
            found = cone.source
    return found


def _after_range_check(gathered: "ir.Value", ids: "ir.Value", every_id: np.ndarray, positions: dict) -> "ir.Value":
    """The output of `Where(ids in range, gathered, NaN)` if that is the only reader of `gathered`, else `gathered`."""
    readers = [use.node for use in gathered.uses()]
    if len(readers) != 1 or readers[0].op_type != "Where" or readers[0].inputs[1] is not gathered:
        return gathered
    in_range = (
        cone.source is ids and bool(np.all(cone(every_id)))
        for cone in cones(readers[0].inputs[0], positions, reshaping=True)
    )
    return readers[0].outputs[0] if any(in_range) else gathered


# --- Clip -------------------------------------------------------------------------------------------------------------


def clip_instead_of_max(model: "ir.Model") -> int:
    """Max(x, c) -> Clip(x, c) for one constant number c."""
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        if node.op_type != "Max" or len(node.inputs) != 2:
            continue
        for x, bound in (node.inputs, node.inputs[::-1]):
            number = scalar_constant(bound)
            if number is not None and x.shape is not None and x.shape == node.outputs[0].shape:
                low = ir.val(f"{node.outputs[0].name}/low", const_value=ir.tensor(number))
                model.graph.register_initializer(low)
                replace_value(model, node.outputs[0], ir.node("Clip", [x, low]))
                count += 1
                break
    return count


def min_into_clip(model: "ir.Model") -> int:
    """Min(Clip(x, low), c) -> Clip(x, low, c) for one constant number c."""
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        if node.op_type != "Min" or len(node.inputs) != 2:
            continue
        for clipped, bound in (node.inputs, node.inputs[::-1]):
            clip, number = clipped.producer(), scalar_constant(bound)
            if number is not None and clip is not None and clip.op_type == "Clip" and len(clip.inputs) == 2:
                high = ir.val(f"{node.outputs[0].name}/high", const_value=ir.tensor(number))
                model.graph.register_initializer(high)
                replace_value(model, node.outputs[0], ir.node("Clip", [*clip.inputs, high]))
                count += 1
                break
    return count


# --- RMSNormalization and Softmax -------------------------------------------------------------------------------------


def restore_rms_norm(model: "ir.Model") -> int:
    """x * 1 / sqrt(mean(x^2) + eps) * scale -> RMSNormalization.

    Decomposed, x^2 saturates in FP16 from |x| = 256 on (12 dB where the native operator has 70).
    """
    from onnxscript.rewriter import pattern

    def decomposed(op, x, axes, per_element, eps, column, scale):
        mean = op.Mul(op.ReduceSum(op.Mul(x, x), axes), per_element)
        inverse = op.Reciprocal(op.Sqrt(op.Reshape(op.Add(mean, eps), column)))
        return op.Mul(op.Mul(x, inverse), scale)

    def is_norm(context, x, axes, per_element, eps, column, scale, **_):
        constants = [scalar_constant(value) for value in (axes, per_element, eps)]
        if any(c is None for c in constants) or x.shape is None or scale.shape is None:
            return False
        rank, width = len(x.shape), x.shape[-1]
        last = int(constants[0]) in (-1, rank - 1)
        return last and tuple(scale.shape) == (width,) and abs(float(constants[1]) * width - 1) < 1e-6

    def native(op, x, eps, scale, **_):
        return op.RMSNormalization(x, scale, axis=-1, epsilon=float(scalar_constant(eps)))

    return pattern.RewriteRuleSet([pattern.RewriteRule(decomposed, native, is_norm)], commute=True).apply_to_model(
        model
    )


def restore_softmax(model: "ir.Model") -> int:
    """exp(x - max x) / sum -> Softmax over the last axis.

    TFLite recognises most softmaxes itself; this is for those that it leaves. Decomposed with a mask: 0 dB.
    """
    from onnxscript.rewriter import pattern

    def decomposed(op, x, max_axes, sum_axes):
        exponential = op.Exp(op.Sub(x, op.ReduceMax(x, max_axes, keepdims=1)))
        return op.Div(exponential, op.ReduceSum(exponential, sum_axes, keepdims=1))

    def over_last_axis(context, x, max_axes, sum_axes, **_):
        axes = [scalar_constant(value) for value in (max_axes, sum_axes)]
        return x.shape is not None and all(a is not None and int(a) in (-1, len(x.shape) - 1) for a in axes)

    def native(op, x, **_):
        return op.Softmax(x, axis=-1)

    rule = pattern.RewriteRule(decomposed, native, over_last_axis)
    return pattern.RewriteRuleSet([rule]).apply_to_model(model)


# --- Names ------------------------------------------------------------------------------------------------------------


def readable_names(model: "ir.Model", weights: Collection[str]) -> None:
    """Node and value names from JAX's scopes: `jit(f)/a/b/dot_general;jit(f)/a/c/add1` -> `a/b/dot_general`.

    A lint or compiler message then says which layer it means.
    """
    graph = model.graph
    constants = [value for value in graph.initializers.values() if value.name not in weights]
    for i, value in enumerate(constants):
        value.name = f"constant.{i}"
    taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = _unused(scope(value.name or node.op_type), taken)
        node.name = f"{node.op_type}:{node.outputs[0].name}"


def _unused(name: str, taken: set[str]) -> str:
    candidate, i = name, 1
    while candidate in taken:
        candidate, i = f"{name}.{i}", i + 1
    taken.add(candidate)
    return candidate


REWRITES: tuple[Callable[["ir.Model"], int], ...] = (
    restore_gather,
    onnx_gelu.restore_gelu,
    onnx_norm.restore_layer_norm,
    onnx_norm.scale_into_layer_norm,
    onnx_norm.restore_instance_norm,
    onnx_norm.scale_into_batch_norm,
    clip_instead_of_max,
    min_into_clip,
    restore_rms_norm,
    restore_softmax,
    onnx_conv.bias_into_conv,
    onnx_conv.pad_into_conv,
    onnx_conv.clip_before_tanh,
    onnx_conv.transpose_weights,
    onnx_conv.reshape_weights,
    onnx_conv.restore_depth_to_space,
    onnx_layout.transpose_outputs_instead,
    onnx_layout.transpose_before_concat,
    onnx_layout.merge_transposes,
    onnx_conv.restore_resize,
    onnx_layout.matmul_before_reshape,
    onnx_layout.merge_reshapes,
    onnx_layout.drop_leading_ones,
)
