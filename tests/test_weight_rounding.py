"""Rounding of weights by a layer's inputs: compensation, layer by layer, and learned."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters import adaround, precision_plan, quantize, rounding, sequential_rounding, weight_rounding
from converters.precision_plan import PrecisionPlan
from tests import quantize_case
from tests.quantize_case import NEAREST, WIDTH, block_samples, convolutions


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    return quantize_case.write_block(tmp_path_factory.mktemp("block"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return quantize_case.write_pictures(tmp_path_factory.mktemp("pictures") / "pictures.npz")


@given(st.sampled_from([1, 2, 3]), st.tuples(*[st.integers(1, 3)] * 2), st.tuples(*[st.integers(0, 2)] * 4))
def test_patch_moments_with_strides_and_pads(size, strides, pads):
    """Against a loop over all places."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal((2, 2, 4, 5)).astype(np.float32)
    top, left, bottom, right = pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    patches = [
        padded[b, :, i : i + size, j : j + size].ravel()
        for b in range(2)
        for i in range(0, padded.shape[2] - size + 1, strides[0])
        for j in range(0, padded.shape[3] - size + 1, strides[1])
    ]
    total, count = rounding.patch_moments(x, (size, size), strides, pads, 1000, rng)
    assert count == len(patches)
    np.testing.assert_allclose(total, np.array(patches).T @ np.array(patches), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["block", "convolutions"])
def test_rounding_by_inputs_is_better_on_samples_it_has_not_seen(kind, block, pictures, tmp_path):
    if kind == "block":
        source, calibration, held_out = *block, block_samples(tmp_path / "held_out.npz", 4, seed=5)
    else:
        source, calibration, held_out = convolutions(tmp_path / "c.onnx", ("", "")), pictures, tmp_path / "h.npz"
        x = np.cumsum(np.random.default_rng(3).standard_normal((4, 1, 3, 8, 8)), axis=-1)
        np.savez(held_out, x=x.astype(np.float32))
    snr = {}
    for how in precision_plan.ROUNDINGS:
        path = tmp_path / f"{how}.onnx"
        report = quantize.quantize_graph(source, calibration, path, PrecisionPlan((), how, True), float_ends=True)
        assert report["rounding"] == how
        snr[how] = min(_snr(source, path, held_out).values())
    assert min(value for how, value in snr.items() if how != "nearest") > snr["nearest"] + 2, snr


def test_rounding_in_order_undoes_errors_of_the_layers_before(tmp_path):
    """A chain of layers that pass a picture on, as QuickSRNet's: a 1 in the middle of each kernel and small others."""
    source, snr = quantize_case.passing_chain(tmp_path / "chain.onnx"), {}
    pictures = [quantize_case.flat_pictures(tmp_path / f"{name}.npz", i) for i, name in enumerate(("seen", "unseen"))]
    for how in ("nearest", "compensated", "sequential"):
        path = tmp_path / f"{how}.onnx"
        quantize.quantize_graph(source, pictures[0], path, PrecisionPlan(rounding=how), float_ends=True)
        snr[how] = _snr(source, path, pictures[1])["y"]
    assert snr["sequential"] > snr["compensated"] + 3 > snr["nearest"] + 6, snr


