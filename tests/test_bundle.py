"""Bundles of tiny random model folders: their video is that of JAX, and what the runner refuses."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from converters import bundle, bundle_host, bundle_manifest, export_onnx, graph_sizes, graphs, run_hexagon
from converters.first_frame_graph import unet_conditioning
from converters.graph import GraphOptions
from converters.samples import read_sample
from experiments.random_model import random_params, write_random_model
from nd_jax.errors import UserError, run_command
from nd_jax.generate import lcm
from nd_jax.generate.first_frame import UNET_FOLDER, open_first_frame
from nd_jax.generate.model_folder import open_model
from nd_jax.weights import networks
from nd_jax.weights.folder import Component

PROMPT = "a red circle moves left"
# Without any history these videos still have 43 dB, without a mask 39; right ones have 88 and more.
AGREES_DB = 70


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A model folder of Neodragon's kinds, the same without its first frame and the bundle of this, and a picture."""
    root = tmp_path_factory.mktemp("hybrid")
    write_random_model(root / "full", "tiny", dtype="float32")
    shutil.copytree(root / "full", root / "model", ignore=shutil.ignore_patterns("ssd_1b_*"))
    bundle.write_bundle(root / "model", root / "bundle")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(root / "first.png")
    return root


@pytest.fixture
def copied(hybrid, tmp_path):
    shutil.copytree(hybrid / "bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


def changed(folder, change):
    """Rewrites model.json of a bundle by a function of its content."""
    path = folder / "model.json"
    model = json.loads(path.read_text())
    change(model)
    path.write_text(json.dumps(model))
    return folder


def run(root, *more):
    command = ["--bundle", root / "bundle", "--prompt", PROMPT, "--output", root / "videos" / "v.mp4", *more]
    return run_hexagon.main([str(part) for part in command])


def test_the_bundle_makes_the_video_of_jax(hybrid, capsys):
    """Text, video encoder, rollout, decoder and super-resolution."""
    import av

    assert run(hybrid, "--seed", "3", "--image", hybrid / "first.png", "--compare", hybrid / "model") == 0
    out = capsys.readouterr().out
    found = re.search(r"([0-9.]+) dB PSNR against the video by JAX", out)
    assert "9 frames of 128 x 128" in out and (found is None or float(found.group(1)) >= AGREES_DB)
    assert found or "equal to the video by JAX" in out
    with av.open(str(hybrid / "videos" / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (128, 128, 8)
        assert len(list(container.decode(video=0))) == 9


def test_steps_guidance_and_the_first_unit(hybrid, copied, tmp_path):
    """The graphs are the same in both modes; what differs is in model.json."""
    shutil.copytree(hybrid / "model", tmp_path / "model")
    texts = {"negative_prompt": "a blue square", "prompt_modifier": " slowly"}
    more = {"mode": "monolithic", "first_steps": [2, 1, 1], "steps": [1, 2, 1], "guidance": [3, 2], **texts}
    settings = tmp_path / "model" / "generation.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | more))
    sampler = bundle_manifest.sampler_entry(open_model(tmp_path / "model").sampler())
    changed(copied, lambda model: model.update(mode="monolithic", sampler=sampler, **texts))
    frames = run_hexagon.bundle_frames(copied, PROMPT)
    expected = run_hexagon.jax_frames(tmp_path / "model", PROMPT)
    assert run_hexagon.psnr_db(frames, expected) >= AGREES_DB
    # Other noise is far from it.
    assert run_hexagon.psnr_db(run_hexagon.bundle_frames(copied, PROMPT, 1), expected) < 35
    with pytest.raises(UserError, match="unlike models"):
        run_hexagon.psnr_db(frames[1:], expected)
    with pytest.raises(UserError, match="mode monolithic takes no image"):
        run_hexagon.bundle_frames(copied, PROMPT, 0, hybrid / "first.png")


def test_the_steps_of_the_first_frame(hybrid):
    """Conditioning, latents and the last division against the model's own functions, with a UNet that gives tanh."""
    first, rng = open_first_frame(hybrid / "full"), np.random.default_rng(0)
    config = dataclasses.replace(first.unet, time_cond_proj_dim=6)
    params = random_params(networks.UNET, config, rng, np.float32)
    arrays = bundle.host_weights({UNET_FOLDER: Component(networks.UNET, config, params)})
    texts = {
        "penultimate": rng.standard_normal((1, 16, 16), np.float32),
        "pooled": rng.standard_normal((1, 8), np.float32),
    }
    clips = ("first_frame_clip_l", "first_frame_clip_g")
    entry = bundle_manifest.first_frame_entry(first, 64, 64)
    model = {
        "first_frame": entry,
        "tokenizers": bundle_manifest.tokenizer_entries(open_model(hybrid / "full"), first),
        "graphs": {name: {"inputs": [{"name": "input_ids"}]} for name in clips},
    }
    seen, decoded = [], []
    calls = {
        **dict.fromkeys(clips, lambda inputs: texts),
        "unet": lambda inputs: seen.append(inputs) or {"prediction": np.tanh(inputs["latents"])},
        "image_decoder": lambda inputs: decoded.append(inputs) or {"image": np.ones((1, 2, 2, 3), np.float32)},
    }
    tokenizers = dict.fromkeys(clips, lambda text: {"ids": np.zeros(16, np.int32), "mask": np.ones(16, np.int32)})
    noise = rng.standard_normal((5, *entry["latents"]), np.float32)
    picture = bundle_host.draw_picture(model, arrays, tokenizers, calls.__getitem__, PROMPT, noise)
    assert entry["latents"] == [32, 32, 4] and (picture == 255).all() and len(seen) == 4

    schedule, x = lcm.lcm_schedule(lcm.SSD_1B, 4), noise[:1]
    sizes = np.array([[128, 128, 0, 0, 128, 128]], np.float32)
    guidance = lcm.guidance_embedding(np.zeros(1, np.float32), 6)
    for step, inputs in enumerate(seen):
        timestep = schedule.timesteps[step : step + 1].astype(np.float32)
        given = np.asarray(unet_conditioning(config, params, timestep, texts["pooled"], sizes, guidance))
        np.testing.assert_allclose(inputs["conditioning"], given, rtol=0, atol=1e-5 * np.abs(given).max())
        np.testing.assert_allclose(inputs["latents"], x, rtol=0, atol=1e-5 * np.abs(x).max())
        assert inputs["context"].shape == (1, 16, 32)
        x = np.asarray(lcm.lcm_step(lcm.SSD_1B, schedule, step, x, np.tanh(x), noise[step + 1 : step + 2])[0])
    np.testing.assert_allclose(decoded[0]["latents"], x / first.vae.scaling_factor, rtol=0, atol=1e-4)


def test_a_teacher(tmp_path):
    """T5 in the place of DistilT5 and its adapter, and a decoder that is no graph."""
    write_random_model(tmp_path / "model", "tiny-teacher", dtype="float32")
    with pytest.raises(UserError, match="needs the tiny decoder"):
        bundle.write_bundle(tmp_path / "model", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert bundle_manifest.graph_names(open_model(tmp_path / "model"), None, False) == [
        *("t5_encoder", "clip_l", "clip_g", "mmdit_stage0", "mmdit_stage1", "mmdit_stage2", "decoder_stream")
    ]
    graph = graphs.load_graph("t5_encoder", tmp_path / "model", GraphOptions(length=16))
    report = export_onnx.export_loaded(graph, tmp_path / "out")
    assert report["snr_db"]["context"] >= 80 and report["outputs"][0]["shape"] == (1, 16, 16)


def test_what_a_bundle_holds(hybrid):
    model = json.loads((hybrid / "bundle" / "model.json").read_text())
    assert [call["graph"] for call in model["calls"]] == list(model["graphs"]) and len(model["graphs"]) == 9
    decoder = model["graphs"]["decoder_stream"]
    assert len(decoder["carried"]) == 9 and model["dropped_frames"] == 7
    assert decoder["inputs"][0] == {"name": "latent", "shape": [1, 8, 8, 4], "dtype": "float32"}
    assert [len(stage["sigmas"]) for stage in model["sampler"]["later"]["stages"]] == [2, 2, 2]
    assert model["sampler"]["first"] is None and model["sampler"]["units"] == 2
    assert model["first_frame"] is None and model["text_graph"] == "text_encoder"
    assert model["host"]["arrays"]["stage_2/index"]["dtype"] == "int32"
    names = {path.name for path in (hybrid / "bundle").iterdir()}
    tokenizers = {entry["folder"] for entry in model["tokenizers"].values()}
    assert names == {"model.json", "host.safetensors", "graphs"} | tokenizers and len(tokenizers) == 3


@pytest.mark.parametrize("path", ["../x.onnx", "graphs/../../x.onnx", "/etc/passwd", "..\\x.onnx", "", None, 3])
@pytest.mark.parametrize(("key", "name", "entry"), [("graphs", "clip_l", "file"), ("tokenizers", "clip_l", "folder")])
def test_paths_stay_inside_the_bundle(copied, key, name, entry, path):
    changed(copied, lambda model: model[key][name].__setitem__(entry, path))
    with pytest.raises(UserError, match="no path inside the bundle; refused"):
        bundle_manifest.read_manifest(copied)


def test_links_stay_inside_the_bundle(copied, tmp_path):
    (tmp_path / "x.onnx").write_bytes((copied / "graphs" / "clip_l.onnx").read_bytes())
    (copied / "graphs" / "clip_l.onnx").unlink()
    (copied / "graphs" / "clip_l.onnx").symlink_to(tmp_path / "x.onnx")
    with pytest.raises(UserError, match="a link that leaves the bundle; refused"):
        bundle_manifest.read_manifest(copied)


def test_weights_stay_inside_the_bundle(copied):
    import onnx

    path = copied / "graphs" / "clip_l.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    entries = [e for t in proto.graph.initializer for e in t.external_data if e.key == "location"]
    entries[0].value = "../../weights.data"
    path.write_bytes(proto.SerializeToString())
    model = bundle_manifest.read_manifest(copied)
    with pytest.raises(UserError, match=r"a weight of graph clip_l is at '\.\./\.\./weights\.data'"):
        run_hexagon.graph_opener(copied, model)("clip_l")


def test_a_missing_graph_is_named(copied, capsys):
    (copied / "graphs" / "mmdit_stage1.onnx").unlink()
    command = ["--bundle", str(copied), "--prompt", PROMPT, "--output", str(copied.parent / "v.mp4")]
    assert run_command(lambda: run_hexagon.main(command)) == 1
    assert "graph mmdit_stage1 is missing, graphs/mmdit_stage1.onnx is not there" in capsys.readouterr().err
    assert not (copied.parent / "v.mp4").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.update(version=2), "version 2, this program reads 1"),
        (lambda model: model.pop("sampler"), "has no 'sampler'"),
        (lambda model: model.update(graphs=[]), "has no 'graphs'"),
    ],
)
def test_a_damaged_manifest(copied, change, message):
    with pytest.raises(UserError, match=message):
        bundle_manifest.read_manifest(changed(copied, change))


def test_a_graph_of_another_model(copied):
    model = bundle_manifest.read_manifest(copied)
    opener = run_hexagon.graph_opener(copied, model)
    with pytest.raises(UserError, match="has no graph t5_encoder"):
        opener("t5_encoder")
    with pytest.raises(UserError, match=r"input 'end_weights' is float32 \[1, 16\] and the host has None"):
        opener("clip_l")({"input_ids": np.zeros((1, 16), np.int32)})
    (copied / "graphs" / "clip_l.onnx.data").write_bytes(b"")
    with pytest.raises(UserError, match="onnxruntime does not load it"):
        opener("clip_l")


def test_hybrid_needs_a_picture(hybrid):
    with pytest.raises(UserError, match="mode hybrid starts from an image, and the bundle has no unet"):
        run_hexagon.bundle_frames(hybrid / "bundle", PROMPT)


def test_no_bundle(tmp_path):
    with pytest.raises(UserError, match=r"has no model\.json; make a bundle"):
        bundle_manifest.read_manifest(tmp_path)


def test_end_weights_where_no_end_token_is_named():
    spec = {"graphs": {"clip_g": {"inputs": [{"name": "end_weights"}]}}, "tokenizers": {"clip_g": {"end_token": None}}}
    tokenize = lambda text: {"ids": np.array([3, 9, 9, 0], np.int32), "mask": np.ones(4, np.int32)}
    given = bundle_host.token_inputs(spec, "clip_g", tokenize, "")
    np.testing.assert_array_equal(given["end_weights"], np.array([[0, 1, 0, 0]], np.float32))


def test_a_quantised_graph_in_a_bundle(hybrid, copied):
    """QuickSRNet of integers in the place of the float32 one, and what model.json says of it."""
    model = bundle_manifest.read_manifest(copied)
    options = GraphOptions(**graph_sizes.folder_sizes(hybrid / "model"))
    components = bundle.load_components(open_model(hybrid / "model"), "quicksrnet", {})
    graph, samples = bundle.build_graph("quicksrnet", components, options), copied / "samples"
    samples.mkdir()
    for i in range(3):
        np.savez(samples / f"{i}.npz", **graph.sample(np.random.default_rng(i)))
    report = bundle._export_quantised(graph, copied / "graphs", samples)
    entry = json.loads(json.dumps(bundle_manifest.graph_entry("quicksrnet", report)))
    before = model["graphs"]["quicksrnet"]
    assert (before["precision"], entry["precision"]) == ("fp16", "w8a16") and before["encodings"] == {}
    assert {"precision", "encodings"} == {key for key in entry if entry[key] != before.get(key)}
    assert sorted(entry["encodings"]) == ["frame", "large_frame"]
    assert all(encoding["dtype"] == "uint16" for encoding in entry["encodings"].values())
    sample = graph.sample(np.random.default_rng(9))
    made = run_hexagon.graph_opener(copied, model)("quicksrnet")(sample)["large_frame"]
    expected = np.asarray(graph.reference(*sample.values())[0])
    assert made.dtype == np.float32 and not np.array_equal(made, expected)
    assert np.abs(made - expected).max() < 0.5
    # The same integers by the encodings of model.json.
    low = entry["encodings"]["large_frame"]
    steps = made / np.float32(low["scale"])
    np.testing.assert_allclose(steps, np.round(steps), atol=0.01)


def test_calibration_of_another_model(hybrid, tmp_path):
    (tmp_path / "capture" / "clip_l").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no samples of vae_encoder; make them"):
        bundle.write_bundle(hybrid / "model", tmp_path / "bundle", calibration=tmp_path / "capture")
    for more in (["--precision", "w8a16"], ["--calibration", str(tmp_path)]):
        with pytest.raises(SystemExit):
            bundle.parse(["--model", str(hybrid), "--output", str(tmp_path), *more])


def test_a_transformer_in_parts(hybrid, tmp_path):
    """One block a graph, in both precisions; the whole is in no file."""
    bundle.write_bundle(hybrid / "model", tmp_path / "parts", chunk=1)
    model = json.loads((tmp_path / "parts" / "model.json").read_text())
    parts = [name for name in model["graphs"] if name.startswith("mmdit")]
    assert parts == [f"mmdit_stage{stage}_blocks{k}-{k + 1}" for stage in range(3) for k in range(len(parts) // 3)]
    assert len(parts) > 3 and "mmdit_stage0" in [call["graph"] for call in model["calls"]]
    frames = run_hexagon.bundle_frames(tmp_path / "parts", PROMPT, 3, hybrid / "first.png")
    whole = run_hexagon.bundle_frames(hybrid / "bundle", PROMPT, 3, hybrid / "first.png")
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(frames, whole, strict=True))


def test_a_quantised_part_makes_the_samples_of_the_next(hybrid, tmp_path):
    model, part = open_model(hybrid / "model"), {}
    components = bundle.load_components(model, "mmdit_stage0", {})
    options = GraphOptions(**graph_sizes.folder_sizes(hybrid / "model"))
    for k in range(2):
        part[k] = bundle.build_graph("mmdit_stage0", components, dataclasses.replace(options, blocks=(k, k + 1)))
    sample, samples = part[0].sample(np.random.default_rng(0)), tmp_path / "samples"
    samples.mkdir()
    np.savez(samples / "0.npz", **sample)
    report = bundle._export_quantised(part[0], tmp_path / "graphs", samples, tmp_path / "next")
    assert report["quantised"]["precision"] == "w8a16"
    following = read_sample(tmp_path / "next" / "0.npz", list(part[1].inputs))
    expected = part[0].reference(*(sample[spec.name] for spec in part[0].inputs))
    for spec, array in zip(part[0].outputs, expected, strict=True):
        np.testing.assert_allclose(following[spec.name.removesuffix("_out")], array, atol=1e-4)
