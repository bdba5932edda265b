"""`experiments.compare_routes`: rows of one graph, what a route's failure leaves, the table, and going on."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from converters import export_onnx, graphs, jax2onnx_route, onnx_check, onnx_edit, tflite_route
from converters.apart import apart
from experiments import compare_routes
from experiments.random_model import random_params
from nd_jax.errors import UserError, run_command
from nd_jax.models.quicksrnet import QuickSRNetConfig
from nd_jax.weights import networks
from nd_jax.weights.folder import save_component

CONFIG = QuickSRNetConfig(2, num_channels=8, num_intermediate_layers=1)
OPTIONS = graphs.GraphOptions(height=6, width=10)
REFUSED = (
    "x.onnx for 8-elite: the HTP does not take these nodes, and falling back to the CPU is refused: "
    "{ name: a/b, type: Einsum }{ name: c, type: ReduceSumSquare }{ name: d, type: Einsum }{ name: e, type: Ein; say"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    params = random_params(networks.QUICKSRNET, CONFIG, np.random.default_rng(0), np.float32)
    save_component(folder / "quicksrnet", networks.QUICKSRNET, CONFIG, params)
    (folder / "generation.json").write_text('{"height": 16, "width": 24}')
    return folder


@pytest.fixture(scope="module")
def case(model, tmp_path_factory):
    return compare_routes.load_case(model, "quicksrnet", OPTIONS, "8-elite", 1, 0, tmp_path_factory.mktemp("case"))


def row(**changes):
    """A row that ran."""
    numbers = dict(nodes=10, transposes=2, dram_read_bytes=2e6, dram_write_bytes=1e6, snr_db=[60.0, 62.0, 58.0])
    costs = dict(cpu_snr_db=120.0, compile_cpu_seconds=0.25, failed=None)
    return {**numbers, **costs, **changes}


# --- the command ------------------------------------------------------------------------------------------------------


def here(what, function, *arguments):
    """In place of `apart`: a process of its own knows nothing of what a test replaces."""
    return function(*arguments)


def test_rows_of_a_graph_and_going_on(model, tmp_path, capsys, monkeypatch):
    # What holds weights is not called here: the compiler needs the memory.
    for module, name in (
        (graphs, "load_graph"),
        (tflite_route, "trace"),
        (export_onnx, "convert"),
        (onnx_check, "run_on_cpu"),
    ):
        monkeypatch.delattr(module, name)
    command = ["--model", str(model), "--output", str(tmp_path), "--samples", "1"]
    assert run_command(lambda: compare_routes.main(command)) == 0
    shown = capsys.readouterr().out
    assert shown.count("| `quicksrnet` |") == 3 and "| `quicksrnet` | jax2onnx | not run |" in shown
    assert "our route is best or equal" in shown
    report = json.loads((tmp_path / "routes.json").read_text())
    rows = report["graphs"]["quicksrnet"]
    assert list(rows) == ["ours", "tf2onnx"]
    for found in rows.values():
        assert found["failed"] is None
        assert found["cpu_snr_db"] > 100
        assert len(found["snr_db"]) == 1 and 45 < found["snr_db"][0] < 100
        # The picture that comes in.
        assert found["dram_read_bytes"] >= 4 * 16 * 24 * 3
        assert found["dram_write_bytes"] > 0
    assert rows["ours"]["nodes"] < rows["tf2onnx"]["nodes"] == sum(rows["tf2onnx"]["ops"].values())
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"routes.json"}

    # Called again it measures what is missing, and nothing else.
    del report["graphs"]["quicksrnet"]["tf2onnx"]
    (tmp_path / "routes.json").write_text(json.dumps(report))
    measured = []

    def instead(case, route, folder, python):
        measured.append(route)
        return row(nodes=3)

    monkeypatch.setattr(compare_routes, "measure", instead)
    for _ in range(2):
        assert run_command(lambda: compare_routes.main([*command, "--jax2onnx", "python"])) == 0
    assert measured == ["tf2onnx", "jax2onnx"]
    weights = next((model / "quicksrnet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())
    assert run_command(lambda: compare_routes.main(command)) == 0
    assert measured[2:] == ["ours", "tf2onnx"]
    assert "quicksrnet: nodes: 9, jax2onnx 3" in capsys.readouterr().out
    assert run_command(lambda: compare_routes.main([*command, "--seed", "1"])) == 1
    assert "was made with seed 0 instead of 1" in capsys.readouterr().err


def test_a_graph_that_does_not_load_ends_the_command(model, tmp_path, capsys):
    command = ["--model", str(model), "--output", str(tmp_path), "--graphs", "vae_encoder", "--samples", "0"]
    assert run_command(lambda: compare_routes.main(command)) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and "causal_video_vae" in shown.err and "Traceback" not in shown.err
    assert not (tmp_path / "routes.json").exists()


def test_a_route_that_cannot_convert_is_a_row(case, tmp_path):
    """From its process the message arrives as it is."""
    found = compare_routes.measure(case, "jax2onnx", tmp_path, tmp_path / "none")
    assert found["failed"] == "export"
    assert found["reason"].startswith(f"{tmp_path / 'none'}: cannot be run (No such file or directory)")


def test_a_process_that_is_killed():
    with pytest.raises(UserError, match="graph unet by ours: its process was killed"):
        apart("graph unet by ours", signal.raise_signal, signal.SIGKILL)
    assert apart("getpid", os.getpid) != os.getpid()


def test_samples_on_their_way(tmp_path):
    samples = [{"ids": np.full((1, 3), i, np.int32), "a/b": np.float32([[i, -0.0]])} for i in range(2)]
    compare_routes.write_stack(tmp_path / "inputs.npz", samples)
    found = compare_routes.read_stack(tmp_path / "inputs.npz")
    assert [list(sample) for sample in found] == [["ids", "a/b"]] * 2
    for one, other in zip(samples, found, strict=True):
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "-1"], "--samples -1"),
        (["--graphs", "quicksrnet,frog"], "--graphs frog: choose among quicksrnet"),
        (["--soc", "9-elite"], "chip '9-elite' is not known"),
    ],
)
def test_bad_arguments(arguments, message, model, tmp_path, capsys):
    command = ["--model", str(model), "--output", str(tmp_path), *arguments]
    assert run_command(lambda: compare_routes.main(command)) == 1
    assert message in capsys.readouterr().err
    missing = ["--model", str(tmp_path / "none"), "--output", str(tmp_path)]
    assert run_command(lambda: compare_routes.main(missing)) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_continued(tmp_path):
    (tmp_path / "routes.json").write_text("[]")
    with pytest.raises(UserError, match="not a result of this command"):
        compare_routes.read_rows(tmp_path / "routes.json", {})


# --- rows -------------------------------------------------------------------------------------------------------------


def test_what_the_htp_refuses_is_a_row(case, tmp_path, monkeypatch):
    """The nearest enlargement as an Einsum, which the HTP does not take."""

    def write(case, route, folder, python):
        shapes = [[1, 6, 10, 3], [1, 12, 20, 3]]
        info = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip(("frame", "large_frame"), shapes, strict=True)
        ]
        repeat = lambda n: np.repeat(np.eye(n, dtype=np.float32), 2, axis=1)
        rows, columns = (onnx.numpy_helper.from_array(repeat(n), name) for n, name in ((6, "rows"), (10, "columns")))
        nodes = [
            helper.make_node("Relu", ["frame"], ["same"], name="relu"),
            helper.make_node(
                "Einsum", ["same", "rows", "columns"], ["large_frame"], name="up", equation="bhwc,hi,wj->bijc"
            ),
        ]
        graph = helper.make_graph(nodes, "graph", info[:1], info[1:], [rows, columns])
        opset = [helper.make_opsetid("", 23)]
        folder.mkdir()
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=11), str(folder / "quicksrnet.onnx"))
        return folder / "quicksrnet.onnx", 0.0

    monkeypatch.setattr(compare_routes, "apart", here)
    monkeypatch.setattr(compare_routes, "write_onnx", write)
    found = compare_routes.measure(case, "jax2onnx", tmp_path / "out", None)
    assert (found["failed"], found["nodes"], found["refused"]) == ("compile", 2, ["Einsum"])
    assert found["cpu_snr_db"] < 60
    assert "| 2 (0) |" in compare_routes.table({"g": {"jax2onnx": found}})
    assert "refused: Einsum" in compare_routes.table({"g": {"jax2onnx": found}})


@pytest.mark.parametrize(
    ("equation", "count"),
    [
        ("blhk,bshk->bhls", 2),  # q k^T: heads before tokens, in both
        ("bhls, bshk -> blhk", 2),  # p v: in v, and back
        ("bhlk,bhks->bhls", 0),
        ("bhks,bhlk->bhls", 0),  # the second operand may be the first
        ("bqc,bkc->bqk", 1),
        ("abc,cd->abd", 0),
        ("abc,cd->adb", 1),
        ("lhbk,shbk->bhls", 2),
        ("ab,cd->abcd", 0),
        ("ab->ba", 0),  # no product of two tensors
        ("ab,bc,cd->ad", 0),
        ("abc,cd->ad", 0),
    ],
)
def test_transposes_that_an_einsum_holds(equation, count):
    assert onnx_edit.einsum_transposes(equation) == count


def test_operators_are_found_in_the_compilers_message():
    assert compare_routes.refused_operators(REFUSED) == ["Einsum", "ReduceSumSquare"]
    assert compare_routes.refused_operators("killed by signal SIGSEGV") == []


def test_where_ours_is_behind():
    ours, refused = row(), row(transposes=0, failed="compile")
    for name in ("dram_read_bytes", "dram_write_bytes", "snr_db"):
        del refused[name]
    assert compare_routes.behind({"ours": ours, "tf2onnx": row(nodes=11, dram_read_bytes=1_996_000)}) == []
    assert compare_routes.behind({"ours": ours, "jax2onnx": refused}) == [
        "transposes: 2, jax2onnx 0, which the HTP does not run"
    ]
    # 1 dB better on average, but not on every input: no difference. 0.9 to 1.1 dB better: one.
    assert compare_routes.behind({"ours": ours, "tf2onnx": row(snr_db=[64.0, 61.0, 58.0])}) == []
    better = row(dram_read_bytes=1.9e6, snr_db=[61.1, 63.0, 58.9])
    assert compare_routes.behind({"ours": ours, "tf2onnx": better}) == [
        "bytes read: 2.00 MB, tf2onnx 1.90 MB",
        "SNR: tf2onnx 1.0 +- 0.1 dB above ours",
    ]
    broken = {"failed": "export", "reason": "no such operator"}
    assert "nodes: none, tf2onnx 10" in compare_routes.behind({"ours": broken, "tf2onnx": row()})


def test_difference_of_snrs():
    assert compare_routes.snr_difference(row(), row(snr_db=[None, 62.0, 58.0])) == (-20.0, pytest.approx(20.0))
    assert compare_routes.snr_difference(row(snr_db=[50.0]), row(snr_db=[49.0])) == (-1.0, 0.0)
    assert compare_routes.snr_difference(row(snr_db=[]), row()) is None
    assert compare_routes.snr_difference(row(), {"failed": "compile"}) is None


def test_table():
    compiled = {name: value for name, value in row().items() if not name.endswith("snr_db")}
    assert compare_routes._cells(compiled) == ["10 (2)", "not run", "0.2", "2.00 MB", "1.00 MB", "not run"]
    rows = {"ours": row(), "tf2onnx": row(snr_db=[None]), "jax2onnx": {"failed": "export", "reason": "no gather"}}
    assert compare_routes.table({"unet": rows}).splitlines()[2:] == [
        "| `unet` | ours | 10 (2) | 120.0 dB | 0.2 | 2.00 MB | 1.00 MB | 60.0 dB, lowest 58.0 dB |",
        "| `unet` | tf2onnx | 10 (2) | 120.0 dB | 0.2 | 2.00 MB | 1.00 MB | not finite |",
        "| `unet` | jax2onnx | not exported: no gather |  |  |  |  |  |",
    ]


# --- jax2onnx ---------------------------------------------------------------------------------------------------------


def test_the_other_environment_gets_the_graph_and_its_options(model, tmp_path):
    """A stand-in for its python writes down what it was asked for."""
    asked, output = tmp_path / "asked.json", tmp_path / "out" / "quicksrnet.onnx"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncp "$3" {asked}\nprintf "%s\\n" "$2" "$PYTHONPATH" > {asked}.text\n')
    python.chmod(0o755)
    seconds = jax2onnx_route.export(python, model, "quicksrnet", OPTIONS, output)
    assert 0 < seconds < 60
    request = json.loads(asked.read_text())
    assert (request["graph"], request["output"]) == ("quicksrnet", str(output))
    assert graphs.GraphOptions(**request["options"]) == OPTIONS
    module, root = Path(f"{asked}.text").read_text().splitlines()
    assert module == "converters.jax2onnx_route" and (Path(root) / "converters" / "jax2onnx_route.py").is_file()


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo \"ModuleNotFoundError: No module named 'jax2onnx'\" >&2; exit 1", "-m pip install jax2onnx=="),
        ("echo 'No plugin for scatter' >&2; exit 1", "graph unet: jax2onnx cannot convert it: No plugin for scatter"),
        ("kill -9 $$", "exit status -9"),
    ],
)
def test_failures_of_the_other_environment(script, message, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    with pytest.raises(UserError) as error:
        jax2onnx_route.export(python, tmp_path, "unet", OPTIONS, tmp_path / "unet.onnx")
    assert message in str(error.value)
    with pytest.raises(UserError, match="cannot be run"):
        jax2onnx_route.export(tmp_path / "none", tmp_path, "unet", OPTIONS, tmp_path / "unet.onnx")


def test_jax2onnx_traces_the_same_function(model, case, monkeypatch):
    """`to_onnx` is replaced by one that keeps what it is given: the suite's environment does not hold jax2onnx."""
    given = {}
    to_onnx = lambda function, **settings: given.update(settings, function=function)
    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=to_onnx))
    jax2onnx_route.convert(graphs.load_graph("quicksrnet", model, OPTIONS))
    assert (given["input_names"], given["output_names"]) == (["frame"], ["large_frame"])
    assert [(x.shape, x.dtype) for x in given["inputs"]] == [((1, 6, 10, 3), np.dtype(np.float32))]
    (inputs,), (references,) = map(compare_routes.read_stack, (case.inputs, case.references))
    (large,) = given["function"](inputs["frame"])
    np.testing.assert_allclose(large, references["large_frame"], atol=1e-6)


def test_importing_the_graphs_needs_no_converter():
    """The other environment has neither TensorFlow nor tf2onnx nor onnxruntime-qnn."""
    code = "import sys, converters.jax2onnx_route; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"tensorflow", "tf2onnx", "onnxruntime_qnn", "onnxscript", "torch", "transformers"} & set(loaded)
