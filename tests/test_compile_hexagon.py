"""Compilation to a Hexagon binary and its results on the HTP simulator."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from converters import compile_hexagon, export_onnx, graphs, hexagon, schematic
from nd_jax.errors import UserError, run_command
from tests.tiny_text_encoder import LENGTH, components


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx.export_loaded(graphs.text_encoder(components(), graphs.GraphOptions(length=LENGTH)), folder)
    return folder / "text_encoder.onnx"


def _one_op(path, op, inputs, shape, **attributes):
    """An ONNX file of Relu and one operator called `layer/op`."""
    info = lambda name, s: helper.make_tensor_value_info(name, TensorProto.FLOAT, s)
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="layer/relu"),
        helper.make_node(op, inputs, ["y"], name="layer/op", **attributes),
    ]
    graph = helper.make_graph(nodes, "graph", [info("x", [1, 4, 8])], [info("y", shape)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), str(path))
    return path


def test_text_encoder_on_the_simulator(exported, tmp_path):
    report = compile_hexagon.compile_graph(exported, tmp_path, "8-elite", runs=3)
    simulator = report["simulator"]
    assert simulator["snr_db"]["context"] >= 45
    assert simulator["snr_db"]["context"] < 120, "float32 accuracy: this did not run in FP16"
    assert simulator["not_finite"] == {"context": 0}
    assert simulator["outputs_differ"] == {"context": True}
    assert compile_hexagon.faults(report, 45) == []
    assert json.loads((tmp_path / "text_encoder_8-elite.json").read_text()) == report
    wrapper = onnx.load(str(tmp_path / "text_encoder_8-elite.onnx"))
    assert [node.op_type for node in wrapper.graph.node] == ["EPContext"]
    binary = tmp_path / "text_encoder_8-elite_qnn.bin"
    assert binary.stat().st_size == report["binary_bytes"] > 0
    assert len(list(tmp_path.iterdir())) == 3

    # The files that are left are complete: they run again, bit by bit the same.
    with np.load(exported.with_suffix(".inputs.npz")) as arrays:
        sample = {name: arrays[name][0] for name in arrays.files}
    again = [hexagon.run_on_simulator(tmp_path / "text_encoder_8-elite.onnx", "8-elite", [sample]) for _ in range(2)]
    np.testing.assert_array_equal(again[0].outputs[0]["context"], again[1].outputs[0]["context"])


def test_relative_paths(exported, monkeypatch):
    """The compiler runs in a folder of its own, from which a relative path leads nowhere."""
    monkeypatch.chdir(exported.parent)
    report = compile_hexagon.compile_graph("text_encoder.onnx", "relative", "8-elite", runs=1)
    assert report["simulator"]["snr_db"]["context"] >= compile_hexagon.MIN_SNR_DB["fp16"]
    assert (exported.parent / "relative" / "text_encoder_8-elite.onnx").exists()


def test_saturation_is_seen(tmp_path):
    """What FP16 cannot hold saturates without a word; the SNR shows it."""
    path = _one_op(tmp_path / "big.onnx", "Mul", ["r", "r"], [1, 4, 8])
    x = np.linspace(0, 2000, 32, dtype=np.float32).reshape(1, 4, 8)
    np.savez(tmp_path / "big.inputs.npz", x=x)
    report = compile_hexagon.compile_graph(path, tmp_path / "out", "8-gen-3", runs=1)
    assert report["simulator"]["outputs_differ"] is None
    assert any("dB, less than 45" in fault or "not finite" in fault for fault in compile_hexagon.faults(report, 45))


def test_command_fails_below_the_wanted_snr_and_keeps_the_report(exported, tmp_path, capsys):
    arguments = ["--onnx", str(exported), "--output", str(tmp_path), "--soc", "8-gen-2", "--run", "1"]
    assert run_command(lambda: compile_hexagon.main([*arguments, "--min-snr", "200"])) == 1
    assert "less than 200" in capsys.readouterr().err
    assert (tmp_path / "text_encoder_8-gen-2.json").exists()
    assert run_command(lambda: compile_hexagon.main(arguments)) == 0
    assert "simulator context" in capsys.readouterr().out


def test_operator_that_the_htp_does_not_take_is_named(tmp_path):
    path = _one_op(tmp_path / "bad.onnx", "Einsum", ["r", "r"], [1, 4], equation="bij,bij->bi")
    with pytest.raises(UserError, match=r"layer/op.*Einsum.*") as caught:
        compile_hexagon.compile_graph(path, tmp_path / "out", "8-elite")
    assert "CPU" in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_chip_lists_the_known_ones(exported, tmp_path):
    with pytest.raises(UserError, match=r"'9-elite'.*8-gen-2, 8-gen-3, x-elite, 8-elite"):
        compile_hexagon.compile_graph(exported, tmp_path / "out", "9-elite")
    assert not (tmp_path / "out").exists()


def test_killed_compiler_is_reported_with_its_signal(exported, tmp_path, monkeypatch):
    killed = lambda command, **_: subprocess.CompletedProcess(command, -9, "", "")
    monkeypatch.setattr(hexagon.subprocess, "run", killed)
    with pytest.raises(UserError, match="SIGKILL: not enough memory"):
        compile_hexagon.compile_graph(exported, tmp_path / "out", "8-elite")
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_package_and_wrong_platform(exported, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime_qnn", None)
        with pytest.raises(UserError, match="pip install onnxruntime-qnn"):
            compile_hexagon.compile_graph(exported, tmp_path, "8-elite")
    monkeypatch.setattr(hexagon.platform, "system", lambda: "Darwin")
    with pytest.raises(UserError, match="Linux x86_64 only, this is Darwin"):
        compile_hexagon.compile_graph(exported, tmp_path, "8-elite")


# --- several graphs in one binary -------------------------------------------------------------------------------------


def _products(path, rows, seed=0):
    """y = (x W) V with weights of 256 x 256 and `rows` rows: another graph on the same weights for every number."""
    rng = np.random.default_rng(seed)
    info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 256])
    weights = [
        onnx.numpy_helper.from_array((rng.standard_normal((256, 256)) / 16).astype(np.float32), name)
        for name in ("w", "v")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["r"], name="layer/first"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="layer/second"),
    ]
    graph = helper.make_graph(nodes, "graph", [info("x")], [info("y")], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), str(path))
    np.savez(path.with_suffix(".inputs.npz"), x=rng.standard_normal((1, rows, 256)).astype(np.float32))
    return path


def test_shared_binary_holds_common_weights_once(tmp_path):
    paths = [_products(tmp_path / f"{name}.onnx", rows) for name, rows in (("small", 8), ("large", 64))]
    separate = [compile_hexagon.compile_graph(path, tmp_path / "out", "8-elite") for path in paths]
    report = compile_hexagon.compile_shared(paths, tmp_path / "out", "8-elite")
    weights = 2 * 256 * 256
    assert report["weight_bytes"] == {"separate": 2 * 4 * weights, "together": 4 * weights}
    fp16 = 2 * weights
    assert min(one["binary_bytes"] for one in separate) > fp16
    assert fp16 < report["binary_bytes"] < 1.5 * fp16 < sum(one["binary_bytes"] for one in separate)
    assert report["ran"] is False and report["precision"] == "fp16" and report["onnx"] == ["small.onnx", "large.onnx"]
    assert json.loads((tmp_path / "out" / "small_8-elite_shared.json").read_text()) == report
    # Both wrappers are there, and refer to the one binary.
    binary = tmp_path / "out" / "small_8-elite_shared_qnn.bin"
    assert binary.stat().st_size == report["binary_bytes"]
    for name in ("small", "large"):
        (node,) = onnx.load(str(tmp_path / "out" / f"{name}_8-elite_shared.onnx")).graph.node
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert node.op_type == "EPContext" and attributes["ep_cache_context"] == binary.name.encode()
    assert not (tmp_path / "out" / "large_8-elite_shared_qnn.bin").exists()


def test_graphs_without_common_weights_are_refused(exported, tmp_path):
    one, other = _products(tmp_path / "one.onnx", 8), _products(tmp_path / "other.onnx", 16, seed=1)
    with pytest.raises(UserError, match=r"one\.onnx, other\.onnx: 100% of their weights differ.*--rounding nearest"):
        compile_hexagon.compile_shared([one, other], tmp_path / "out", "8-elite")
    for paths in ([one], [one, tmp_path / "elsewhere" / "one.onnx"]):
        with pytest.raises(UserError, match="give at least two, of different names"):
            compile_hexagon.compile_shared(paths, tmp_path / "out", "8-elite")
    quantised = tmp_path / "w8a16.onnx"
    model = onnx.load(str(one))
    model.graph.node[0].op_type = "DequantizeLinear"
    onnx.save(model, str(quantised))
    with pytest.raises(UserError, match=r"w8a16\.onnx is quantised and one\.onnx is not"):
        compile_hexagon.compile_shared([one, quantised], tmp_path / "out", "8-elite")
    assert not (tmp_path / "out").exists()


def test_command_takes_several_graphs_and_chips(tmp_path, capsys):
    paths = [_products(tmp_path / f"{name}.onnx", rows) for name, rows in (("small", 8), ("large", 64))]
    command = ["--onnx", *map(str, paths), "--output", str(tmp_path / "out"), "--soc", "8-elite", "8-gen-3"]
    assert run_command(lambda: compile_hexagon.main([*command, "--share", "--run", "1", "--min-snr", "40"])) == 0
    shown = capsys.readouterr().out
    assert shown.count("simulator y") == 4 and shown.count("to one binary") == 2 and shown.count("not run") == 2
    for chip in ("8-elite", "8-gen-3"):
        for name in ("small", "large"):
            report = json.loads((tmp_path / "out" / f"{name}_{chip}.json").read_text())
            assert report["simulator"]["snr_db"]["y"] > 40
        assert (tmp_path / "out" / f"small_{chip}_shared_qnn.bin").exists()
    assert run_command(lambda: compile_hexagon.main([*command, "--run", "1", "--min-snr", "200"])) == 1
    error = capsys.readouterr().err
    assert "small.onnx for 8-elite: y has" in error and "large.onnx for 8-gen-3: y has" in error
    with pytest.raises(SystemExit):
        compile_hexagon.parse([*command, "--reference", "one.onnx"])
    assert "--reference has 1 entries and --onnx 2" in capsys.readouterr().err


# --- inputs -----------------------------------------------------------------------------------------------------------

IDS = np.zeros((2, 1, LENGTH), np.int32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input_ids": IDS}, "no array 'attention_mask'"),
        ({"input_ids": IDS.astype(np.int64), "attention_mask": IDS}, "int64"),
        ({"input_ids": IDS[..., :4], "attention_mask": IDS}, r"\(2, 1, 4\)"),
        ({"input_ids": IDS[:1], "attention_mask": IDS}, "holds 1 samples, 2 are asked for"),
        (None, "not a readable .npz"),
    ],
)
def test_bad_inputs_are_named(exported, tmp_path, arrays, message):
    path = tmp_path / "inputs.npz"
    if arrays is None:
        path.write_bytes(b"not a zip file")
    else:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        compile_hexagon.compile_graph(exported, tmp_path / "out", "8-elite", runs=2, inputs=path)


def test_not_an_onnx_file(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(UserError, match=r"broken\.onnx: not an ONNX file"):
        compile_hexagon.compile_graph(path, tmp_path / "out", "8-elite", runs=1, inputs=_npz(tmp_path))


def _npz(folder):
    np.savez(folder / "any.npz", x=np.zeros(1, np.float32))
    return folder / "any.npz"


def test_faults_of_a_report():
    good = {"snr_db": {"y": 50.0}, "not_finite": {"y": 0}, "outputs_differ": {"y": True}}
    assert compile_hexagon.faults({"simulator": good}, 45) == []
    assert compile_hexagon.faults({}, 45) == []
    for change, phrase in (
        ({"snr_db": {"y": 44.9}}, "44.9 dB"),
        ({"snr_db": {"y": None}, "not_finite": {"y": 3}}, "3 values that are not finite"),
        ({"outputs_differ": {"y": False}}, "same for different inputs"),
    ):
        (fault,) = compile_hexagon.faults({"simulator": {**good, **change}}, 45)
        assert phrase in fault and fault.startswith("y ")


def test_what_is_outside_vtcm_is_counted_apart(tmp_path):
    """Bytes that a DMA moves, and those of an operator that lists its whole tensors in DRAM."""
    fields = lambda **more: "".join(f'"{name}": {value}, ' for name, value in more.items())
    path = tmp_path / "g_schematic.bin"
    lines = [
        '{"opid" : 0x1 ,' + fields(is_dma=1, dram_read=100, dram_write=0, vtcm_read=0, vtcm_write=100) + "}",
        '{"opid" : 0x2a ,' + fields(is_dma=0, dram_read=7, dram_write=3, vtcm_read=1, vtcm_write=0) + "}",
    ]
    path.write_text("\n".join(["graph", *lines, ""]))
    expected = {"dram_read_bytes": 107, "dram_write_bytes": 3, "vtcm_read_bytes": 1, "vtcm_write_bytes": 100}
    assert schematic.traffic(path) == {**expected, "outside_read_bytes": 7, "outside_write_bytes": 3, "operations": 2}
    path.write_text("nothing")
    with pytest.raises(UserError, match="lists no memory traffic"):
        schematic.traffic(path)
