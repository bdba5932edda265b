"""Graph of the streaming decoder: sub-pixel form, export, carried states, quantisation, Hexagon binary, errors."""

import functools
import json

import jax
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters import (
    calibrate_decoder,
    compile_hexagon,
    decoder_graph,
    export_onnx,
    graphs,
    onnx_check,
    precision_plan,
    qdq,
    quantize,
    rounding,
    samples,
    shared_ranges,
    subpixel,
)
from converters.graph import GraphOptions, TensorSpec
from converters.numerics import snr_db
from nd_jax.data.latent_shards import Plan, claim_folder, summarize, write_manifest, write_shard
from nd_jax.data.latents import encode_record
from nd_jax.errors import UserError, run_command
from nd_jax.models.taehv import initial_states
from nd_jax.models.video_vae import AsymmetricCausalVideoVAE
from nd_jax.weights.folder import save_component
from tests.tiny_decoder_case import HEIGHT, WIDTH, clip, decoder_component

OPTIONS = GraphOptions(latent_height=HEIGHT, latent_width=WIDTH)
FRAMES = [f"frame_{i}" for i in range(8)]
STATES = [f"state_{i}" for i in range(9)]


@pytest.fixture(scope="module")
def vae():
    return decoder_component()


@pytest.fixture(scope="module")
def calibration(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    for seed in range(2):
        for i, sample in enumerate(calibrate_decoder.capture(vae, clip(seed=seed), range(3))):
            np.savez(folder / f"{seed}_{i}.npz", **sample)
    return folder


@pytest.fixture(scope="module")
def exported(vae, calibration, tmp_path_factory):
    """(folder of the graph, report)."""
    folder, graph = tmp_path_factory.mktemp("decoder"), decoder_graph.decoder_stream({"causal_video_vae": vae}, OPTIONS)
    return folder, export_onnx.export_loaded(graph, folder, samples=calibration)


@pytest.fixture(scope="module")
def quantised(exported, calibration, tmp_path_factory):
    """(the graph, report)."""
    path = tmp_path_factory.mktemp("quantised") / "decoder_w8a16.onnx"
    return path, quantize.quantize_graph(
        exported[0] / "decoder_stream.onnx", calibration, path, precision_plan.PLANS["decoder_stream"]
    )


# --- sub-pixel form ---------------------------------------------------------------------------------------------------


def _conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4)])
@given(seed=st.integers(0, 99))
def test_kernels_move_in_front_of_the_enlargement(height, width, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, kernel, pointwise, deep = (
        draw(1, height, width, 2),
        draw(3, 3, 2, 3),
        draw(1, 1, 2, 2),
        draw(1, height, width, 8),
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    close(_conv(_conv(x, pointwise), kernel), _conv(x, subpixel.behind_pointwise(kernel, pointwise)))
    enlarged = x.repeat(2, axis=1).repeat(2, axis=2)
    close(_conv(enlarged, kernel), decoder_graph.depth_to_space(_conv(x, subpixel.behind_nearest(kernel))))
    direct = _conv(decoder_graph.depth_to_space(deep), kernel)
    close(direct, decoder_graph.depth_to_space(_conv(deep, subpixel.behind_depth_to_space(kernel))))


def test_groups_that_do_not_enlarge():
    vae = decoder_component(decoder_time_upscale=(False, False, True), decoder_space_upscale=(True, False, False))
    graph = decoder_graph.decoder_stream({"causal_video_vae": vae}, OPTIONS)
    inputs = list(graph.sample(np.random.default_rng(0)).values())
    outputs = jax.jit(graph.apply)(graph.params, *inputs)
    for ours, theirs, spec in zip(outputs, graph.reference(*inputs), graph.outputs, strict=True):
        assert ours.shape == theirs.shape == spec.shape
        assert snr_db(theirs, ours) > 100
    assert graph.native_ops["DepthToSpace"] == 1


# --- export -----------------------------------------------------------------------------------------------------------


def test_graph_is_what_the_device_wants(exported):
    folder, report = exported
    model = onnx.load(str(folder / "decoder_stream.onnx"))
    assert [value.name for value in model.graph.input] == ["latent", *STATES]
    assert [value.name for value in model.graph.output] == [*FRAMES, *(f"next_{name}" for name in STATES)]
    # 21 memory blocks of 3, 14 enlargements, conv_in, post_quant_conv and 8 times conv_out.
    ops = {
        "Conv": 87,
        "DepthToSpace": 14,
        "Concat": 21,
        "Add": 21,
        "Relu": 72,
        "Tanh": 1,
        "Clip": 1,
        "Mul": 2,
        "Transpose": 27,
    }
    assert report["ops"] == ops
    assert all(len(d.dims) <= 4 for d in model.graph.initializer)
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"post_quant_conv/kernel", "decoder/memory_4/convs_1/kernel", "decoder/enlarge_1/late/kernel"} <= names
    assert report["carried"] == qdq.carried_states(model) == {f"next_{name}": name for name in STATES}
    assert min(report["snr_db"].values()) > 100
    assert report["notes"]["dropped_frames"] == 7


def test_states_carried_over_frames_equal_the_parallel_form(exported, vae):
    z = clip(frames=3, seed=5)
    decode = jax.jit(functools.partial(AsymmetricCausalVideoVAE(vae.config).apply, method="decode"))
    video = decode({"params": vae.params}, z[None])[0]
    states = [np.asarray(x) for x in initial_states(vae.config.decoder, 1, HEIGHT, WIDTH)]
    frames = []
    for latent in z:
        sample = {"latent": latent[None], **dict(zip(STATES, states, strict=True))}
        (out,) = onnx_check.run_on_cpu(exported[0] / "decoder_stream.onnx", [sample])
        states = [out[f"next_{name}"] for name in STATES]
        frames += [out[name][0] for name in FRAMES]
    assert snr_db(video, np.stack(frames[7:])) > 100


def test_compared_on_the_given_samples(exported, calibration):
    folder, report = exported
    assert report["samples"] == {"count": 4, "seed": None}
    with np.load(folder / "decoder_stream.inputs.npz") as stacked, np.load(calibration / "0_1.npz") as second:
        np.testing.assert_array_equal(stacked["state_7"][1], second["state_7"])


# --- calibration data -------------------------------------------------------------------------------------------------


def test_captured_states_are_those_of_the_stream(vae):
    z = clip(frames=3)
    first, last = calibrate_decoder.capture(vae, z, [2, 0])
    assert not any(np.any(first[name]) for name in STATES)
    states = initial_states(vae.config.decoder, 1, HEIGHT, WIDTH)
    for latent in z[:2]:
        states = decoder_graph.decode_frame(vae, latent[None], states)[1]
    np.testing.assert_array_equal(last["latent"][0], z[2])
    for name, state in zip(STATES, states, strict=True):
        np.testing.assert_array_equal(last[name], state)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.data())
