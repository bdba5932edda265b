"""Parts of a graph that follow each other: run one after another, or joined to one graph.

Parts are named NAME_blocksA-B (`converters.export_onnx --blocks A:B`). A part's outputs `X_out` are the next one's
inputs `X`; every other input, such as the mask, is given to all parts that have it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nd_jax.errors import UserError

if TYPE_CHECKING:
    import onnx

# (inputs by name) -> outputs by name.
Call = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class Part(NamedTuple):
    """The names of a part's inputs, and the function that runs it."""

    inputs: tuple[str, ...]
    call: Call


_PART = re.compile(r"(?P<graph>.+)_blocks(?P<start>\d+)-(?P<stop>\d+)$")
_PASSED = "_out"


def part_name(graph: str, start: int, stop: int) -> str:
    """The name of a part: blocks `start` to `stop` - 1 of a graph."""
    return f"{graph}_blocks{start}-{stop}"


def block_ranges(layers: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of parts of `size` blocks; the last may have less.

    Raises:
      UserError: a size below 1.
    """
    if size < 1:
        raise UserError(f"parts of {size} blocks: give at least 1")
    return [(start, min(start + size, layers)) for start in range(0, layers, size)]


def parts_of(graph: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are parts of a graph, in their order; empty if there are none.

    Raises:
      UserError: they do not begin with block 0, or one does not begin where the one before it ends.
    """
    matches = [match for match in map(_PART.match, names) if match and match["graph"] == graph]
    found = sorted((int(match["start"]), int(match["stop"]), match[0]) for match in matches)
    reached = 0
    for start, stop, name in found:
        if start != reached:
            raise UserError(f"{name} does not follow block {reached} of {graph}: export its parts once more")
        reached = stop
    return [name for *_, name in found]


def chained(parts: Sequence[Part]) -> Call:
    """One call of all parts in turn; each takes and gives float32, those with integer ends too.

    Raises:
      UserError: (when called) a part takes what neither the inputs have nor the part before it gives.
    """

    def call(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = {}
        for number, part in enumerate(parts):
            given = {**inputs, **passed_on(outputs)}
            missing = [name for name in part.inputs if name not in given]
            if missing:
                raise UserError(f"part {number} takes {', '.join(missing)}, which nothing before it gives")
            outputs = part.call({name: given[name] for name in part.inputs})
        return outputs

    return call


def passed_on(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A part's outputs, by the names that they have as inputs of the next."""
    return {name.removesuffix(_PASSED): array for name, array in outputs.items() if name.endswith(_PASSED)}


def opener(open_graph: Callable[[str], Call], graphs: Mapping[str, Mapping[str, Any]]) -> Callable[[str], Call]:
    """`open_graph` that also opens a graph of which there are the parts alone.

    Args:
      open_graph: name -> call.
      graphs: name -> entry with `inputs`, each with a `name`: that of a bundle's model.json, or a report of an export.
    """

    def open_whole(graph: str) -> Call:
        names = [] if graph in graphs else parts_of(graph, graphs)
        inputs = {name: tuple(spec["name"] for spec in graphs[name]["inputs"]) for name in names}
        parts = [Part(inputs[name], open_graph(name)) for name in names]
        return chained(parts) if parts else open_graph(graph)

    return open_whole


def joined(parts: Sequence["onnx.ModelProto"], name: str) -> "onnx.ModelProto":
    """One graph of all parts, whose inner names have the part's number in front.

    Args:
      parts: in their order, without external data or with references to it, which stay as they are. Quantised ones
        have float32 ends: two encodings of one value are then two steps, as they are when the parts run on their own.
      name: of the graph.

    Raises:
      UserError: a part takes what neither the part before it gives nor the first part takes, or another shape of it.
    """
    import onnx

    given = {value.name: value for value in parts[0].graph.input}
    whole, passed, names = onnx.ModelProto(), {}, {}
    for number, part in enumerate(parts):
        prefix = f"part{number}/"
        for value in part.graph.input:
            source = passed.get(value.name, given.get(value.name))
            if source is None or source.type != value.type:
                raise UserError(
                    f"{name}: part {number} takes {value.name!r}, which no part before it gives in this form"
                )
            names[prefix + value.name] = source.name
        last = part is parts[-1]
        names |= {prefix + value.name: value.name for value in part.graph.output if last}
        part = onnx.compose.add_prefix(part, prefix)
        passed = {
            value.name.removeprefix(prefix).removesuffix(_PASSED): value
            for value in part.graph.output
            if value.name.endswith(_PASSED)
        }
        if number == 0:
            whole.CopyFrom(part)
            continue
        for field in ("node", "initializer", "value_info"):
            getattr(whole.graph, field).extend(getattr(part.graph, field))
        if not last:
            whole.graph.value_info.extend(part.graph.output)
    whole.graph.name = name
    del whole.graph.output[:], whole.metadata_props[:]
    whole.graph.output.extend(parts[-1].graph.output)
    for value in whole.graph.input:
        value.name = names[value.name]
    for node in whole.graph.node:
        node.input[:] = [names.get(edge, edge) for edge in node.input]
        node.output[:] = [names.get(edge, edge) for edge in node.output]
    return whole
