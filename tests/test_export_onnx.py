"""Export of the text encoder to ONNX: operators, names, agreement with JAX, residual scale, lint, errors."""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from converters import (
    export_onnx,
    graphs,
    onnx_check,
    onnx_edit,
    onnx_gelu,
    onnx_lint,
    onnx_rewrite,
    residual_scale,
    tflite_route,
)
from converters.numerics import FP16_MAX, snr_db
from nd_jax.errors import UserError, run_command
from nd_jax.models.context_adapter import ContextAdapterConfig
from tests.tiny_text_encoder import ENCODER, LENGTH, components, write_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    write_model(root / "model")
    options = graphs.GraphOptions(length=LENGTH)
    report = export_onnx.export_graph(root / "model", "text_encoder", root / "out", options, keep_tflite=True)
    return root / "out", report


def test_native_operators_replace_the_decomposed_ones(exported):
    folder, report = exported
    model = onnx.load(str(folder / "text_encoder.onnx"), load_external_data=False)
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("RMSNormalization") == 2 * ENCODER.num_layers + 1
    assert ops.count("Softmax") == ENCODER.num_layers
    assert ops.count("Gather") == 1
    assert ops.count("Sigmoid") == ENCODER.num_layers + 2  # the GELUs of T5 and of the adapter, written out
    assert not {"Gelu", "Tanh", "Clip"} & set(ops)
    assert not set(ops) & {"GatherND", "Where", "Shape", "Exp", "Sqrt", "Reciprocal", "ReduceSum", "Less"}
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [23]
    # One product per kernel and two per attention; TFLite makes twins of some.
    assert ops.count("MatMul") == 9 * ENCODER.num_layers + 2 + 3
    # q, k, v and the result of each attention; the attention weights stay where they are.
    assert ops.count("Transpose") == 4 * ENCODER.num_layers
    assert ops.count("Reshape") == 4 * ENCODER.num_layers
    assert report["ops"]["MatMul"] == ops.count("MatMul")
    assert report["nodes"] == len(ops) < report["nodes_before_rewrite"] / 3


def test_tflite_is_the_same_without_inlining(exported, monkeypatch):
    folder, _ = exported
    graph = graphs.load_graph("text_encoder", folder.parent / "model", graphs.GraphOptions(length=LENGTH))
    ours = tflite_route.to_tflite(graph)
    inlining = importlib.import_module("tensorflow.python.framework.convert_to_constants")
    before = inlining._run_inline_graph_optimization
    monkeypatch.setattr(tflite_route, "_no_inlining", contextlib.nullcontext)
    assert tflite_route.to_tflite(graph) == ours
    assert inlining._run_inline_graph_optimization is before


def test_tf2onnx_reads_tflite_without_a_delegate(exported, monkeypatch):
    tf, made = importlib.import_module("tensorflow"), []

    class Recorded(tf.lite.Interpreter):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(tf.lite, "Interpreter", Recorded)
    tflite_route.to_onnx(exported[0] / "text_encoder.tflite")
    (interpreter,) = made
    assert "DELEGATE" not in {op["op_name"] for op in interpreter._get_ops_details()}
    assert tf.lite.Interpreter is Recorded


def test_weights_are_named_by_their_path_in_one_external_file(exported):
    folder, report = exported
    model = onnx.load(str(folder / "text_encoder.onnx"), load_external_data=False)
    large = {t.name: t for t in model.graph.initializer if np.prod(t.dims) * 4 >= 1024}
    assert {entry.value for t in large.values() for entry in t.external_data if entry.key == "location"} == {
        "text_encoder.onnx.data"
    }
    onnx.load_external_data_for_model(model, str(folder))
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    params = {name: component.params for name, component in components().items()}
    blocks = params["text_encoder_3"]["encoder"]["blocks"]
    for i in range(ENCODER.num_layers):
        got = arrays[f"encoder/blocks/{i}/attention/query/kernel"]
        np.testing.assert_array_equal(got, blocks["attention"]["query"]["kernel"][i])
    np.testing.assert_array_equal(arrays["context_adapter/out/bias"], params["context_adapter"]["out"]["bias"])
    assert arrays["encoder/position_bias"].shape == (1, ENCODER.num_heads, LENGTH, LENGTH)
    assert {path.name for path in folder.iterdir()} == {
        "text_encoder.onnx",
        "text_encoder.onnx.data",
        "text_encoder.json",
        "text_encoder.inputs.npz",
        "text_encoder.tflite",
    }
    assert json.loads((folder / "text_encoder.json").read_text()) == json.loads(json.dumps(report))