def test_frames_are_drawn_from_as_many_clips_as_possible(clips, frames, seed, data):
    count = data.draw(st.integers(1, clips * frames))
    chosen = calibrate_decoder.choose_frames(clips, frames, count, seed)
    assert sum(len(set(f)) for f in chosen.values()) == sum(map(len, chosen.values())) == count
    assert len(chosen) == min(clips, count)
    assert all(0 <= frame < frames for f in chosen.values() for frame in f)
    with pytest.raises(UserError, match=f"give 1 to {clips * frames}"):
        calibrate_decoder.choose_frames(clips, frames, clips * frames + 1, seed)


def test_calibration_command_takes_clips_apart(vae, tmp_path, capsys):
    save_component(tmp_path / "model" / "causal_video_vae", vae.network, vae.config, vae.params)
    plan = Plan("clips", 4, 4, (3, HEIGHT, WIDTH, 4), 5, 8, 8, 8.0, "encoder")
    claim_folder(tmp_path / "latents", plan)
    records = [encode_record(clip(seed=k), np.full_like(clip(), 1e-3), "", f"clip {k}") for k in range(4)]
    write_shard(tmp_path / "latents", plan, 0, records)
    write_manifest(tmp_path / "latents", summarize(tmp_path / "latents", plan, (0.0, 0.0), (1.0, 1.0), []))
    command = ["--model", str(tmp_path / "model"), "--latents", str(tmp_path / "latents"), "--samples", "3"]
    assert (
        run_command(lambda: calibrate_decoder.main([*command, "--output", str(tmp_path / "out"), "--first", "2"])) == 0
    )
    assert "3 samples of 2 clips" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "calibration.json").read_text())["samples"]
    assert {sample["clip"] for sample in written} == {"clip 2", "clip 3"}
    for sample in written:
        with np.load(tmp_path / "out" / sample["file"]) as arrays:
            z = clip(seed=int(sample["clip"][-1]))[sample["frame"]]
            np.testing.assert_allclose(arrays["latent"][0], z, atol=0.02)
            assert np.any(arrays["state_8"]) == (sample["frame"] > 0)
    for more, message in ((["--first", "4"], "holds 4 clips"), (["--clips", "1", "--samples", "4"], "give 1 to 3")):
        assert run_command(lambda more=more: calibrate_decoder.main([*command, "--output", "none", *more])) == 1
        assert message in capsys.readouterr().err


