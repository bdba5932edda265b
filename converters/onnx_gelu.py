"""GELU: found in what the converters write, and written out where the HTP's own operator is not accurate enough.

    GELU(x) = x Phi(x) = x sigmoid(x S((x t)^2))                                                                   (1)
    tanh form    t = 1,    S(u) = 2 a (1 + 0.044715 u),  a = sqrt(2 / pi):  the same function                     (2)
    exact form   t = 1/4,  S(u) = c0 + c1 u + ... + c4 u^4:  within 3.1e-6 of x Phi(x) everywhere                 (3)

The c were fitted to log(Phi(x) / Phi(-x)) / x on [0, 8] by least squares, weighted again and again until the error of
(1) was the same at all its peaks; S is positive beyond. With t = 1 the last of them would be too small for FP16.
"""

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from converters.onnx_edit import node_positions, replace_value, scope
from converters.scalar_cones import Cone, cones

if TYPE_CHECKING:
    import onnx_ir as ir

_A = math.sqrt(2 / math.pi)
# `approximate` of Gelu -> t and the coefficients of S, the constant first.
FORMS = {
    "tanh": (1.0, (2 * _A, 2 * 0.044715 * _A)),
    "none": (0.25, (1.5956552, 1.16703772, -0.0642438085, -0.249587297, 0.145834863)),
}


def restore_gelu(model: "ir.Model") -> int:
    """Any cone that computes GELU -> Gelu, exact or tanh.

    Decomposed, the exact one is about ninety nodes with comparisons and divisions, NaN at 0; the tanh one leaves
    FP16 in x^3.
    """
    import onnx_ir as ir

    positions, count = node_positions(model), 0
    for node in list(model.graph):
        if node.op_type != "Mul":  # the last node of either form
            continue
        for cone in cones(node.outputs[0], positions):
            form = _form(cone)
            if form is not None:
                replace_value(model, cone.output, ir.node("Gelu", [cone.source], attributes={"approximate": form}))
                positions = node_positions(model)
                count += 1
                break
    return count


def _form(cone: Cone) -> str | None:
    """ "none" or "tanh" when the cone is GELU on [-6, 6], else None."""
    if len(cone.nodes) < 6 or cone.source.shape is None or cone.source.shape != cone.output.shape:
        return None
    x = np.linspace(-6, 6, 240, dtype=np.float32)  # without 0, where the expanded erfc is NaN
    y = cone(x)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x.tolist()])
    tanh = np.tanh(_A * (x + 0.044715 * x.astype(np.float64) ** 3))
    for form, inner in (("none", erf), ("tanh", tanh)):
        # The two forms differ by 5e-4.
        if y.shape == x.shape and np.allclose(y, 0.5 * x * (1 + inner), rtol=0, atol=5e-6):
            return form
    return None


def expand_gelu(model: "ir.Model") -> int:
    """Gelu -> equation 1, for graphs that stay in FP16 and whose gates need the accuracy.

    The HTP has one Gelu for both forms, with errors up to 1.4e-3 around -3: 60 dB beyond N(0, 1), where this has 65 to
    74. What is inside it may pass FP16 (`may_saturate`): the sigmoid is 0 or 1 there. x is not clipped, because a Clip
    makes the compiler move part of T5's gates through DRAM.
    """
    import onnx_ir as ir

    constants: dict[float, ir.Value] = {}

    def constant(number: float) -> "ir.Value":
        if number not in constants:
            value = ir.val(f"gelu/{number:g}", const_value=ir.tensor(np.float32(number)))
            model.graph.register_initializer(value)
            constants[number] = value
        return constants[number]

    count = 0
    for node in list(model.graph):
        if node.op_type != "Gelu":
            continue
        x, stem = node.inputs[0], scope(node.outputs[0].name)

        def op(kind, *inputs, name, x=x, stem=stem, node=node):
            value = ir.val(f"{stem}/gelu/{name}", shape=x.shape, type=x.type)
            model.graph.insert_before(node, ir.node(kind, list(inputs), outputs=[value]))
            return value

        unit, coefficients = FORMS[node.attributes.get_string("approximate", "none")]
        scaled = x if unit == 1 else op("Mul", x, constant(unit), name="scaled")
        square = op("Mul", scaled, scaled, name="square")
        slope = constant(coefficients[-1])
        for power, coefficient in reversed(list(enumerate(coefficients[:-1]))):
            product = op("Mul", square, slope, name=f"product.{power}")
            slope = op("Add", product, constant(coefficient), name=f"slope.{power}")
        gate = op("Sigmoid", op("Mul", x, slope, name="inner"), name="gate")
        replace_value(model, node.outputs[0], ir.node("Mul", [x, gate]))
        model.graph.remove(node, safe=True)
        count += 1
    return count


def may_saturate(name: str) -> bool:
    """Whether a value is inside a GELU of `expand_gelu`, which is right although FP16 does not hold the value."""
    return re.search(r"/gelu/(square|product|slope|inner)[.\d]*$", name) is not None
