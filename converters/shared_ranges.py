"""Values that must have one encoding: a state and what becomes of it at the next call, and what is only moved.

An operator that moves numbers without computing any is free on the HTP when its ends have one encoding; otherwise
every number is multiplied and rounded again.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

Range = tuple[float, float]

# Ranges are made wider than what the samples show. A number outside of its range is clipped, which costs far more than
# the 3.5 dB of 75 that this takes from 16-bit activations; the weights' 8 bits give 35 to 45.
HEADROOM = 1.5

MOVES = ("Concat", "DepthToSpace", "Gather", "Reshape", "Slice", "Split", "Transpose")


def share_ranges(
    model: "onnx.ModelProto", extremes: Mapping[str, Range], carried: Mapping[str, str]
) -> dict[str, Range]:
    """Ranges in which values that must have one encoding have one, the union of theirs; `HEADROOM` wider.

    Args:
      model: the float graph.
      extremes: value name -> smallest and largest number.
      carried: output -> the input that takes it at the next call.
    """
    parent = {name: name for name in extremes}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    pairs = list(carried.items())
    for node in model.graph.node:
        if node.op_type in MOVES:
            values = [name for name in (*node.input, *node.output) if name in parent]
            pairs += [(values[0], other) for other in values[1:]]
    for one, other in pairs:
        parent[root(one)] = root(other)
    union: dict[str, Range] = {}
    for name, (low, high) in extremes.items():
        before = union.get(root(name), (0.0, 0.0))
        union[root(name)] = (min(before[0], HEADROOM * low), max(before[1], HEADROOM * high))
    return {name: union[root(name)] for name in extremes}
