"""Small edits of `onnx_ir` models that the rewrites share."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def op_counts(model: "ir.Model") -> dict[str, int]:
    """Operator -> number of nodes, most frequent first."""
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def replace_value(model: "ir.Model", old: "ir.Value", new_node: "ir.Node") -> None:
    """Inserts the node before the producer of `old` and lets it take over the name, the type and all uses of `old`."""
    import onnx_ir.convenience as convenience

    producer, new = old.producer(), new_node.outputs[0]
    new.type, new.shape, new.name = old.type, old.shape, old.name
    model.graph.insert_before(producer, new_node)
    convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = f"{old.name}/replaced"


def node_positions(model: "ir.Model") -> dict["ir.Node", int]:
    """Where each node stands in the order of the graph."""
    return {node: i for i, node in enumerate(model.graph)}


def scope(name: str) -> str:
    """What JAX calls the place of a value: `jit(f)/a/b/dot_general;jit(f)/a/c/add1` -> `a/b/dot_general`."""
    first = name.split(";")[0]
    return first.split(")/", 1)[1] if first.startswith("jit(") and ")/" in first else first