def test_node_names_say_which_layer(exported):
    folder, _ = exported
    model = onnx.load(str(folder / "text_encoder.onnx"), load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    norms = [name for name in names if name.startswith("RMSNormalization:")]
    assert any("encoder/blocks/1/" in name and "mlp_norm" in name for name in norms)
    assert not any("jit(" in name for name in names)


def test_agrees_with_jax_on_other_inputs(exported):
    folder, report = exported
    graph = graphs.text_encoder(components(), graphs.GraphOptions(length=LENGTH))
    ids = np.random.default_rng(5).integers(0, ENCODER.vocab_size, (1, LENGTH), dtype=np.int32)
    for length in (1, 7, LENGTH):
        mask = (np.arange(LENGTH)[None] < length).astype(np.int32)
        (got,) = onnx_check.run_on_cpu(folder / "text_encoder.onnx", [{"input_ids": ids, "attention_mask": mask}])
        assert snr_db(graph.reference(ids, mask)[0], got["context"]) > 100
    assert report["snr_db"]["context"] > 100


def test_batch_and_scale_change_the_graph_and_not_the_result(tmp_path):
    options = graphs.GraphOptions(batch=2, length=8, residual_scale="0.0625", gelu="native")
    report = export_onnx.export_loaded(graphs.text_encoder(components(), options), tmp_path)
    assert report["outputs"][0]["shape"] == (2, 8, 16)
    assert report["notes"]["residual_scale"] == 0.0625
    assert report["snr_db"]["context"] > 100
    model = onnx.load(str(tmp_path / "text_encoder.onnx"))
    forms = [a.s.decode() for node in model.graph.node if node.op_type == "Gelu" for a in node.attribute]
    assert sorted(forms) == ["none"] * 2 + ["tanh"] * 2
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    epsilon = next(a.f for a in norm.attribute if a.name == "epsilon")
    assert epsilon == pytest.approx(ENCODER.layer_norm_epsilon / 256, rel=1e-5)


# --- residual scale ---------------------------------------------------------------------------------------------------


@functools.cache
def _stream_and_output(exponent):
    scale = 2.0**exponent
    graph = graphs.text_encoder(components(), graphs.GraphOptions(length=8, residual_scale=str(scale)))
    inputs = list(graph.sample(np.random.default_rng(1)).values())
    config = dataclasses.replace(ENCODER, layer_norm_epsilon=ENCODER.layer_norm_epsilon * scale**2)
    stream = graphs.encode(graph.params["encoder"], *inputs, config)
    return [np.asarray(h) for h in stream], np.asarray(graph.apply(graph.params, *inputs)[0])


@settings(max_examples=8)
@given(st.integers(-10, 4))
def test_scale_leaves_the_output_and_shrinks_the_stream(exponent):
    reference_stream, reference = _stream_and_output(0)
    stream, output = _stream_and_output(exponent)
    np.testing.assert_allclose(output, reference, rtol=1e-5, atol=1e-6)
    assert snr_db(reference, output) > 120
    for before, after in zip(reference_stream, stream, strict=True):
        assert snr_db(before * 2.0**exponent, after) > 120


def test_auto_scale_brings_a_large_stream_into_fp16():
    graph = graphs.text_encoder(components(1e5), graphs.GraphOptions(length=8))
    scale, peak = graph.notes["residual_scale"], graph.notes["residual_peak"]
    assert peak > FP16_MAX
    assert np.log2(scale) == int(np.log2(scale))
    assert FP16_MAX / 8 < peak * scale <= FP16_MAX / 4
    assert graphs.text_encoder(components(), graphs.GraphOptions(length=8)).notes["residual_scale"] == 1.0


@pytest.mark.parametrize("option", ["0.3", "-1", "0", "large", "inf", "nan"])
def test_scale_must_be_a_power_of_two(option):
    with pytest.raises(UserError, match="power of two"):
        residual_scale.choose(option, lambda: 1.0)


def test_broken_weights_are_no_reason_for_a_scale():
    with pytest.raises(UserError, match="nan"):
        residual_scale.choose("auto", lambda: float("nan"))


def test_overflow_is_an_error_that_names_value_and_remedy_and_leaves_nothing(tmp_path):
    graph = graphs.text_encoder(components(2e4), graphs.GraphOptions(length=8, residual_scale="none"))
    with pytest.raises(UserError, match=r"pass FP16's 65504.*encoder/blocks/.*--residual-scale auto"):
        export_onnx.export_loaded(graph, tmp_path)
    assert list(tmp_path.iterdir()) == []
    report = export_onnx.export_loaded(graph, tmp_path, allow_overflow=True)
    assert report["beyond_fp16"]


# --- rewrites on graphs that are almost the pattern -------------------------------------------------------------------


def _model(nodes, inputs, outputs, constants=(), opset=18):
    """ir.Model of (op, inputs, output, attributes) tuples; inputs and outputs are {name: (dtype, shape)}."""
    info = lambda values: [helper.make_tensor_value_info(name, *spec) for name, spec in values.items()]
    graph = helper.make_graph(
        [helper.make_node(op, ins, [out], name=f"layer/{out}", **attrs) for op, ins, out, attrs in nodes],
        "graph",
        info(inputs),
        info(outputs),
        [numpy_helper.from_array(np.asarray(array), name) for name, array in dict(constants).items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]))


FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
X = {"x": (FLOAT, [2, 8])}
Y = {"y": (FLOAT, [2, 8])}
SOFTMAX = [
    ("ReduceMax", ["x", "axes"], "top", {"keepdims": 1}),
    ("Sub", ["x", "top"], "shifted", {}),
    ("Exp", ["shifted"], "e", {}),
    ("ReduceSum", ["e", "axes"], "total", {"keepdims": 1}),
    ("Div", ["e", "total"], "y", {}),
]


@pytest.mark.parametrize(("axis", "restored"), [(-1, 1), (1, 1), (0, 0)])
def test_softmax_is_restored_over_the_last_axis_only(axis, restored):
    model = _model(SOFTMAX, X, Y, {"axes": np.array([axis])})
    assert onnx_rewrite.restore_native(model)["restore_softmax"] == restored
    assert onnx_edit.op_counts(model).get("Softmax", 0) == restored


def _gelu(slope):
    nodes = [
        ("Mul", ["x", "x"], "square", {}),
        ("Mul", ["square", "x"], "cube", {}),
        ("Mul", ["cube", "c"], "cubic", {}),
        ("Add", ["x", "cubic"], "sum", {}),
        ("Mul", ["sum", "slope"], "inner", {}),
        ("Tanh", ["inner"], "tanh", {}),
        ("Add", ["tanh", "one"], "shifted", {}),
        ("Mul", ["x", "half"], "halved", {}),
        ("Mul", ["halved", "shifted"], "y", {}),
    ]
    constants = {"c": 0.044715, "slope": slope, "one": 1.0, "half": 0.5}
    return _model(nodes, X, Y, {name: np.float32(value) for name, value in constants.items()})


def test_gelu_is_recognised_by_its_values():
    model = _gelu((2 / np.pi) ** 0.5)
    onnx_rewrite.restore_native(model)
    assert onnx_edit.op_counts(model) == {"Gelu": 1}
    almost = _gelu(0.8)  # 0.7979 would be right
    onnx_rewrite.restore_native(almost)
    assert "Gelu" not in onnx_edit.op_counts(almost)


def _normal_gelu(x):
    return x * np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x.ravel()]).reshape(x.shape)


def _tanh_gelu(x):
    return x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize(
    ("form", "function", "error"), [("tanh", _tanh_gelu, 1e-6), ("none", _normal_gelu, 3.5e-6)], ids=["tanh", "none"]
)
def test_written_out_gelu_is_right_also_where_its_inner_values_leave_fp16(tmp_path, form, function, error):
    sizes = {"dtype": FLOAT, "shape": [2, 8001]}
    model = _model([("Gelu", ["x"], "y", {"approximate": form})], {"x": (*sizes.values(),)}, {"y": (*sizes.values(),)})
    model.opset_imports[""], model.ir_version = onnx_rewrite.OPSET, onnx_rewrite.IR_VERSION
    model.graph.node(-1).outputs[0].name = "jit(f)/mlp/mul;jit(f)/mlp/add"
    assert onnx_gelu.expand_gelu(model) == 1
    onnx_rewrite.readable_names(model, ())
    path = tmp_path / "gelu.onnx"
    ir.save(model, path)
    x = np.linspace(-8, 8, 8001, dtype=np.float32) * np.array([[1], [4e3]], np.float32)
    (result,) = onnx_check.run_on_cpu(path, [{"x": x}])
    np.testing.assert_allclose(next(iter(result.values())), function(x.astype(np.float64)), rtol=1e-6, atol=error)
    beyond = onnx_check.beyond_fp16(onnx_check.value_ranges(path, [{"x": x}]))
    assert len(beyond) >= 4 and all(map(onnx_gelu.may_saturate, beyond))
    assert not onnx_gelu.may_saturate("mlp/mul") and not onnx_gelu.may_saturate("gelu/square/mul")


