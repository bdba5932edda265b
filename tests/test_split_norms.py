"""Group norms of quantised graphs: sums on integers, the root in FP16, right where the HTP's own norm is wrong."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from converters import compile_hexagon, hexagon, onnx_check, quantize
from converters.precision_plan import PrecisionPlan
from converters.split_norms import powers_of_two, split_norms
from nd_jax.errors import UserError
from tests.quantize_case import node, write_graph


def group_norm(path, sizes=(1.0, 1.0), height=8, width=8, channels=8, behind=True, form="InstanceNormalization"):
    """Of a picture whose groups have numbers of about `sizes`, with scale, bias and SiLU; in one of the two forms."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    groups = len(sizes)
    kernel = draw(channels, 3, 1, 1) * np.repeat(sizes, channels // groups).astype(np.float32)[:, None, None, None]
    constants = {"kernel": kernel, "one": np.ones(groups, np.float32), "zero": np.zeros(groups, np.float32)}
    constants |= {"groups": np.array([1, groups, channels // groups * height * width])}
    constants |= {"picture": np.array([1, channels, height, width]), "scale": 1 + 0.2 * draw(channels, 1, 1)}
    constants |= {"bias": draw(channels, 1, 1), "out": draw(4, channels, 1, 1)}
    norm = [node("InstanceNormalization", "rows one zero", "normed", epsilon=1e-6)]
    tail = [node("Mul", "back scale", "scaled"), node("Add" if behind else "Sub", "scaled bias", "shifted")]
    if form == "LayerNormalization":
        constants["ones"] = np.ones(constants["groups"][-1], np.float32)
        norm = [node("LayerNormalization", "rows ones", "normed", axis=-1, epsilon=1e-6)]
        if behind:
            constants |= {name: constants[name].reshape(-1) for name in ("scale", "bias")}
            constants |= {"mean": np.zeros(channels, np.float32), "variance": np.ones(channels, np.float32)}
            tail = [node("BatchNormalization", "back scale bias mean variance", "shifted", epsilon=0.0)]
    nodes = [
        node("Conv", "x kernel", "a"),
        node("Reshape", "a groups", "rows"),
        *norm,
        node("Reshape", "normed picture", "back"),
        *tail,
        node("Sigmoid", "shifted", "gate"),
        node("Mul", "shifted gate", "silu"),
        node("Conv", "silu out", "y"),
    ]
    ends = {"x": [1, 3, height, width]}, {"y": [1, 4, height, width]}
    return write_graph(path, nodes, *ends, constants)


def write_samples(path, height=8, width=8, count=4, spread=1.0):
    rng = np.random.default_rng(1)
    stack = spread * rng.standard_normal((count, 1, 3, height, width)).astype(np.float32)
    np.savez(path, x=stack)
    return path, [{"x": x} for x in stack]


FORMS = ("InstanceNormalization", "LayerNormalization")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(1e-4, 1e-4), (1.0, 1.0), (3e5, 3e5), (1e3, 4.0)])
def test_it_is_the_same_norm_with_variances_near_one(sizes, form, tmp_path):
    source, (_, samples) = group_norm(tmp_path / "g.onnx", sizes, form=form), write_samples(tmp_path / "x.npz")
    with split_norms(source, lambda: samples) as norms:
        assert onnx_check.worst_snr_db(
            onnx_check.run_on_cpu(source, samples), onnx_check.run_on_cpu(norms.path, samples)
        )["y"] > (60 if sizes[0] == 1e-4 else 90)
        variances = next(onnx_check.inner_values(norms.path, ["normed/variance"], samples))
        assert all(0.2 < number < 5 for _, v in variances for number in v.reshape(-1))
        model = onnx.load(str(norms.path))
        assert not [n for n in model.graph.node if n.op_type in (*FORMS, "BatchNormalization", "Reshape")]
        names = {n.name for n in model.graph.node}
        assert set(norms.float_nodes) <= names and set(norms.sums) <= names and len(norms.sums) == 4
        onnx.checker.check_model(model)
    assert not list(tmp_path.glob(".*"))


def test_sums_are_exact_in_eight_bits(tmp_path):
    source, (_, samples) = group_norm(tmp_path / "g.onnx"), write_samples(tmp_path / "x.npz")
    with split_norms(source, lambda: samples) as norms:
        model = onnx.load(str(norms.path))
        weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        for n in model.graph.node:
            if n.name in norms.sums:
                rows = weights[n.input[1]].reshape(len(weights[n.input[1]]), -1)
                assert all(len(set(np.abs(row[row != 0]))) == 1 for row in rows)


def test_powers_of_two():
    np.testing.assert_array_equal(powers_of_two(np.array([4.0, 1.1, 0.3])), [2, 1, 0.5])
    np.testing.assert_array_equal(powers_of_two(np.array([1.0, 0.0])), [1, 2.0**-12])
    np.testing.assert_array_equal(powers_of_two(np.zeros(2)), [1, 1])


@pytest.mark.parametrize(
    ("sizes", "floor"), [((1e-4, 1e-4), 60), ((1.0, 1.0), 60), ((3e5, 3e5), 60), pytest.param((1e3, 4.0), 38, id="far")]
)
def test_quantised_on_the_simulator(sizes, floor, tmp_path):
    """Numbers beyond FP16; and two groups of which 16 bits hold the numbers, of one to 8 bits, but not the squares."""
    source, (path, _) = group_norm(tmp_path / "g.onnx", sizes), write_samples(tmp_path / "x.npz")
    report = quantize.quantize_graph(source, path, tmp_path / "q.onnx")
    assert report["snr_db"]["activations_only"]["y"] > floor
    made = compile_hexagon.compile_graph(tmp_path / "q.onnx", tmp_path / "bin", "8-elite", 2, path, source)
    assert made["simulator"]["snr_db"]["y"] == pytest.approx(report["snr_db"]["quantised"]["y"], abs=3)


@pytest.mark.parametrize("spread", [1.45, 0.15])
def test_a_sample_of_another_contrast_than_those_for_calibration(spread, tmp_path):
    """Variances of 2.1 or 0.02 of theirs, whose ranges alone would clip the variance or its root."""
    source, (path, _) = group_norm(tmp_path / "g.onnx"), write_samples(tmp_path / "x.npz")
    quantize.quantize_graph(source, path, tmp_path / "q.onnx", float_ends=True)
    _, larger = write_samples(tmp_path / "larger.npz", spread=spread)
    results = [onnx_check.run_on_cpu(graph, larger) for graph in (source, tmp_path / "q.onnx")]
    assert onnx_check.worst_snr_db(*results)["y"] > 40


def test_the_compiler_moves_the_picture_twice(tmp_path):
    """With the norm in FP16 between integers it was eleven times, and 1.4 GB outside VTCM by the plan."""
    source = group_norm(tmp_path / "g.onnx", (1.0,) * 32, 160, 256, 128)
    path, _ = write_samples(tmp_path / "x.npz", 160, 256, 1)
    quantize.quantize_graph(source, path, tmp_path / "q.onnx")
    traffic = hexagon.planned_traffic(tmp_path / "q.onnx", "8-elite")
    picture = 2 * 160 * 256 * 128
    assert traffic["outside_read_bytes"] == 0
    assert traffic["dram_read_bytes"] < 2.5 * picture and traffic["dram_write_bytes"] < 2.5 * picture


@pytest.mark.parametrize("form", FORMS)
def test_a_norm_of_another_form(form, tmp_path):
    source = group_norm(tmp_path / "g.onnx", behind=False, form=form)
    path, _ = write_samples(tmp_path / "x.npz")
    message = f"'{form}:normed' is not a group norm between two Reshapes .* --keep-float leaves it in FP16"
    with pytest.raises(UserError, match=message):
        quantize.quantize_graph(source, path, tmp_path / "q.onnx")
    plan = PrecisionPlan(keep_float=(f"{form}:normed",))
    report = quantize.quantize_graph(source, path, tmp_path / "q.onnx", plan)
    assert report["float_nodes"] == [f"{form}:normed"]


def test_scale_and_bias_stay_in_floating_point_with_their_norm(tmp_path):
    source = group_norm(tmp_path / "g.onnx", form="LayerNormalization")
    path, _ = write_samples(tmp_path / "x.npz")
    plan = PrecisionPlan(keep_float=("LayerNormalization:normed",))
    report = quantize.quantize_graph(source, path, tmp_path / "q.onnx", plan)
    assert report["float_nodes"] == ["LayerNormalization:normed", "BatchNormalization:shifted"]
    made = compile_hexagon.compile_graph(tmp_path / "q.onnx", tmp_path / "bin", "8-elite", 2, path, source)
    assert made["simulator"]["snr_db"]["y"] == pytest.approx(report["snr_db"]["quantised"]["y"], abs=3)


@pytest.mark.parametrize("changed", ["mean", "variance", "epsilon", "computed mean"])
def test_a_batch_norm_that_does_more_than_scale(changed, tmp_path):
    source = group_norm(tmp_path / "g.onnx", form="LayerNormalization")
    model = onnx.load(str(source))
    (norm,) = (n for n in model.graph.node if n.op_type == "BatchNormalization")
    if changed == "epsilon":
        norm.attribute[0].f = 0.5
    elif changed == "computed mean":
        model.graph.node.insert(0, node("Neg", "mean", "moved"))
        norm.input[3] = "moved"
    else:
        (tensor,) = (t for t in model.graph.initializer if t.name == changed)
        tensor.CopyFrom(numpy_helper.from_array(np.full(8, 0.5, np.float32), changed))
    onnx.save(model, str(source))
    with pytest.raises(UserError, match="is not a group norm"):
        quantize.quantize_graph(source, write_samples(tmp_path / "x.npz")[0], tmp_path / "q.onnx")


def test_samples_that_are_not_finite(tmp_path):
    source = group_norm(tmp_path / "g.onnx")
    np.savez(tmp_path / "x.npz", x=np.full((2, 1, 3, 8, 8), np.nan, np.float32))
    with pytest.raises(UserError, match="is not finite on these samples"):
        quantize.quantize_graph(source, tmp_path / "x.npz", tmp_path / "q.onnx")
    assert not list(tmp_path.glob(".*"))
