"""What a graph must look like before it goes to the Hexagon compiler.

The compiler accepts more than it computes right, so the operators are a list of those that were measured on the HTP
(`docs/conversion.md`), not a list of those that failed.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from converters.numerics import FP16_MAX
from converters.packages import need
from nd_jax.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23
MAX_RANK = 4

MEASURED_OPS = frozenset(
    """
    Add BatchNormalization Cast Clip Concat Conv ConvTranspose DepthToSpace Div Gather Gelu InstanceNormalization
    LayerNormalization MatMul Mul Neg Pad Relu Reshape Resize RMSNormalization RotaryEmbedding Sigmoid Slice Softmax
    Split Sub Tanh Transpose
    """.split()
)
REASONS = {
    "Einsum": "the HTP rejects it",
    "GroupNormalization": "the HTP rejects it; write it as converters.onnx_norm does",
    "GatherND": "the HTP computes it wrong; use Gather with int32 indices",
    "Where": "tables and masks belong on the host, or in arithmetic with finite values",
    "Exp": "a decomposed softmax is computed wrong; use Softmax",
    "Erf": "a decomposed GELU; use Gelu",
    "Sqrt": "a decomposed norm saturates in FP16; use RMSNormalization or LayerNormalization",
    "Reciprocal": "a decomposed norm saturates in FP16; use RMSNormalization or LayerNormalization",
    "Pow": "rsqrt as a power gives 5 dB",
    "Sin": "23 dB in FP16; compute conditioning on the host",
    "Cos": "23 dB in FP16; compute conditioning on the host",
    "Shape": "shapes must be static",
}
# int64 is for the shape operand of Reshape and the like, which the compiler folds away.
DTYPES = ("FLOAT", "FLOAT16", "INT32", "UINT8", "INT8", "UINT16", "INT16")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that the device would reject or compute wrong; `where` is the node or the value."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def problems(model: "ir.Model") -> list[Problem]:
    """All problems of a model with inferred shapes; empty when it is ready for the compiler."""
    return [*_opset(model), *_inputs(model), *_nodes(model), *_constants(model)]


def check(model: "ir.Model", name: str) -> None:
    """Infers shapes, then raises one UserError that names the first problems and counts the rest."""
    need("onnx_ir")
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(model)
    found = problems(model)
    if found:
        shown = "; ".join(str(problem) for problem in found[:5])
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(f"{name} is not ready for the HTP: {shown}{more}")


def _opset(model: "ir.Model") -> Iterator[Problem]:
    opset = model.opset_imports.get("")
    if opset != OPSET:
        yield Problem("model", f"opset {opset}, expected {OPSET}")


def _inputs(model: "ir.Model") -> Iterator[Problem]:
    for value in model.graph.inputs:
        yield from _value_problems(value, f"input {value.name!r}")


def _nodes(model: "ir.Model") -> Iterator[Problem]:
    for node in model.graph:
        where = f"node {node.name!r} ({node.op_type})"
        if node.domain not in ("", "ai.onnx"):
            yield Problem(where, f"operator of domain {node.domain!r}")
        elif node.op_type not in MEASURED_OPS:
            yield Problem(where, REASONS.get(node.op_type, "this operator has not been measured on the HTP"))
        if node.op_type == "Gather" and node.inputs[1].dtype is not None and node.inputs[1].dtype.name != "INT32":
            yield Problem(where, f"indices are {node.inputs[1].dtype.name}, expected INT32")
        if node.op_type == "RMSNormalization" and node.inputs[0].shape is not None and len(node.inputs[0].shape) > 3:
            yield Problem(where, "an RMS norm of rank 4 is computed wrong in most sizes; reshape it to rank 3")
        if node.op_type == "Softmax" and not _over_last_axis(node):
            yield Problem(where, "softmax over an axis that is not the last")
        for value in node.outputs:
            yield from _value_problems(value, where)


def _over_last_axis(node: "ir.Node") -> bool:
    axis, shape = node.attributes.get_int("axis", -1), node.inputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _value_problems(value: "ir.Value", where: str) -> Iterator[Problem]:
    if value.shape is None or not value.shape.is_static():
        yield Problem(where, f"shape of {value.name!r} is not static: {value.shape}")
    elif len(value.shape) > MAX_RANK:
        yield Problem(where, f"rank {len(value.shape)}, at most {MAX_RANK}")
    if value.dtype is not None and value.dtype.name not in DTYPES:
        yield Problem(where, f"type {value.dtype.name}, expected one of {', '.join(DTYPES)}")


def _constants(model: "ir.Model") -> Iterator[Problem]:
    for name, value in model.graph.initializers.items():
        if value.const_value is None or not value.const_value.dtype.is_floating_point():
            continue
        # Largest first, so that NaN and infinity show up too.
        largest = np.max(np.abs(value.const_value.numpy())) if value.const_value.size else 0.0
        if not largest <= FP16_MAX:
            yield Problem(f"constant {name!r}", f"holds {largest}, beyond FP16's {FP16_MAX:.0f}")