# --- quantisation -----------------------------------------------------------------------------------------------------


def test_compensated_rounding_is_better_on_its_inputs_and_stays_on_the_grid():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 24)) + 0.1 * rng.standard_normal((400, 24))
    w = rng.standard_normal((5, 24)).astype(np.float32)
    scales = rounding.channel_scales(w)
    steps = rounding.round_rows(w, rounding.compensation(x.T @ x / len(x)), scales)
    assert steps.dtype == np.int8 and np.abs(steps).max() == 127
    q = steps * scales[:, None]
    nearest = np.round(w / scales[:, None]) * scales[:, None]
    error = lambda rounded: np.linalg.norm(x @ (w - rounded).T)
    assert error(q) < 0.5 * error(nearest)


@given(st.integers(1, 2), st.sampled_from([1, 3]), st.integers(0, 5))
def test_patch_moments_are_those_of_the_convolution(batch, size, seed):
    rng = np.random.default_rng(seed)
    x, row = rng.standard_normal((batch, 2, 4, 5)).astype(np.float32), rng.standard_normal((1, 2, size, size))
    moments, count = rounding.patch_moments(x, (size, size), (1, 1), (size // 2,) * 4, 1000, rng)
    y = jax.lax.conv_general_dilated(x, row.astype(np.float32), (1, 1), "SAME")
    assert count == batch * 20
    assert row.reshape(-1) @ moments @ row.reshape(-1) == pytest.approx(float(np.square(y).sum()), rel=1e-4)


def test_ranges_are_shared_by_what_only_moves_and_what_is_carried():
    node = onnx.helper.make_node
    nodes = [node("Concat", ["a", "b"], ["c"]), node("Relu", ["c"], ["d"]), node("Transpose", ["d"], ["e"])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    extremes = {"a": (0.0, 1.0), "b": (-2.0, 0.0), "c": (-2.0, 1.0), "d": (0.0, 1.0), "e": (0.0, 1.0), "s": (0.0, 4.0)}
    shared = shared_ranges.share_ranges(model, extremes, {"e": "s"})
    wide = shared_ranges.HEADROOM
    assert shared == {**dict.fromkeys("abc", (-2 * wide, wide)), **dict.fromkeys("des", (0.0, 4 * wide))}


def test_quantised_graph_has_integer_ends_and_returns_its_states(quantised):
    path, report = quantised
    model = onnx.load(str(path))
    ends = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {onnx.TensorProto.UINT16}
    encodings = qdq.encodings(model)
    assert set(encodings) == {value.name for value in ends}
    for name in STATES:
        assert encodings[name] == encodings[f"next_{name}"]
    kernels = [t for t in model.graph.initializer if t.name.endswith("kernel_quantized")]
    assert len(kernels) == 36 and all(t.data_type == onnx.TensorProto.INT8 for t in kernels)
    scales = {t.name: list(t.dims) for t in model.graph.initializer if t.name.endswith("kernel_scale")}
    assert scales["decoder/memory_0/convs_0/kernel_scale"] == [8]
    assert json.loads(path.with_suffix(".json").read_text()) == json.loads(json.dumps(report))
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.data", "decoder_w8a16.json"}


def test_quantised_graph_decodes_a_clip_it_has_not_seen(quantised, exported, vae):
    """Integers are carried from call to call, as on the device."""
    path, _ = quantised
    encodings = qdq.encodings(samples.read_model(path))
    state = {name: np.asarray(x) for name, x in zip(STATES, initial_states(vae.config.decoder, 1, 3, 4), strict=True)}
    integers, worst = qdq.to_integers(state, encodings), {}
    for latent in clip(seed=9):
        (expected,) = onnx_check.run_on_cpu(exported[0] / "decoder_stream.onnx", [{"latent": latent[None], **state}])
        (got,) = onnx_check.run_on_cpu(path, [{**qdq.to_integers({"latent": latent[None]}, encodings), **integers}])
        state, integers = ({name: out[f"next_{name}"] for name in STATES} for out in (expected, got))
        for name in FRAMES:
            worst[name] = min(worst.get(name, np.inf), snr_db(expected[name], qdq.to_floats(got, encodings)[name]))
    assert min(worst.values()) > 25, worst


def test_error_estimate_tells_the_halves_apart(quantised):
    snr = quantised[1]["snr_db"]
    for name in FRAMES:
        assert snr["activations_only"][name] > 55 > snr["weights_only"][name] > 28
        assert snr["quantised"][name] == pytest.approx(snr["weights_only"][name], abs=1)


def test_plan_keeps_nodes_in_float(exported, calibration, tmp_path):
    plan = precision_plan.PrecisionPlan(keep_float=("*conv_out*",))
    source = exported[0] / "decoder_stream.onnx"
    report = quantize.quantize_graph(source, calibration, tmp_path / "some.onnx", plan, float_ends=True)
    assert len(report["float_nodes"]) == 8  # the convolution of every frame
    model = onnx.load(str(tmp_path / "some.onnx"))
    assert any(tensor.name == "decoder/conv_out/kernel" for tensor in model.graph.initializer)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    with pytest.raises(UserError, match=r"'\*attention\*' names no node"):
        precision_plan.float_nodes(precision_plan.PrecisionPlan(("*attention*",)), ["Conv:a"])


# --- Hexagon ----------------------------------------------------------------------------------------------------------


def test_float_graph_on_the_simulator(exported, calibration, tmp_path):
    report = compile_hexagon.compile_graph(
        exported[0] / "decoder_stream.onnx", tmp_path, "8-elite", runs=2, inputs=calibration, traffic=True
    )
    assert report["precision"] == "fp16"
    assert min(report["simulator"]["snr_db"][name] for name in FRAMES) >= 45
    # At least all inputs, and far less than everything in the graph.
    inputs = sum(4 * np.prod(spec["shape"]) for spec in exported[1]["inputs"])
    assert inputs <= report["traffic"]["dram_read_bytes"] < 2e6
    assert compile_hexagon.faults(report, 0, 1e3)[0].startswith("a call reads ")
    assert (tmp_path / "decoder_stream_8-elite_qnn.bin").stat().st_size == report["binary_bytes"]


def test_quantised_graph_on_the_simulator(quantised, exported, calibration, tmp_path):
    reference = exported[0] / "decoder_stream.onnx"
    report = compile_hexagon.compile_graph(quantised[0], tmp_path, "8-gen-3", 1, calibration, reference)
    assert report["precision"] == "w8a16"
    expected = quantised[1]["snr_db"]["quantised"]
    for name in FRAMES:
        assert report["simulator"]["snr_db"][name] > expected[name] - 3
    with pytest.raises(UserError, match="--reference"):
        compile_hexagon.compile_graph(quantised[0], tmp_path, "8-gen-3", 1, calibration)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_only_the_tiny_decoder_streams(vae):
    from nd_jax.weights.vae import CAUSAL_VIDEO_VAE

    native = type(vae)(CAUSAL_VIDEO_VAE, vae.config, vae.params)
    with pytest.raises(UserError, match="causal_video_vae holds a causal_video_vae; this graph needs a asym"):
        decoder_graph.decoder_stream({"causal_video_vae": native}, OPTIONS)
    assert "decoder_stream" in graphs.GRAPHS


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 3), np.float32)}, "no array 'y'"),
        ({"x": np.zeros((3, 2), np.float32), "y": np.zeros(1, np.float32)}, r"'x' is float32 \(3, 2\), expected"),
        ({"x": np.zeros((2, 3)), "y": np.zeros(1, np.float32)}, "'x' is float64"),
    ],
)
def test_samples_that_do_not_fit(arrays, message, tmp_path):
    specs = [TensorSpec("x", (2, 3), "float32"), TensorSpec("y", (1,), "float32")]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        list(samples.each_sample(tmp_path, specs))
    with pytest.raises(UserError, match="holds no"):
        samples.sample_files(tmp_path / "..")


