"""Samples that `experiments.generate --capture` writes: the graphs' models on them give what the pipeline computed."""

import json

import numpy as np
import pytest

from converters import graphs
from converters.graph import GraphOptions
from converters.graph_sizes import folder_sizes
from converters.samples import read_sample
from experiments import capture, generate
from experiments.random_model import write_random_model
from nd_jax.errors import UserError
from nd_jax.generate import lcm
from nd_jax.generate.model_folder import open_model
from nd_jax.generate.pipeline import video_decoder
from nd_jax.generate.videos import read_picture, to_first_frame, to_picture, to_uint8, to_unit
from nd_jax.pyramid.layout import patchify

GUIDANCE, STEPS = 2.0, [1, 2, 1]
PROMPTS = ("a red circle moves left", "a blue square moves up slowly")


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A tiny model of all components, the videos of two prompts with guidance, and all their samples."""
    root = tmp_path_factory.mktemp("capture")
    write_random_model(root / "model", "tiny", dtype="float32")
    settings = root / "model" / "generation.json"
    more = {"guidance": [1, GUIDANCE], "steps": STEPS, "prompt_modifier": " slowly"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | more))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    assert run(root) == 0
    return root


def run(root, *more, samples=100):
    command = ["--model", root / "model", "--prompts", root / "prompts.txt", "--output", root / "videos", "--latents"]
    command += ["--keep-first-frames", "--capture", root / "capture", "--capture-samples", samples, *more]
    return generate.main([str(part) for part in command])


@pytest.fixture(scope="module")
def graph(captured):
    """Name -> graph, and (name, prompt, call) -> its sample, which has to fit the graph."""
    options = GraphOptions(**folder_sizes(captured / "model"))
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = graphs.load_graph(name, captured / "model", options)
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def outputs(captured, graph):
    """(graph, prompt or "negative", call) -> (inputs, what the graph's model makes of them)."""

    def of(name, prompt, call=0):
        row = f"prompt_{prompt:05}" if isinstance(prompt, int) else prompt
        (file,) = (captured / "capture" / name).glob(f"*_{row}_call_{call:04}.npz")
        inputs = read_sample(file, list(graph(name).inputs))
        made = graph(name).reference(*inputs.values())
        return inputs, dict(zip([spec.name for spec in graph(name).outputs], map(np.asarray, made), strict=True))

    return of


def video_file(root, prompt, suffix):
    (file,) = (root / "videos").glob(f"{prompt:05}*{suffix}")
    return file


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_the_last_step_of_the_transformer(captured, outputs, prompt):
    """x + (sigma' - sigma) (v- + g (v+ - v-)) is the latent frame that the sampler wrote."""
    model = open_model(captured / "model")
    expected = np.load(video_file(captured, prompt, ".npy"))[1]
    velocities = [outputs("mmdit_stage2", prompt, call)[1]["velocity"][0] for call in range(2)]
    tokens = outputs("mmdit_stage2", prompt)[0]["tokens"][0, -len(velocities[0]) :]
    sigmas = model.sampler().schedule.inference_steps(2, STEPS[2]).sigmas
    end = tokens + (sigmas[1] - sigmas[0]) * (velocities[0] + GUIDANCE * (velocities[1] - velocities[0]))
    expected = np.asarray(patchify(expected[None, None], model.transformer.patch_size))[0]
    np.testing.assert_allclose(end, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_branches_and_units_have_inputs_of_their_own(captured, outputs):
    """Branches differ in the text, steps in the time, and the history is that of the first latent frame."""
    negative, positive, next_step = (outputs("mmdit_stage1", 0, call)[0] for call in (0, 1, 2))
    np.testing.assert_array_equal(negative["tokens"], positive["tokens"])
    for name in ("context", "conditioning", "mask"):
        assert not np.array_equal(negative[name], positive[name]), name
    assert not np.array_equal(negative["conditioning"], next_step["conditioning"])
    np.testing.assert_array_equal(negative["context"], next_step["context"])
    for name, sample in ((0, positive), ("negative", negative)):
        np.testing.assert_allclose(sample["context"], outputs("text_encoder", name)[1]["context"], atol=1e-5)


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_the_last_frames_of_the_decoder(captured, outputs, prompt):
    """The second call, on the states that the first one left behind."""
    decode = video_decoder(open_model(captured / "model"), np.float32)
    expected = list(decode(np.load(video_file(captured, prompt, ".npy"))))[1:]
    made = outputs("decoder_stream", prompt, 1)[1]
    frames = np.stack([to_uint8(made[f"frame_{k}"][0]) for k in range(8)]).astype(int)
    assert np.abs(frames - np.stack(expected)).max() <= 1
    for k in (0, 7):
        given = outputs("quicksrnet", prompt, 1 + k)[0]["frame"][0]
        assert np.abs(255 * given - frames[k]).max() < 1.01


def test_the_first_frame(captured, graph, outputs):
    """The last step of the UNet leads to the latents that the image decoder was given, and these to the picture."""
    inputs, made = outputs("unet", 1, 3)
    schedule = lcm.lcm_schedule(lcm.SSD_1B, 4)
    noise = np.zeros_like(inputs["latents"])
    latents = np.array(lcm.lcm_step(lcm.SSD_1B, schedule, 3, inputs["latents"], made["prediction"], noise)[0])
    given, image = outputs("image_decoder", 1)
    latents /= graph("image_decoder").notes["scaling_factor"]
    np.testing.assert_allclose(given["latents"], latents, rtol=0, atol=1e-4 * np.abs(latents).max())
    kept = read_picture(video_file(captured, 1, ".png"))
    picture = to_picture(to_unit(image["image"][0]))
    assert np.abs(picture.astype(int) - kept).max() <= 1
    given = outputs("vae_encoder", 1)[0]["image"][0]
    assert np.abs(given - to_first_frame(kept, 64, 64)).max() <= 1.5 / 127.5


def test_what_is_written(captured):
    summary = json.loads((captured / "capture" / "capture.json").read_text())
    counts = {name: len(samples) for name, samples in summary["graphs"].items()}
    text = dict.fromkeys(("text_encoder", "clip_l", "clip_g"), 3)
    first = dict.fromkeys(("first_frame_clip_l", "first_frame_clip_g", "image_decoder", "vae_encoder"), 2)
    stages = {"mmdit_stage0": 4, "mmdit_stage1": 8, "mmdit_stage2": 4}
    assert counts == text | first | stages | {"unet": 8, "decoder_stream": 4, "quicksrnet": 18}
    for name, samples in summary["graphs"].items():
        files = sorted(path.name for path in (captured / "capture" / name).iterdir())
        assert files == [sample["file"] for sample in samples]
    assert summary["prompts"] == {"0": PROMPTS[0], "1": PROMPTS[1]} and summary["settings"]["seed"] == 0


def test_it_is_not_done_twice(captured, capsys):
    before = (captured / "capture" / "capture.json").stat().st_mtime_ns
    assert run(captured) == 0
    assert "0 videos made" in capsys.readouterr().out
    assert (captured / "capture" / "capture.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="of other settings; remove it or choose another --capture"):
        run(captured, samples=3)


def test_a_teacher_and_few_samples(tmp_path, capsys):
    """No first frame, T5 in the place of DistilT5, a decoder that is no graph, more prompts than samples."""
    write_random_model(tmp_path / "model", "tiny-teacher", dtype="float32")
    prompts = {id: f"a circle moves {id}" for id in range(5)}
    counts = capture.capture_samples(open_model(tmp_path / "model"), prompts, tmp_path / "capture", 3)
    stages = [f"mmdit_stage{stage}" for stage in range(3)]
    assert counts == dict.fromkeys(("t5_encoder", "clip_l", "clip_g", *stages), 3)
    assert "its decoder is no graph" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "capture" / "capture.json").read_text())["prompts"]) == 3


@pytest.mark.parametrize(("rows", "calls", "count"), [(8, 18, 32), (32, 18, 32), (3, 4, 12), (5, 7, 2), (1, 9, 4)])
def test_calls_are_spread(rows, calls, count):
    chosen = capture.choose_calls(rows, calls, count, np.random.default_rng(0))
    assert len(set(chosen)) == count and chosen == capture.choose_calls(rows, calls, count, np.random.default_rng(0))
    by_row = np.bincount([row for row, _ in chosen], minlength=rows)
    assert by_row.max() - by_row.min() <= 1
    by_third = np.histogram([call for _, call in chosen], 3, (0, calls))[0]
    assert count < 6 or by_third.max() - by_third.min() <= max(3, count // 4)


def test_more_calls_than_there_are():
    with pytest.raises(ValueError, match="7 of 2 x 3 calls"):
        capture.choose_calls(2, 3, 7, np.random.default_rng(0))
