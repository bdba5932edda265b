"""Small ONNX graphs and samples for tests of quantisation."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from converters.precision_plan import PrecisionPlan

TOKENS, WIDTH = 12, 16
NEAREST = PrecisionPlan(float_attention=True)


def write_graph(path, nodes, inputs, outputs, constants):
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        nodes,
        "graph",
        [value(*item) for item in inputs.items()],
        [value(*item) for item in outputs.items()],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), str(path))
    return path


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), [output], name=f"{op}:{output}", **attributes)


def attention_block(path):
    """A block as the stage graphs have it; rows of its weights differ in size by 30, as those of trained ones may."""
    rng = np.random.default_rng(0)
    dense = lambda: (rng.standard_normal((WIDTH, WIDTH)) / 4 * np.geomspace(0.1, 3, WIDTH)).astype(np.float32)
    constants = {f"{name}/kernel": dense() for name in ("query", "key", "value", "out")}
    constants |= {"out/bias": rng.standard_normal(WIDTH).astype(np.float32), "norm/scale": np.ones(WIDTH, np.float32)}
    constants |= {"query/scale": np.float32(0.1)}
    nodes = [
        node("LayerNormalization", "x norm/scale", "normed"),
        *(node("MatMul", f"normed {name}/kernel", name) for name in ("query", "key", "value")),
        node("Mul", "query query/scale", "scaled"),
        node("Transpose", "key", "turned", perm=[0, 2, 1]),
        node("MatMul", "scaled turned", "logits"),
        node("Add", "logits mask", "masked"),
        node("Softmax", "masked", "weights", axis=-1),
        node("MatMul", "weights value", "mixed"),
        node("MatMul", "mixed out/kernel", "projected"),
        node("Add", "projected out/bias", "branch"),
        node("Add", "branch x", "y"),
    ]
    ends = {"x": [1, TOKENS, WIDTH], "mask": [1, TOKENS, TOKENS]}
    return write_graph(path, nodes, ends, {"y": ends["x"]}, constants)


def block_samples(path, count, seed=0):
    """Tokens whose channels are far from independent."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).standard_normal((4, WIDTH))
    x = rng.standard_normal((count, 1, TOKENS, 4)) @ mix + 0.2 * rng.standard_normal((count, 1, TOKENS, WIDTH))
    mask = np.where(np.arange(TOKENS) < TOKENS - 2, 0.0, -100.0) * np.ones((count, 1, TOKENS, 1))
    np.savez(path, x=x.astype(np.float32), mask=mask.astype(np.float32))
    return path


def write_block(folder):
    """(graph, samples)."""
    return attention_block(folder / "block.onnx"), block_samples(folder / "block.inputs.npz", 8)


def convolutions(path, limits=("zero", "one"), concat=False):
    """Two convolutions, the first with a stride, and a Clip that cuts off much of what they make."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: (rng.standard_normal(shape) / 3).astype(np.float32)
    constants = {"a/kernel": draw(8, 3, 3, 3), "a/bias": draw(8), "b/kernel": draw(4, 8, 3, 3)}
    constants |= {"zero": np.float32(0), "one": np.float32(1), "ten": np.float32(10)}
    nodes = [
        node("Conv", "x a/kernel a/bias", "a", strides=[2, 1], pads=[1, 0, 1, 2]),
        node("Conv", "a b/kernel", "b", pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["b", *limits], ["clipped"], name="Clip:clipped"),
        node("Mul", "b ten", "wide"),
        node("Concat", "clipped wide", "both", axis=1),
        node("DepthToSpace", "clipped", "y", blocksize=2),
    ]
    size = [1, 8, 4, 8] if concat else [1, 1, 8, 16]
    nodes = [n for n in nodes if n.op_type not in (("DepthToSpace",) if concat else ("Mul", "Concat"))]
    return write_graph(path, nodes, {"x": [1, 3, 8, 8]}, {"both" if concat else "y": size}, constants)


def write_pictures(path):
    """Smooth ones."""
    rng = np.random.default_rng(0)
    np.savez(path, x=np.cumsum(rng.standard_normal((24, 1, 3, 8, 8)), axis=-1).astype(np.float32))
    return path


def passing_chain(path, width=6, layers=4):
    """Convolutions that pass their input on and add a little, each with a Clip to [0, 1] behind it."""
    rng, constants, nodes, value = np.random.default_rng(2), {"zero": np.float32(0), "one": np.float32(1)}, [], "x"
    for i in range(layers):
        kernel = 0.02 * rng.standard_normal((width, width, 3, 3))
        kernel[np.arange(width), np.arange(width), 1, 1] += 1
        constants |= {f"{i}/kernel": kernel.astype(np.float32), f"{i}/bias": np.zeros(width, np.float32)}
        out = "y" if i == layers - 1 else f"clipped{i}"
        nodes += [node("Conv", f"{value} {i}/kernel {i}/bias", f"conv{i}", pads=[1, 1, 1, 1])]
        nodes += [node("Clip", f"conv{i} zero one", out)]
        value = out
    return write_graph(path, nodes, {"x": [1, width, 8, 8]}, {"y": [1, width, 8, 8]}, constants)


def flat_pictures(path, seed):
    """Surfaces with an edge, in colours of their own."""
    rng = np.random.default_rng(seed)
    colours = rng.uniform(0.1, 0.9, (24, 2, 1, 6, 1, 1))
    inside = (np.arange(8) >= rng.integers(2, 7, (24, 1))).reshape(24, 1, 1, 1, 8)
    x = np.where(inside, colours[:, 0], colours[:, 1]) + 0.02 * rng.standard_normal((24, 1, 6, 8, 8))
    np.savez(path, x=np.clip(x, 0, 1).astype(np.float32))
    return path
