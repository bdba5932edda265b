"""Parts of a graph: run in a chain, joined to one graph, and measured by experiments.mmdit_device."""

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from converters import chain, hexagon, mmdit_graph, onnx_check, qdq
from converters.graph import TRANSFORMER
from converters.numerics import snr_db
from experiments import mmdit_device
from nd_jax.errors import UserError, run_command

# --- a small network in parts -----------------------------------------------------------------------------------------
# image, text -> image + scale * text, 2 * text; three times, and the last one gives the sum of both.


def _part(number, last):
    info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])
    first = number == 0
    image, text = ("tokens", "context") if first else ("image", "text")
    nodes = [
        helper.make_node("Mul", [text, "scale"], ["product"], name="mul"),
        helper.make_node("Add", [image, "product"], ["velocity" if last else "image_out"], name="add"),
    ]
    if not last:
        nodes.append(helper.make_node("Mul", [text, "two"], ["text_out"], name="double"))
    inputs = [info(image), info(text), info("scale")]
    outputs = [info("velocity")] if last else [info("image_out"), info("text_out")]
    constants = [] if last else [onnx.numpy_helper.from_array(np.full(4, 2 + number, np.float32), "two")]
    graph = helper.make_graph(nodes, f"part{number}", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


NAMES = ["net_blocks0-6", "net_blocks6-12", "net_blocks12-18"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(folder, {name: {"inputs": ...}})."""
    folder = tmp_path_factory.mktemp("parts")
    models = {name: _part(number, last=name == NAMES[-1]) for number, name in enumerate(NAMES)}
    for name, model in models.items():
        onnx.save(model, str(folder / f"{name}.onnx"))
    return folder, {
        name: {"inputs": [{"name": value.name} for value in model.graph.input]} for name, model in models.items()
    }


def open_in(folder):
    """Name -> call of a graph on the CPU, which takes its own inputs and no others."""
    return lambda name: lambda inputs: onnx_check.run_on_cpu(folder / f"{name}.onnx", [inputs])[0]


SAMPLE = {name: np.arange(4, dtype=np.float32) + k for k, name in enumerate(("tokens", "context", "scale"))}
# text is doubled by the first part and tripled by the second.
VELOCITY = SAMPLE["tokens"] + (1 + 2 + 6) * SAMPLE["context"] * SAMPLE["scale"]


def test_parts_chained_are_the_whole(parts):
    folder, entries = parts
    call = chain.opener(open_in(folder), dict(reversed(entries.items())))("net")
    (name, got), *others = call(SAMPLE).items()
    assert name == "velocity" and not others
    np.testing.assert_array_equal(got, VELOCITY)
    later = [chain.Part(tuple(i["name"] for i in entries[name]["inputs"]), open_in(folder)(name)) for name in NAMES[1:]]
    with pytest.raises(UserError, match=r"part 0 takes image, text, which nothing before it gives"):
        chain.chained(later)(SAMPLE)


def test_a_graph_that_is_there_is_opened_itself(parts):
    opened = []
    open_graph = lambda name: opened.append(name) or name
    assert chain.opener(open_graph, {"net": {}} | parts[1])("net") == "net"
    assert chain.opener(open_graph, parts[1])("clip_l") == "clip_l"
    assert opened == ["net", "clip_l"]


def test_parts_joined_are_the_whole(parts):
    folder, _ = parts
    models = [onnx.load(str(folder / f"{name}.onnx")) for name in NAMES]
    before = [model.SerializeToString() for model in models]
    whole = chain.joined(models, "net")
    assert [model.SerializeToString() for model in models] == before
    onnx.checker.check_model(whole, full_check=True)
    onnx.save(whole, str(folder / "net.onnx"))
    assert [value.name for value in whole.graph.input] == list(SAMPLE)
    assert [value.name for value in whole.graph.output] == ["velocity"]
    np.testing.assert_array_equal(open_in(folder)("net")(SAMPLE)["velocity"], VELOCITY)
    with pytest.raises(UserError, match=r"net: part 1 takes 'image', which no part before it gives in this form"):
        chain.joined([_part(0, last=True), models[1]], "net")
    models[1].graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5
    with pytest.raises(UserError, match=r"net: part 1 takes 'image', which no part before it gives in this form"):
        chain.joined(models, "net")


# --- names ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.randoms())
def test_ranges_cover_all_blocks_in_order(layers, size, random):
    ranges = chain.block_ranges(layers, size)
    assert [block for start, stop in ranges for block in range(start, stop)] == list(range(layers))
    assert all(stop - start == size for start, stop in ranges[:-1])
    names = [chain.part_name("net", *blocks) for blocks in ranges]
    shuffled = [*names, "clip_l", "net", "net2_blocks0-2", "net_w8a16"]
    random.shuffle(shuffled)
    assert chain.parts_of("net", shuffled) == names


def test_parts_must_follow_each_other():
    for names in (["a_blocks3-6"], ["a_blocks0-3", "a_blocks4-6"], ["a_blocks0-3", "a_blocks2-6"]):
        with pytest.raises(UserError, match=r"does not follow block \d of a: export its parts once more"):
            chain.parts_of("a", names)
    with pytest.raises(UserError, match="parts of 0 blocks"):
        chain.block_ranges(8, 0)


# --- experiments.mmdit_device -----------------------------------------------------------------------------------------


def test_measures_chunks_and_wholes_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mmdit_device, "apart", lambda what, function, *arguments: function(*arguments))
    command = ["--output", str(tmp_path), "--chunk", "1", "--stages", "0", "1", "--steps", "shared", "whole"]
    assert run_command(lambda: mmdit_device.main(command)) == 0
    shown = capsys.readouterr().out
    assert "| blocks1-2_w8a16_shared |" in shown and "| mmdit_stage1_blocks0-2_w8a16 |" in shown
    reports = json.loads((tmp_path / "mmdit_device.json").read_text())["reports"]
    for blocks in ("blocks0-1", "blocks1-2"):
        weights = reports[f"{blocks}_w8a16_shared"]["weight_bytes"]
        assert weights["together"] < 0.6 * weights["separate"]
        assert reports[f"mmdit_stage0_{blocks}_quantise"]["rounding"] == "nearest"
    assert not list(tmp_path.glob("graphs/*blocks?-?.onnx*")), "float graphs are left"

    # The whole of quantised blocks, with integer ends, is the network up to what 8 bits cost.
    setup = mmdit_device.Setup(tmp_path, "tiny", "8-elite", 0, 1, 1)
    whole = setup.graph("mmdit_stage1_blocks0-2", "w8a16")
    encodings = qdq.encodings(onnx.load(str(whole), load_external_data=False))
    assert encodings["tokens"].dtype == encodings["velocity"].dtype == "uint16"
    graph = mmdit_graph.mmdit_stage({TRANSFORMER: mmdit_device.transformer(setup)}, mmdit_device.SIZES["tiny"][1], 1)
    with np.load(setup.samples(1, 0)) as arrays:
        sample = {spec.name: arrays[spec.name][0] for spec in graph.inputs}
    (got,) = onnx_check.run_on_cpu(whole, [qdq.to_integers(sample, encodings)])
    (expected,) = graph.reference(*sample.values())
    assert 30 < snr_db(expected, qdq.to_floats(got, encodings)["velocity"]) < 80

    # What is measured is not measured again.
    monkeypatch.setattr(hexagon, "_in_child", None)
    assert run_command(lambda: mmdit_device.main(command)) == 0
    assert run_command(lambda: mmdit_device.main([*command, "--seed", "1", "--steps", "block"])) == 1
    assert "choose another --output" in capsys.readouterr().err


def test_bad_options_are_named(capsys, tmp_path):
    command = ["--output", str(tmp_path)]
    assert run_command(lambda: mmdit_device.main([*command, "--samples", "5"])) == 1
    assert run_command(lambda: mmdit_device.main([*command, "--chunk", "0"])) == 1
    assert run_command(lambda: mmdit_device.main([*command, "--soc", "9-elite"])) == 1
    error = capsys.readouterr().err
    assert "--samples 5" in error and "--chunk 0" in error and "'9-elite'" in error
    assert not list(tmp_path.iterdir())
