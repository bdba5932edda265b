"""Plans, ranges, overrides and estimate of quantisation to W8A16; `test_weight_rounding` has the weights' rounding."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters import compile_hexagon, graphs, precision_plan, qdq, qnn_quantiser, quantize, shared_ranges
from converters.precision_plan import PrecisionPlan
from nd_jax.errors import UserError, run_command
from tests import quantize_case
from tests.quantize_case import NEAREST, WIDTH, attention_block, convolutions, node, write_graph


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    return quantize_case.write_block(tmp_path_factory.mktemp("block"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return quantize_case.write_pictures(tmp_path_factory.mktemp("pictures") / "pictures.npz")


@pytest.fixture(scope="module")
def quantised(block, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "block_w8a16.onnx"
    return path, quantize.quantize_graph(*block, path, NEAREST)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_every_graph_has_a_plan_or_stays_in_fp16():
    assert set(precision_plan.PLANS) | set(precision_plan.FP16_GRAPHS) == set(graphs.GRAPHS)
    assert not set(precision_plan.PLANS) & set(precision_plan.FP16_GRAPHS)
    stages = [name for name in graphs.GRAPHS if name.startswith("mmdit")]
    assert len(stages) == 3
    for name in (*stages, "unet", "image_decoder", "vae_encoder"):
        assert precision_plan.plan_for(name).float_attention
    assert precision_plan.plan_for("mmdit_stage1_blocks6-12") == precision_plan.plan_for("mmdit_stage1")


def test_patterns_of_a_plan_may_name_nothing_and_those_of_the_caller_must():
    names = ["MatMul:context_embedder/Dense/dot_general", "Add:blocks/6/image/add"]
    plan = precision_plan.plan_for("mmdit_stage0_blocks0-6", ["*add"])
    assert precision_plan.float_nodes(plan, names) == names
    plan = precision_plan.plan_for("mmdit_stage0_blocks6-12")
    assert precision_plan.float_nodes(plan, names[1:]) == []
    with pytest.raises(UserError, match=r"'\*embedder\*' names no node"):
        precision_plan.float_nodes(precision_plan.plan_for("unet", ["*embedder*"]), names[1:])


def test_attention_core_is_what_lies_between_two_products_of_activations(block):
    model = onnx.load(str(block[0]))
    core = {"MatMul:logits", "Add:masked", "Softmax:weights", "MatMul:mixed"}
    assert precision_plan.attention_core(model) == core
    assert precision_plan.excluded_nodes(PrecisionPlan(), model) == []
    # A softmax at the end of a classifier is next to no such product.
    classifier = [node("MatMul", "x w", "logits"), node("Softmax", "logits", "y")]
    weight = numpy_helper.from_array(np.zeros((2, 2), np.float32), "w")
    model = helper.make_model(helper.make_graph(classifier, "g", [], [], [weight]))
    assert precision_plan.attention_core(model) == {"Softmax:y"}


def test_text_encoders_are_refused(block, tmp_path, capsys):
    encoder = attention_block(tmp_path / "text_encoder.onnx")
    command = ["--onnx", str(encoder), "--calibration", str(block[1]), "--output", str(tmp_path / "out.onnx")]
    assert run_command(lambda: quantize.main(command)) == 1
    assert "text_encoder stays in FP16" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
    assert run_command(lambda: quantize.main([*command, "--force"])) == 0
    assert (tmp_path / "out.onnx").exists()


# --- the quantised graph ----------------------------------------------------------------------------------------------


def constants_of(model):
    """Constant -> (dtype, number of steps, operators that read it)."""
    constants = {t.name: t for t in model.graph.initializer}
    found = {}
    for n in model.graph.node:
        if n.op_type == "DequantizeLinear" and n.input[0] in constants:
            readers = {other.op_type for other in model.graph.node if n.output[0] in other.input}
            q, scale = constants[n.input[0]], constants[n.input[1]]
            found[n.input[0]] = TensorProto.DataType.Name(q.data_type), list(scale.dims), readers
    return found


def test_weights_have_a_step_per_output_channel(quantised, pictures, tmp_path):
    found = constants_of(onnx.load(str(quantised[0])))
    for name in ("query", "key", "value", "out"):
        assert found[f"{name}/kernel_quantized"] == ("INT8", [WIDTH], {"MatMul"})
    assert found["norm/scale_quantized"] == ("UINT8", [], {"LayerNormalization"})
    quantize.quantize_graph(convolutions(tmp_path / "c.onnx"), pictures, tmp_path / "q.onnx")
    found = constants_of(onnx.load(str(tmp_path / "q.onnx")))
    assert found["a/kernel_quantized"] == ("INT8", [8], {"Conv"})
    assert found["b/kernel_quantized"] == ("INT8", [4], {"Conv"})


def test_one_step_for_all_channels_would_be_worse(block, quantised, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(qnn_quantiser, "_weight_overrides", lambda *_: {})
        worse = quantize.quantize_graph(*block, tmp_path / "per_tensor.onnx", NEAREST)
    snr = [report["snr_db"]["weights_only"]["y"] for report in (quantised[1], worse)]
    assert snr[0] > snr[1] + 4


def test_attention_core_stays_in_float(quantised):
    model = onnx.load(str(quantised[0]))
    producers = {name: n for n in model.graph.node for name in n.output}
    between = {name: producers[name] for n in model.graph.node for name in n.input if name in producers}
    for value in ("logits", "masked", "weights"):
        readers = [n for n in model.graph.node if value in n.input]
        assert [n.op_type for n in readers] == [{"logits": "Add", "masked": "Softmax", "weights": "MatMul"}[value]]
    assert between["mixed"].op_type == "MatMul"
    assert "mixed_QuantizeLinear_Output" in between


def test_a_mask_that_only_floats_read_is_an_integer_input(quantised, block):
    model = onnx.load(str(quantised[0]))
    assert {v.type.tensor_type.elem_type for v in model.graph.input} == {TensorProto.UINT16}
    encoding = qdq.encodings(model)["mask"]
    mask = np.load(block[1])["mask"]
    np.testing.assert_allclose(encoding.dequantize(encoding.quantize(mask)), mask, atol=2e-3)
    assert encoding.dequantize(encoding.quantize(np.zeros(1))) == 0


def test_block_on_the_simulator(quantised, block, tmp_path):
    report = compile_hexagon.compile_graph(quantised[0], tmp_path, "8-elite", 2, block[1], block[0])
    assert report["precision"] == "w8a16"
    assert report["simulator"]["snr_db"]["y"] == pytest.approx(quantised[1]["snr_db"]["quantised"]["y"], abs=2)
    assert compile_hexagon.faults(report, 30) == []


def test_kernels_are_multiples_of_a_step_for_each_channel(quantised, block):
    """The quantiser has seen the largest number of every channel only."""
    model = onnx.load(str(quantised[0]))
    floats = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(block[0])).graph.initializer}
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    checked = 0
    for name, weight in floats.items():
        if name.endswith("/kernel"):
            scale = np.abs(weight).max(axis=0) / np.float32(127)
            np.testing.assert_allclose(arrays[f"{name}_scale"], scale, rtol=1e-6)
            steps = np.round(weight / arrays[f"{name}_scale"])
            np.testing.assert_array_equal(arrays[f"{name}_quantized"], steps)
            checked += 1
    assert checked == 4


def test_a_constant_of_two_uses_is_no_kernel(tmp_path):
    nodes = [node("MatMul", "x c", "a"), node("MatMul", "a d", "b"), node("Add", "b c", "y")]
    constants = {"c": np.ones((4, 4), np.float32), "d": np.ones((4, 4), np.float32)}
    model = onnx.load(str(write_graph(tmp_path / "g.onnx", nodes, {"x": [4, 4]}, {"y": [4, 4]}, constants)))
    assert qnn_quantiser._kernels(model, []) == {"d"}
    assert qnn_quantiser._kernels(model, ["MatMul:b"]) == set()


def test_nodes_in_float_have_constants_of_their_own(tmp_path):
    nodes = [node("Add", "x c", "a"), node("Add", "a c", "y")]
    path = write_graph(tmp_path / "g.onnx", nodes, {"x": [4]}, {"y": [4]}, {"c": np.ones(4, np.float32)})
    model = onnx.load(str(path))
    qnn_quantiser.separate_constants(model, ["Add:y"])
    assert [list(n.input) for n in model.graph.node] == [["x", "c"], ["a", "c/float"]]
    onnx.checker.check_model(model)


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_a_clip_gives_way_to_its_limits(pictures, tmp_path):
    """The quantiser leaves it out; with a range that is half as wide again, values above 1 would come through."""
    report = quantize.quantize_graph(convolutions(tmp_path / "c.onnx"), pictures, tmp_path / "q.onnx")
    model = onnx.load(str(tmp_path / "q.onnx"))
    assert not [n for n in model.graph.node if n.op_type == "Clip"]
    assert qdq.encodings(model)["y"].scale == pytest.approx(1 / 65535)
    assert report["snr_db"]["activations_only"]["y"] > 65


def test_a_clip_stays_where_its_range_must_be_wider(pictures, tmp_path):
    source = convolutions(tmp_path / "c.onnx", concat=True)
    report = quantize.quantize_graph(source, pictures, tmp_path / "q.onnx")
    assert [n for n in onnx.load(str(tmp_path / "q.onnx")).graph.node if n.op_type == "Clip"]
    assert report["snr_db"]["activations_only"]["both"] > 55


def test_limits_of_clips(tmp_path):
    for limits, expected in (
        (("zero", "one"), (0.0, 1.0)),
        (("", "ten"), (-np.inf, 10.0)),
        (("one", ""), (0.0, np.inf)),
        (("x", "one"), None),
    ):
        model = onnx.load(str(convolutions(tmp_path / "c.onnx", limits)))
        assert shared_ranges.clip_limits(model).get("clipped") == expected


def test_overrides_set_ranges(block, tmp_path, capsys):
    command = ["--onnx", str(block[0]), "--calibration", str(block[1]), "--output", str(tmp_path / "o.onnx")]
    assert run_command(lambda: quantize.main([*command, "--override", "y=-2,6", "--override", "?=-30,30"])) == 0
    encodings = qdq.encodings(onnx.load(str(tmp_path / "o.onnx")))
    assert encodings["y"].scale == pytest.approx(60 / 65535) and encodings["x"] == encodings["y"]
    assert json.loads((tmp_path / "o.json").read_text())["overrides"] == {"y": [-2, 6], "?": [-30, 30]}
    capsys.readouterr()
    assert run_command(lambda: quantize.main([*command, "--override", "*norm/nothing=-1,1"])) == 1
    assert "'*norm/nothing' names no value of the graph, whose values are like 'x'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["y", "y=1", "y=1,2", "y=3,-3", "=-1,1", "y=-1,1,2", "y=nan,1", "y=a,b"])
def test_bad_overrides(text, capsys):
    with pytest.raises(SystemExit):
        quantize.parse(["--onnx", "a", "--calibration", "b", "--output", "c", "--override", text])
    assert "is not NAME=MIN,MAX" in capsys.readouterr().err


def test_an_override_is_for_all_that_share_the_encoding():
    model = helper.make_model(helper.make_graph([node("Transpose", "a", "b"), node("Relu", "b", "c")], "g", [], []))
    extremes = {"a": (-1.0, 1.0), "b": (-1.0, 1.0), "c": (0.0, 1.0)}
    shared = shared_ranges.share_ranges(model, extremes, {}, {"b": (-8.0, 4.0)})
    assert shared == {"a": (-8, 4), "b": (-8, 4), "c": (0, shared_ranges.HEADROOM)}


# --- estimate ---------------------------------------------------------------------------------------------------------


def test_estimate_writes_no_graph(block, quantised, tmp_path, capsys):
    command = ["--onnx", str(block[0]), "--calibration", str(block[1]), "--output", str(tmp_path / "block_q.onnx")]
    assert run_command(lambda: quantize.main([*command, "--estimate"])) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["block_q.estimate.json"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["output", "quantised", "weights", "only", "activations", "only"]
    snr = json.loads((tmp_path / "block_q.estimate.json").read_text())["snr_db"]
    assert lines[2].split() == ["y", *(f"{values['y']:.1f}" for values in snr.values())]
    assert snr["activations_only"]["y"] > snr["weights_only"]["y"] + 15
