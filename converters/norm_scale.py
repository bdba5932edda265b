"""Group norms in FP16 that read larger numbers than FP16 holds, behind integers that do hold them.

With n the norm, n(x; eps) = n(x / c; eps / c^2) for every c > 0: a product with 1 / c, on integers, goes in front of
the norm. The trained encoder of a video VAE reaches 3e5, where FP16 ends at 65,504.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from converters.shared_ranges import Range

if TYPE_CHECKING:
    import onnx

# What is larger is made smaller than this: the norm sums squares.
LARGEST = 1024.0


def scale_norms(model: "onnx.ModelProto", ranges: Mapping[str, Range], excluded: Iterable[str]) -> dict[str, Range]:
    """Puts the product in front of the Reshape of every InstanceNormalization in floating point that needs it.

    Args:
      model: edited.
      ranges: value name -> smallest and largest number.
      excluded: nodes that stay in floating point.

    Returns:
      `ranges` with those of the products.
    """
    import onnx

    kept, made = set(excluded), dict(ranges)
    producers = {name: node for node in model.graph.node for name in node.output}
    for norm in [node for node in model.graph.node if node.op_type == "InstanceNormalization" and node.name in kept]:
        reshape = producers.get(norm.input[0])
        if reshape is None or reshape.op_type != "Reshape" or reshape.name not in kept:
            continue
        value = reshape.input[0]
        largest = max(map(abs, ranges.get(value, (0.0, 0.0))))
        if largest <= LARGEST:
            continue
        c = 2.0 ** math.ceil(math.log2(largest / LARGEST))
        factor, smaller = f"{norm.output[0]}/norm_scale", f"{norm.output[0]}/scaled"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1 / c), factor))
        product = onnx.helper.make_node("Mul", [value, factor], [smaller], name=f"Mul:{smaller}")
        # The type of a value that the quantiser is to quantise has to be known.
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(smaller, onnx.TensorProto.FLOAT, None))
        model.graph.node.insert(list(model.graph.node).index(reshape), product)
        made[smaller] = tuple(limit / c for limit in ranges[value])
        reshape.input[0] = smaller
        for attribute in norm.attribute:
            if attribute.name == "epsilon":
                attribute.f /= c**2
    return made
