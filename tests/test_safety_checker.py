"""The safety checker against diffusers and transformers, and the command that uses it."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file

from converters import export_torch, import_torch
from experiments import generate
from experiments.random_model import write_random_model
from nd_jax.generate import safety
from nd_jax.models.safety_checker import SafetyCheckerConfig, Scores, unsafe
from nd_jax.weights.folder import load_component, read_config, save_component
from nd_jax.weights.networks import SAFETY_CHECKER

VISION = dict(hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
SIZES = dict(image_size=18, patch_size=4)  # 18 is no multiple of 4: two rows and columns are not seen.


@pytest.fixture(scope="module")
def public():
    """A checker with random parameters that all matter, its thresholds amid the scores."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=dict(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2),
        vision_config=dict(VISION, **SIZES),
        projection_dim=10,
    )
    model = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape)
            scale = 1.0 if "embed" in name else 0.4
            tensor.copy_(scale * noise + (tensor.ndim == 1 and "norm" in name and name.endswith("weight")))
        model.concept_embeds_weights.uniform_(0.4, 0.7)
        model.special_care_embeds_weights.uniform_(0.1, 0.4)
    return model


@pytest.fixture(scope="module")
def folder(public, tmp_path_factory):
    """The checker's folder with the keys of the released one, which has the tower within `vision_model` twice."""
    folder = tmp_path_factory.mktemp("checker") / "safety_checker"
    public.save_pretrained(folder)
    state = {}
    for key, tensor in public.state_dict().items():
        released = key.replace("vision_model.", "vision_model.vision_model.") if "vision_model." in key else key
        state[released] = tensor.contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    _, info = StableDiffusionSafetyChecker.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return folder.parent


def test_images_and_flags_are_those_of_diffusers(folder, public):
    random = np.random.default_rng(0)
    pixels = random.standard_normal((24, 18, 18, 3)).astype(np.float32)
    images = random.random((24, 5, 7, 3), np.float32)
    with torch.no_grad():
        embeds = public.visual_projection(public.vision_model(torch.from_numpy(pixels).permute(0, 3, 1, 2))[1])
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    component = load_component(folder / "safety_checker")
    scores = jax.jit(component.network.module(component.config).apply)({"params": component.params}, pixels)
    for got, theirs in (
        (scores.concepts, unit(embeds) @ unit(public.concept_embeds).T),
        (scores.special_care, unit(embeds) @ unit(public.special_care_embeds).T),
    ):
        np.testing.assert_allclose(got, theirs.detach().numpy(), rtol=0, atol=2e-5)

    expected, theirs = public(clip_input=torch.from_numpy(pixels).permute(0, 3, 1, 2), images=images.copy())
    checker = safety.safety_checker(folder)
    got, flags = checker(images=images, clip_input=pixels)
    assert flags == [bool(flag) for flag in theirs] and 3 < sum(flags) < 21
    np.testing.assert_array_equal(got, expected)
    assert images.all(axis=(1, 2, 3)).any(), "the images that were given are not changed"


def test_special_care_lowers_the_thresholds():
    """Scores a little below and above; the second special concept is met only because the first one was."""
    half = np.float32(0.5)
    scores = lambda concept, *care: Scores(
        np.full((1, 17), concept, np.float32), np.array([care], np.float32), np.full(17, half), np.full(3, half)
    )
    assert not unsafe(scores(0.495, 0.4, 0.4, 0.4)).any()
    assert unsafe(scores(0.495, 0.4, 0.6, 0.4)).all()
    assert not unsafe(scores(0.489, 0.4, 0.6, 0.4)).any()
    assert not unsafe(scores(0.5004, 0.4, 0.4, 0.4)).any()  # Rounded to three decimals.


@pytest.mark.parametrize(("height", "width"), [(32, 51), (40, 23), (18, 18)])
def test_clip_sees_the_middle_as_its_image_processor_cuts_it(height, width):
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 18}, crop_size={"height": 18, "width": 18}, resample=Image.Resampling.BICUBIC
    )
    expected = np.asarray(processor([Image.fromarray(frame)], return_tensors="np")["pixel_values"])
    got = safety.clip_input([frame], 18)
    np.testing.assert_allclose(got, np.moveaxis(expected, 1, -1), rtol=0, atol=1e-5)


