"""The generate command on tiny random model folders, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import generate
from experiments.random_model import component_configs, random_params, write_random_model
from nd_jax.errors import UserError
from nd_jax.generate import pipeline
from nd_jax.generate.model_folder import GenerationSettings, open_model, read_settings
from nd_jax.generate.videos import read_image
from nd_jax.models.video_vae import normalize_latents
from nd_jax.weights.folder import load_component
from nd_jax.weights.networks import abstract_params

PROMPTS = ("a red circle moves left", "a blue square moves up", '../we/ird  prompt: "ünïcode"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two model folders, prompts and an image."""
    root = tmp_path_factory.mktemp("generate")
    for size in ("tiny", "tiny-teacher"):
        write_random_model(root / size, size, dtype="float32")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(root / "first.png")
    return root


def run(root, output, *more, size="tiny", prompts="prompts.txt"):
    command = ["--model", root / size, "--prompts", root / prompts, "--output", output, "--dtype", "float32", *more]
    return generate.main([str(part) for part in command])


def image_of(root):
    return "--image", root / "first.png", "--super-resolution", "off"


@pytest.fixture(scope="module")
def hybrid(folder):
    output = folder / "hybrid"
    assert run(folder, output, "--latents", *image_of(folder)) == 0
    return output


def arrays(output):
    return {path.name: np.load(path) for path in sorted(output.glob("*.npy"))}


def test_a_video_per_prompt_and_a_summary(hybrid):
    import av

    videos = sorted(hybrid.glob("*.mp4"))
    assert [path.name[:5] for path in videos] == ["00000", "00001", "00002"]
    assert videos[2].name.startswith("00002-we-ird-prompt-n-code-")
    with av.open(str(videos[0])) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 64, 8)
        assert len(list(container.decode(video=0))) == 9
    summary = json.loads((hybrid / "generate.json").read_text())
    assert summary["made"] == 3 and set(summary["files"]) == {p.name for p in hybrid.iterdir()} - {"generate.json"}
    assert set(summary["seconds"]) == {"text", "encoder", "transformer", "decoder"}
    assert list(summary["seconds_per_call"]["later"]) == ["stage_0", "stage_1", "stage_2"]
    assert summary["settings"]["function_evaluations"] == 3 and summary["peak_memory_gib"] > 0
    assert not list(hybrid.glob(".*"))


def test_the_first_frame_is_a_sample_of_the_image(folder, hybrid):
    model = open_model(folder / "tiny")
    posterior = pipeline.encode_first_frames(model, [read_image(folder / "first.png", 64, 64)], np.float32)
    z = [latents[:1] for latents in arrays(hybrid).values()]
    mean = np.asarray(normalize_latents(model.vae, posterior.mean)[0])
    std = model.vae.latent_scale[0] * np.exp(0.5 * posterior.logvar[0])
    standard = np.stack([(sample - mean) / std for sample in z])
    assert abs(standard.mean()) < 0.15 and abs(standard.std() - 1) < 0.15
    # Each prompt draws its own.
    assert abs(np.mean(standard[0] * standard[1])) < 0.3


def test_a_second_run_makes_what_is_missing_and_the_same(folder, hybrid, capsys):
    before = arrays(hybrid)
    lost = sorted(hybrid.glob("*.npy"))[1]
    lost.unlink()
    lost.with_suffix(".mp4").unlink()
    kept = {path: path.stat().st_mtime_ns for path in hybrid.glob("0000[02]*")}
    assert run(folder, hybrid, "--latents", *image_of(folder)) == 0
    assert "1 videos made, 2 there already" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(lost), before[lost.name])
    assert lost.with_suffix(".mp4").exists()
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert run(folder, hybrid, "--latents", *image_of(folder)) == 0
    assert "0 videos made, 3 there already" in capsys.readouterr().out


def test_latents_of_an_interrupted_run_are_decoded(folder, hybrid, tmp_path):
    output = tmp_path / "resumed"
    shutil.copytree(hybrid, output)
    for path in output.glob("*.mp4"):
        path.unlink()
    assert run(folder, output, *image_of(folder)) == 0
    assert "transformer" not in json.loads((output / "generate.json").read_text())["seconds"]
    assert len(list(output.glob("*.mp4"))) == 3 and not list(output.glob("*.npy"))


def test_batches_and_devices_change_nothing(folder, hybrid, tmp_path):
    assert run(folder, tmp_path / "sharded", "--latents", "--batch", 8, "--shard", *image_of(folder)) == 0
    got = arrays(tmp_path / "sharded")
    for name, expected in arrays(hybrid).items():
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert json.loads((tmp_path / "sharded" / "generate.json").read_text())["devices"] == 8


def test_monolithic_with_the_teachers_kinds(folder, tmp_path):
    (folder / "one.txt").write_text(PROMPTS[1] + "\n")
    assert run(folder, tmp_path / "out", "--latents", size="tiny-teacher", prompts="one.txt") == 0
    summary = json.loads((tmp_path / "out" / "generate.json").read_text())
    assert summary["settings"]["mode"] == "monolithic" and summary["settings"]["function_evaluations"] == 14
    assert set(summary["seconds_per_call"]) == {"first", "later"} and "encoder" not in summary["seconds"]
    (latents,) = arrays(tmp_path / "out").values()
    assert latents.shape == (2, 8, 8, 4) and latents.dtype == np.float32 and np.isfinite(latents).all()
    unguided = open_model(folder / "tiny-teacher", guidance=(1.0, 1.0)).sampler()
    assert unguided.function_evaluations == 7 and not unguided.needs_negative