def test_commands_report_bad_input_in_one_line(exported, quantised, calibration, tmp_path, capsys):
    source = str(exported[0] / "decoder_stream.onnx")
    data = ["--calibration", str(calibration), "--output", str(tmp_path / "out.onnx")]
    bad = tmp_path / "bad"
    bad.mkdir()
    with np.load(calibration / "0_0.npz") as arrays:
        np.savez(bad / "nan.npz", **{**arrays, "latent": np.full_like(arrays["latent"], np.inf)})
    for command, message in (
        (lambda: quantize.main(["--onnx", str(quantised[0]), *data]), "is quantised already"),
        (lambda: quantize.main(["--onnx", source, *data[:2], "--output", source]), "give another file"),
        (lambda: quantize.main(["--onnx", source, "--calibration", str(bad), *data[2:]]), "is not finite"),
        (lambda: quantize.main(["--onnx", str(tmp_path / "no.onnx"), *data]), "no such file"),
        (
            lambda: export_onnx.main(
                ["--model", ".", "--graph", "decoder_stream", "--output", ".", "--latent-width", "0"]
            ),
            "--latent-width 0",
        ),
    ):
        assert run_command(command) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out.onnx*"))


def test_integers_clip_at_the_ends_of_their_range():
    encoding = qdq.Encoding(scale=0.5, zero_point=10, dtype="uint16")
    x = np.array([-100.0, -5.0, 0.0, 3.0, 1e6], np.float32)
    np.testing.assert_array_equal(encoding.quantize(x), np.array([0, 0, 10, 16, 65535], np.uint16))
    np.testing.assert_allclose(encoding.dequantize(encoding.quantize(x))[1:4], x[1:4])


def test_weights_put_back_leave_no_8_bit_constant(quantised):
    model = ir.load(quantised[0])
    weights = {name: ir.tensor(np.zeros_like(w.numpy())) for name, w in qdq.rounded_weights(model).items()}
    assert len(weights) == 36
    qdq.with_float_weights(model, weights)
    assert qdq.rounded_weights(model) == {}
