"""Small edits of `onnx_ir` models that the rewrites share."""

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def op_counts(model: "ir.Model") -> dict[str, int]:
    """Operator -> number of nodes, most frequent first."""
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def transpose_count(model: "ir.Model") -> int:
    """Transposes of a graph, those included that its Einsums hold (`einsum_transposes`)."""
    return sum(
        einsum_transposes(node.attributes.get_string("equation")) if node.op_type == "Einsum" else 1
        for node in model.graph
        if node.op_type in ("Einsum", "Transpose")
    )


def einsum_transposes(equation: str) -> int:
    """The fewest Transposes with which Reshapes and one MatMul compute a product of two tensors, as `bqhk,bshk->bhqs`.

    Every operand and the result may need one: MatMul takes [batch, rows, summed] and [batch, summed, columns], where
    each part may be several axes in any order that all three have, and either operand may be the first. What is no
    such product counts none.
    """
    operands, result = equation.replace(" ", "").split("->")
    terms = operands.split(",")
    if len(terms) != 2 or any(len(set(term)) != len(term) for term in (*terms, result)):
        return 0
    first, second, made = set(terms[0]), set(terms[1]), set(result)
    if not first ^ second <= made <= first | second:
        return 0
    fewest = 3
    for a, b in (terms, terms[::-1]):
        parts = (set(a) & set(b) & made, set(a) - set(b), (set(a) & set(b)) - made, set(b) - set(a))
        for orders in itertools.product(*(itertools.permutations(sorted(part)) for part in parts)):
            batch, rows, summed, columns = map("".join, orders)
            wanted = (batch + rows + summed, batch + summed + columns, batch + rows + columns)
            fewest = min(fewest, sum(x != y for x, y in zip((a, b, result), wanted, strict=True)))
    return fewest


def replace_value(model: "ir.Model", old: "ir.Value", new_node: "ir.Node") -> None:
    """Inserts the node before the producer of `old` and lets it take over the name, the type and all uses of `old`."""
    import onnx_ir.convenience as convenience

    producer, new = old.producer(), new_node.outputs[0]
    new.type, new.shape, new.name = old.type, old.shape, old.name
    model.graph.insert_before(producer, new_node)
    convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = f"{old.name}/replaced"


def channel_weight(operand: "ir.Value") -> "ir.Value | None":
    """The weight [C] that an operand [1, C, 1, 1] of a picture is a Reshape of."""
    reshape = operand.producer()
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0].const_value is None:
        return None
    weight, rank, shape = reshape.inputs[0], len(operand.shape), operand.shape.numpy()
    return weight if rank == 4 and len(weight.shape) == 1 and shape[1] == weight.shape[0] else None


def node_positions(model: "ir.Model") -> dict["ir.Node", int]:
    """Where each node stands in the order of the graph."""
    return {node: i for i, node in enumerate(model.graph)}


def scope(name: str) -> str:
    """What JAX calls the place of a value: `jit(f)/a/b/dot_general;jit(f)/a/c/add1` -> `a/b/dot_general`."""
    first = name.split(";")[0]
    return first.split(")/", 1)[1] if first.startswith("jit(") and ")/" in first else first