def test_other_settings_in_the_same_folder_are_refused(folder, hybrid):
    with pytest.raises(UserError, match=r"made with seed 0, not 1; choose another --output"):
        run(folder, hybrid, "--seed", 1, *image_of(folder))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mode", "monolithic", "--image", "first.png"), "mode monolithic takes no image"),
        (("--image", "absent.png"), r"absent\.png: No such file or directory; give a PNG"),
        (("--keep-first-frames", "--mode", "monolithic"), "--keep-first-frames: no first frame is made"),
        (("--frames", 10), "a clip of 10 video frames does not fit"),
        (("--height", 60), "60 x 64 pixels: give multiples of 32"),
        (("--steps", "1,1"), r"steps is \[1, 1\]: give 3"),
        (("--steps", "1,1,0"), r"steps is \(1, 1, 0\)"),
        (("--guidance", "3"), r"guidance is \(3.0,\): give two numbers"),
        (("--transformer", "absent"), "absent"),
    ],
)
def test_bad_arguments_are_named(folder, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_parts_of_unlike_models_are_named(folder, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(folder / "tiny", mixed)
    shutil.rmtree(mixed / "diffusion_transformer_320p")
    with pytest.raises(UserError, match=r"has no diffusion_transformer\*"):
        open_model(mixed)
    for name in ("diffusion_transformer_384p", "diffusion_transformer_768p"):
        shutil.copytree(folder / "tiny-teacher" / "diffusion_transformer_384p", mixed / name)
    with pytest.raises(UserError, match=r"several transformers \(diffusion_transformer_384p, diff"):
        open_model(mixed)
    assert open_model(mixed, "diffusion_transformer_768p").transformer.context_embedder
    config = mixed / "diffusion_transformer_384p" / "config.json"
    config.write_text(config.read_text().replace('"pooled_projection_dim": 16', '"pooled_projection_dim": 12'))
    with pytest.raises(UserError, match="16 channels of the pooled text, but diffusion_transformer_384p takes 12"):
        open_model(mixed, "diffusion_transformer_384p")


def test_the_mode_chooses_the_transformer(folder, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(folder / "tiny", both)
    for name in ("diffusion_transformer_320p", "context_adapter"):
        shutil.copytree(both / name, both / f"{name}_multistep_t2v")
    assert open_model(both).parts["transformer"] == "diffusion_transformer_320p"
    multistep = open_model(both, mode="monolithic")
    assert multistep.parts["context_adapter"] == "context_adapter_multistep_t2v"
    assert multistep.parts["transformer"] == "diffusion_transformer_320p_multistep_t2v"
    assert multistep.sampler().first_steps == (20, 20, 20) and multistep.sampler().guidance == 5.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hight": 64}', "'hight' is unknown; the keys are height"),
        ('{"height": "64"}', "height is '64': give a positive whole number"),
        ('{"steps": [1, true, 1]}', "steps is"),
        ('{"guidance": 7}', "guidance is 7"),
        ('{"mode": "both"}', "mode is 'both'"),
        ('{"frame_rate": 0}', "frame_rate is 0"),
        ('{"negative_prompt": 3}', "negative_prompt is 3"),
    ],
)
def test_bad_generation_settings_are_named(tmp_path, text, message):
    (tmp_path / "generation.json").write_text(text)
    with pytest.raises(UserError, match=rf"generation\.json: .*{message}"):
        read_settings(tmp_path)


def test_a_folder_without_generation_settings_makes_the_released_video(tmp_path):
    assert read_settings(tmp_path) == GenerationSettings()


def test_full_size_random_models_have_the_released_sizes():
    parts, settings = component_configs("full")
    counts = {n: sum(leaf.size for leaf in jax.tree.leaves(abstract_params(*part))) for n, part in parts.items()}
    assert settings == {}
    assert counts == {
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 129_551_488,
        "context_adapter": 130_041_344,
        "diffusion_transformer_320p": 1_512_155_200,
        "causal_video_vae": 119_543_507,
        "ssd_1b_text_encoder": 123_060_480,
        "ssd_1b_text_encoder_2": 694_659_840,
        "ssd_1b_unet": 1_331_334_404,
        "ssd_1b_vae": 83_653_863,
        "quicksrnet": 50_604,
    }


def test_random_weights_are_those_of_the_seed(folder, tmp_path):
    write_random_model(tmp_path / "again", "tiny", seed=0, dtype="float32")
    name = "diffusion_transformer_320p"
    one, other = (load_component(root / name) for root in (folder / "tiny", tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert one.config == other.config


def test_random_queries_of_t5_are_smaller_and_those_of_clip_are_not():
    parts, _ = component_configs("tiny")
    draw = lambda name: random_params(*parts[name], np.random.default_rng(0), np.float32)
    t5, clip = draw("text_encoder_3")["encoder"]["blocks"]["attention"], draw("text_encoder")["blocks"]["attention"]
    assert t5["query"]["kernel"].std() == pytest.approx(t5["key"]["kernel"].std() / 8**0.5, rel=0.1)
    assert clip["query"]["kernel"].std() == pytest.approx(clip["key"]["kernel"].std(), rel=0.1)


def test_random_weights_of_a_few_components(tmp_path):
    counts = write_random_model(tmp_path / "part", "tiny", components=["quicksrnet", "text_encoder"])
    assert list(counts) == ["text_encoder", "quicksrnet"]
    assert not (tmp_path / "part" / "causal_video_vae").exists()
    with pytest.raises(UserError, match="causal_vae: size tiny has only text_encoder, "):
        write_random_model(tmp_path / "none", "tiny", components=["causal_vae"])