def test_a_layer_on_rounded_inputs_is_fitted_to_its_exact_output():
    """Inputs that are half as large as they should be ask for weights that are twice as large."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 12)) @ rng.standard_normal((12, 12))
    w, made = np.concatenate([np.ones((4, 1)), 0.02 * rng.standard_normal((4, 11))], axis=1), 0.5 * x
    own, cross = made.T @ made / len(x), x.T @ made / len(x)
    steps, scales = sequential_rounding.asymmetric_rows(w, own, cross)
    assert steps.dtype == np.int8 and scales.dtype == np.float32
    error = lambda steps, scales: np.linalg.norm(made @ (steps * scales[:, None]).T - x @ w.T) / np.linalg.norm(x @ w.T)
    by_largest = rounding.channel_scales(2 * w)
    compensated = rounding.round_rows(2 * w, rounding.compensation(own), by_largest)
    assert error(steps, scales) < min(error(compensated, by_largest), 0.01)


def test_values_beside_those_with_rounded_weights(block):
    from converters.samples import each_sample, input_specs, read_model

    samples = lambda: each_sample(block[1], input_specs(read_model(block[0])))
    zero = {"query/kernel": np.zeros((WIDTH, WIDTH), np.float32)}
    found = [list(values) for values in sequential_rounding.paired_values(block[0], zero, ["query", "key"], samples)]
    assert len(found) == 8
    for (query, x, zeros), (key, y, same) in found:
        assert (query, key) == ("query", "key") and np.abs(x).max() > 0 and not zeros.any()
        np.testing.assert_array_equal(y, same)


def _snr(source, path, inputs):
    from converters import onnx_check
    from converters.samples import each_sample, input_specs, read_model

    samples = list(each_sample(inputs, input_specs(read_model(source))))
    return onnx_check.worst_snr_db(onnx_check.run_on_cpu(source, samples), onnx_check.run_on_cpu(path, samples))


def test_weights_are_left_to_nearest_where_samples_are_too_few(block, tmp_path):
    """A single sample has fewer tokens than a weight has rows."""
    few = block_samples(tmp_path / "few.npz", 1)
    every = {f"{name}/kernel" for name in ("query", "key", "value", "out")}
    for how in ("sequential", "compensated"):
        for calibration, expected in ((few, set()), (block[1], every)):
            rounded = _round(block[0], calibration, how)
            assert set(rounded) == expected
    for weight in rounded.values():
        assert weight.steps.dtype == np.int8 and weight.axis == 1 and weight.scales.shape == (WIDTH,)


def _round(source, calibration, how="compensated"):
    from converters.samples import each_sample, input_specs, read_model

    specs = input_specs(read_model(source))
    excluded = precision_plan.excluded_nodes(NEAREST, read_model(source))
    plan = PrecisionPlan(rounding=how)
    return weight_rounding.round_weights(source, plan, excluded, lambda: each_sample(calibration, specs), 0)


def test_passes_over_the_samples_do_not_change_the_result(block, monkeypatch):
    expected = _round(*block)
    monkeypatch.setattr(weight_rounding, "MOMENT_BYTES", 1)
    got = _round(*block)
    assert list(got) == list(expected)
    for name, weight in got.items():
        np.testing.assert_array_equal(weight.steps, expected[name].steps)


def test_groups_share_moments_and_fit_the_memory(block, monkeypatch):
    layers = weight_rounding.weight_windows(onnx.load(str(block[0])), [])
    assert layers["query/kernel"] == layers["value/kernel"] == (weight_rounding.Window("normed"),)
    monkeypatch.setattr(weight_rounding, "MOMENT_BYTES", 8 * (30**2 + 20**2))
    widths = {(weight_rounding.Window(str(i)),): width for i, width in enumerate([20, 30, 10, 100, 5])}
    sizes = [[widths[windows] for windows in batch] for batch in weight_rounding.batches(widths)]
    assert sizes == [[20, 30], [10], [100], [5]]


def test_learned_rounding_goes_up_or_down_and_is_better_than_nearest():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 24)) + 0.1 * rng.standard_normal((400, 24))
    w = rng.standard_normal((5, 24)).astype(np.float32)
    scales = rounding.channel_scales(w)
    steps = adaround.learn_rounding(w, x.T @ x / len(x), scales)
    exact = w / scales[:, None]
    assert steps.dtype == np.int8 and np.abs(steps - exact).max() < 1.001
    error = lambda q: np.linalg.norm(x @ (w - q * scales[:, None]).T)
    assert error(steps) < 0.6 * error(np.round(exact))