def test_the_whole_tower_has_the_released_size():
    """Stable Diffusion's checker: ViT-L/14 and 20 concepts."""
    shapes = jax.eval_shape(
        SAFETY_CHECKER.module(SafetyCheckerConfig()).init,
        jax.random.key(0),
        *SAFETY_CHECKER.inputs(SafetyCheckerConfig()),
    )["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 303_179_776 + 1024 * 768 + 20 * 768 + 20


def test_the_checker_comes_back_byte_by_byte(folder, tmp_path):
    report = import_torch.import_torch(folder, tmp_path / "store")
    assert report["components"]["safety_checker"]["network"] == "safety_checker"
    export_torch.export_torch(tmp_path / "store", tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / "safety_checker" / name).read_bytes() == (
            folder / "safety_checker" / name
        ).read_bytes()
    assert read_config(tmp_path / "out" / "safety_checker")[1].tokens == 17


@pytest.mark.parametrize(("frames", "flagged"), [(1, False), (3, True), (99, True)])
def test_frames_are_looked_at_as_in_the_public_script(frames, flagged):
    """Evenly spaced, the first one alone if it is one; the frame that is flagged is the last of nine."""
    seen = []

    def checker(images, clip_input):
        assert clip_input.shape == (len(images), 18, 18, 3) and images.max() <= 1
        seen.extend(images[:, 0, 0, 0].round(3))
        return images, [bool(image[0, 0, 0] > 0.9) for image in images]

    video = [np.full((20, 30, 3), 30 * k, np.uint8) for k in range(9)]
    assert safety.is_unsafe(checker, 18, video, frames) is flagged
    assert len(seen) == min(frames, 9) and seen[0] == 0


def test_a_flagged_video_is_black_and_said_so(folder, tmp_path, capsys):
    import av

    model = tmp_path / "model"
    write_random_model(model, "tiny", dtype="float32")
    (tmp_path / "prompts.txt").write_text("a red circle moves left\n")
    command = ["--model", model, "--prompts", tmp_path / "prompts.txt", "--keep-first-frames", "--latents"]
    run = lambda output: generate.main([str(part) for part in (*command, "--output", tmp_path / output)])
    assert run("unchecked") == 0
    assert f"safety checker: off, {model} has none" in capsys.readouterr().out
    # Thresholds that every picture passes, and none. The latents are there already.
    component, said = load_component(folder / "safety_checker"), {}
    for output, threshold in (("passed", 2.0), ("flagged", -2.0)):
        params = {**component.params, "concept_thresholds": np.full(17, threshold, np.float32)}
        save_component(model / "safety_checker", SAFETY_CHECKER, component.config, params)
        shutil.copytree(tmp_path / "unchecked", tmp_path / output, ignore=shutil.ignore_patterns("*.mp4", "*.json"))
        assert run(output) == 0
        said[output] = capsys.readouterr().out
    assert "is black: the safety checker flagged it" in said["flagged"] and "flagged it" not in said["passed"]
    assert "safety checker: off" not in said["flagged"] + said["passed"]
    summaries = {name: json.loads((tmp_path / name / "generate.json").read_text()) for name in said}
    assert summaries["passed"]["unsafe"] == [] and summaries["flagged"]["unsafe"] == [0]
    assert summaries["passed"]["settings"]["safety_frames"] == 1
    assert set(summaries["passed"]["seconds"]) == {"decoder", "super_resolution", "safety_checker"}
    file = lambda name, suffix: next((tmp_path / name).glob(f"*{suffix}"))
    assert file("passed", ".mp4").read_bytes() == file("unchecked", ".mp4").read_bytes()
    assert file("passed", ".png").read_bytes() == file("unchecked", ".png").read_bytes()
    with av.open(str(file("flagged", ".mp4"))) as container:
        assert max(frame.to_ndarray(format="rgb24").max() for frame in container.decode(video=0)) < 3
    assert not np.asarray(Image.open(file("flagged", ".png"))).any()