@pytest.mark.parametrize(("offset", "source"), [(0, "ids"), (1, "moved")])
def test_gather_reads_what_the_indices_are_equal_to(offset, source):
    nodes = [
        ("Add", ["ids", "offset"], "moved", {}),
        ("Reshape", ["moved", "shape"], "column", {}),
        ("Cast", ["column"], "index", {"to": INT64}),
        ("GatherND", ["table", "index"], "y", {}),
    ]
    constants = {
        "offset": np.array(offset, np.int32),
        "shape": np.array([1, 4, 1]),
        "table": np.ones((10, 8), np.float32),
    }
    model = _model(nodes, {"ids": (INT32, [1, 4])}, {"y": (FLOAT, [1, 4, 8])}, constants)
    onnx_rewrite.restore_native(model)
    (gather,) = [node for node in model.graph if node.op_type == "Gather"]
    assert [value.name for value in gather.inputs] == ["table", source]


# --- lint -------------------------------------------------------------------------------------------------------------


def _lint(nodes, inputs=X, outputs=Y, constants=(), opset=23):
    with pytest.raises(UserError) as caught:
        onnx_lint.check(_model(nodes, inputs, outputs, constants, opset), "graph bad")
    return str(caught.value)


@pytest.mark.parametrize("op", ["Exp", "Erf", "Sqrt", "Sin", "Sign"])
def test_lint_names_the_node_and_the_reason(op):
    message = _lint([("Relu", ["x"], "r", {}), (op, ["r"], "y", {})])
    assert "'layer/y'" in message and op in message and "layer/r" not in message
    if op in onnx_lint.REASONS:
        assert onnx_lint.REASONS[op] in message


def test_lint_takes_static_shapes_of_rank_four_only():
    five = {"x": (FLOAT, [1, 1, 1, 2, 8])}
    assert "rank 5" in _lint([("Relu", ["x"], "y", {})], five, {"y": (FLOAT, [1, 1, 1, 2, 8])})
    assert "not static" in _lint([("Relu", ["x"], "y", {})], {"x": (FLOAT, ["n", 8])}, {"y": (FLOAT, ["n", 8])})


def test_lint_takes_int32_indices_only():
    table = {"table": np.ones((10, 8), np.float32)}
    ids = {"ids": (INT64, [2])}
    message = _lint([("Gather", ["table", "ids"], "y", {"axis": 0})], ids, Y, table)
    assert "'layer/y'" in message and "INT64" in message


@pytest.mark.parametrize("value", [1e6, np.inf, np.nan])
def test_lint_takes_constants_within_fp16_only(value):
    constants = {"w": np.array([1.0] * 7 + [value], np.float32)}
    assert "constant 'w'" in _lint([("Add", ["x", "w"], "y", {})], constants=constants)


def test_lint_wants_the_opset_with_native_operators():
    assert "opset 18" in _lint([("Relu", ["x"], "y", {})], opset=18)
    onnx_lint.check(_model([("Relu", ["x"], "y", {})], X, Y, opset=23), "graph good")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_missing_package_names_the_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(UserError, match="pip install tf2onnx"):
        export_onnx.export_graph(tmp_path, "text_encoder", tmp_path / "out")


def test_components_must_fit():
    mismatched = components(adapter=ContextAdapterConfig(input_dims=20, layer_depths=(20,), skips=(True,)))
    with pytest.raises(UserError, match="width 24 and context_adapter takes 20"):
        graphs.text_encoder(mismatched, graphs.GraphOptions())
    swapped = dict(zip(("context_adapter", "text_encoder_3"), components().values(), strict=True))
    with pytest.raises(UserError, match="needs a distil_t5"):
        graphs.text_encoder(swapped, graphs.GraphOptions())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--graph", "decoder"], "'decoder'"),
        (["--graph", "text_encoder"], "config.json"),
        (["--graph", "text_encoder", "--length", "0"], "--length 0"),
    ],
)
def test_command_reports_bad_input_in_one_line(arguments, message, tmp_path, capsys):
    paths = ["--model", str(tmp_path), "--output", str(tmp_path / "out")]
    assert run_command(lambda: export_onnx.main([*paths, *arguments])) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()
