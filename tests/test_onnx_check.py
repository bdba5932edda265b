"""Ranges of the values inside a graph, and the memory that it takes to compute them."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from converters import onnx_check

STEPS = 24
MEMORY = """
import json, sys
import numpy as np
from pathlib import Path
from converters import onnx_check
from converters.peak_memory import peak_bytes
path, size = Path(sys.argv[1]), int(sys.argv[2])
onnx_check.value_extremes(path, [{"x": np.zeros(1, np.float32)}])
before = peak_bytes()
onnx_check.value_extremes(path, [{"x": np.zeros(size, np.float32)}])
print(json.dumps((peak_bytes() - before) / (4 * size)))
"""


@pytest.fixture
def graph(tmp_path):
    """x -> -x -> |x| - 1 -> ..., a chain of values that are all of the size of the input."""
    nodes, value = [], "x"
    for k in range(STEPS):
        result = f"v{k}"
        nodes.append(helper.make_node(("Neg", "Abs", "Tanh")[k % 3], [value], [result], name=result))
        value = result
    float32 = TensorProto.FLOAT
    ends = ([helper.make_tensor_value_info(name, float32, ["n"])] for name in ("x", value))
    model = helper.make_model(helper.make_graph(nodes, "g", *ends), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, tmp_path / "chain.onnx")
    return tmp_path / "chain.onnx"


def test_extremes_of_every_value(graph):
    samples = [{"x": np.float32([-3, 1])}, {"x": np.float32([0.5, 2])}]
    extremes = onnx_check.value_extremes(graph, samples)
    assert list(extremes) == ["x", *(f"v{k}" for k in range(STEPS))]
    assert extremes["x"] == (-3, 2) and extremes["v0"] == (-2, 3) and extremes["v1"] == (0.5, 3)
    assert extremes["v2"] == pytest.approx((np.tanh(0.5), np.tanh(3)))
    assert list(graph.parent.iterdir()) == [graph]


def test_values_are_reduced_as_they_are_made(graph):
    size = 4_000_000
    child = [sys.executable, "-c", MEMORY, str(graph), str(size)]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    # The input and two values; all 24 of them in the order in which they are made.
    assert 1 < json.loads(done.stdout) < 6
