"""Rounding of weights by a layer's inputs: compensation and learned rounding."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters import adaround, precision_plan, quantize, rounding, weight_rounding
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
    assert snr["compensated"] > snr["nearest"] + 2 and snr["adaround"] > snr["nearest"] + 2, snr


def _snr(source, path, inputs):
    from converters import onnx_check
    from converters.samples import each_sample, input_specs, read_model

    samples = list(each_sample(inputs, input_specs(read_model(source))))
    return onnx_check.worst_snr_db(onnx_check.run_on_cpu(source, samples), onnx_check.run_on_cpu(path, samples))


def test_weights_are_left_to_nearest_where_samples_are_too_few(block, tmp_path):
    """A single sample has fewer tokens than a weight has rows."""
    few = block_samples(tmp_path / "few.npz", 1)
    every = {f"{name}/kernel" for name in ("query", "key", "value", "out")}
    for calibration, expected in ((few, set()), (block[1], every)):
        rounded = _round(block[0], calibration)
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
