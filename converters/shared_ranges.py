"""Range of every value: what the samples show, wider, and one for values that must have one encoding.

Those are a state and what becomes of it at the next call, and what is only moved: an operator that moves numbers
without computing any is free on the HTP when its ends have one encoding; otherwise every number is multiplied and
rounded again.
"""

import math
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
    model: "onnx.ModelProto",
    extremes: Mapping[str, Range],
    carried: Mapping[str, str],
    overrides: Mapping[str, Range] | None = None,
) -> dict[str, Range]:
    """Ranges in which values that must have one encoding have one, the union of theirs; `HEADROOM` wider.

    A range does not leave the limits of a Clip that its numbers come from: the quantiser leaves such a Clip out, and
    the range takes its place.

    Args:
      model: the float graph.
      extremes: value name -> smallest and largest number.
      carried: output -> the input that takes it at the next call.
      overrides: value name -> its range, for all values that share its encoding; as it is, without headroom.
    """
    parent = {name: name for name in extremes}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    pairs, moved = list(carried.items()), set()
    for node in model.graph.node:
        if node.op_type in MOVES:
            values = [name for name in (*node.input, *node.output) if name in parent]
            pairs += [(values[0], other) for other in values[1:]]
            moved |= set(node.output)
    for one, other in pairs:
        parent[root(one)] = root(other)
    limits = clip_limits(model)
    union: dict[str, Range] = {}
    bounds: dict[str, Range] = {}
    for name, (low, high) in extremes.items():
        union[root(name)] = _union(union.get(root(name), (0.0, 0.0)), (HEADROOM * low, HEADROOM * high))
        if name not in moved:
            own = limits.get(name, (-math.inf, math.inf))
            bounds[root(name)] = _union(bounds.get(root(name), own), own)
    for group, (low, high) in bounds.items():
        union[group] = max(union[group][0], low), min(union[group][1], high)
    for name, pair in (overrides or {}).items():
        union[root(name)] = pair
    return {name: union[root(name)] for name in extremes}


def _union(one: Range, other: Range) -> Range:
    return min(one[0], other[0]), max(one[1], other[1])


def clip_limits(model: "onnx.ModelProto") -> dict[str, Range]:
    """Output of every Clip with constant limits, and of every Relu -> its limits, 0 among them; infinite if open."""
    import onnx

    # Scalars lie in the graph and not in its external data.
    scalars = {
        t.name: onnx.numpy_helper.to_array(t).item()
        for t in model.graph.initializer
        if not t.dims or list(t.dims) == [1]
    }
    found = {}
    for node in model.graph.node:
        if node.op_type == "Relu":
            found[node.output[0]] = (0.0, math.inf)
        elif node.op_type == "Clip":
            low, high = ([*node.input[1:], "", ""])[:2]
            if all(name in scalars for name in (low, high) if name):
                limits = scalars.get(low, -math.inf), scalars.get(high, math.inf)
                found[node.output[0]] = min(limits[0], 0.0), max(limits[1], 0.0)
    return found


def wider_than_clip(model: "onnx.ModelProto", ranges: Mapping[str, Range]) -> list[str]:
    """Outputs of Clip and Relu whose range leaves the limits, so that it cannot take the operator's place."""
    return [
        name
        for name, (low, high) in clip_limits(model).items()
        if name in ranges and (ranges[name][0] < low or ranges[name][1] > high)
    ]
