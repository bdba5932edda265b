"""Parts of a graph that compute one scalar function of one value, recognised by what they compute.

A cone is a set of elementwise nodes between a value x and a value y that has no other input than x and constants. JAX's
exact GELU arrives as about ninety such nodes (TFLite expands erfc, and `where` into products); matching them node by
node would break with every release, so a cone is evaluated on numbers and compared with the function that it should be.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

# numpy has no erf, so an Erf node is in no cone.
ELEMENTWISE = {
    "Abs": np.abs,
    "Add": np.add,
    "And": np.logical_and,
    "Div": np.divide,
    "Equal": np.equal,
    "Exp": np.exp,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Identity": np.positive,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Pow": np.power,
    "Reciprocal": np.reciprocal,
    "Sqrt": np.sqrt,
    "Sub": np.subtract,
    "Tanh": np.tanh,
    "Where": np.where,
}

# Change the shape and no number. A sum over an axis of size one is of this kind too.
RESHAPING = ("Reshape", "Squeeze", "Unsqueeze")

# The erfc expansion has 90 nodes; anything much longer is not one activation.
MAX_NODES = 160


@dataclasses.dataclass(frozen=True)
class Cone:
    """`nodes` (in topological order) compute `output` from `source` alone."""

    source: "ir.Value"
    output: "ir.Value"
    nodes: tuple["ir.Node", ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The cone's function on an array of numbers, whatever the graph's shapes are."""
        values = {self.source: x}
        with np.errstate(all="ignore"):
            for node in self.nodes:
                values[node.outputs[0]] = _evaluate(node, values)
        return np.asarray(values[self.output])


def scalar_constant(value: "ir.Value | None") -> np.ndarray | None:
    """A constant of one element as a 0-d array, else None."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return value.const_value.numpy().reshape(())


def cones(output: "ir.Value", positions: dict["ir.Node", int], reshaping: bool = False) -> Iterator[Cone]:
    """Every cone that ends in `output`, smallest first.

    Args:
      output: the last node's output.
      positions: node -> topological position, of all nodes of the graph.
      reshaping: whether nodes that only change the shape belong to cones.
    """
    frontier, nodes = {output}, []
    while len(nodes) < MAX_NODES:
        producers = [value.producer() for value in frontier]
        # Opening the latest value first guarantees that a single frontier value cuts the graph.
        node = max((p for p in producers if p is not None), key=positions.__getitem__, default=None)
        if node is None or not _is_scalar(node, reshaping):
            return
        nodes.append(node)
        frontier.discard(node.outputs[0])
        frontier.update(value for value in _data_inputs(node) if scalar_constant(value) is None)
        if len(frontier) == 1:
            yield Cone(next(iter(frontier)), output, tuple(reversed(nodes)))


def _is_scalar(node: "ir.Node", reshaping: bool) -> bool:
    if node.op_type in ELEMENTWISE or node.op_type == "Cast":
        return True
    if not reshaping:
        return False
    return node.op_type in RESHAPING or (node.op_type == "ReduceSum" and _same_size(node))


def _same_size(node: "ir.Node") -> bool:
    shapes = [value.shape for value in (node.inputs[0], node.outputs[0])]
    return all(s is not None for s in shapes) and np.prod(shapes[0].numpy()) == np.prod(shapes[1].numpy())


def _data_inputs(node: "ir.Node") -> list["ir.Value"]:
    """The inputs that carry numbers; the others of a reshaping node are shapes and axes."""
    return list(node.inputs) if node.op_type in ELEMENTWISE else [node.inputs[0]]


def _evaluate(node: "ir.Node", values: dict) -> np.ndarray:
    inputs = [values[v] if v in values else scalar_constant(v) for v in _data_inputs(node)]
    if node.op_type == "Cast":
        import onnx_ir as ir

        return np.asarray(inputs[0]).astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    if node.op_type in ELEMENTWISE:
        return ELEMENTWISE[node.op_type](*inputs)
    return inputs[0]
