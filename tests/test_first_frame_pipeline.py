"""Prompts to videos by way of first frames: against diffusers' pipeline, and by the command on a tiny model folder."""

import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from experiments import generate
from experiments.random_model import write_random_model
from nd_jax.data.tokenizers import load_tokenizer
from nd_jax.errors import UserError
from nd_jax.generate import first_frame, pipeline
from nd_jax.generate.model_folder import open_model
from nd_jax.generate.super_resolution import upscaler
from nd_jax.generate.videos import read_image, to_picture
from nd_jax.models.quicksrnet import QuickSRNet, QuickSRNetConfig
from nd_jax.models.unet import UNet
from nd_jax.models.video_vae import normalize_latents
from nd_jax.train.sharding import make_mesh
from nd_jax.weights.folder import load_component, save_component
from nd_jax.weights.networks import CLIP_TEXT, CLIP_TEXT_MODEL, QUICKSRNET

PROMPTS = ("a red circle moves left", "a blue square moves up", "a green triangle")
TOKENS = 16
SIZE = (32, 48)  # Unlike sides, so that none is taken for the other.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("first_frame") / "model"
    write_random_model(root, "tiny", dtype="float32")
    (root.parent / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


# --- against diffusers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(folder):
    """The public pipeline of the folder, put together as the released code does."""
    load = lambda public, name, **options: public.from_pretrained(folder / name, **options).eval()
    tokenizers = [load_tokenizer(folder / name) for name in first_frame.TOKENIZER_FOLDERS]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = TOKENS
    scheduler = diffusers.LCMScheduler(set_alpha_to_one=False, original_inference_steps=4, steps_offset=1)
    clip, clip_2 = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    made = diffusers.StableDiffusionXLPipeline(
        load(diffusers.AutoencoderKL, "ssd_1b_vae", low_cpu_mem_usage=False),
        load(clip, "ssd_1b_text_encoder"),
        load(clip_2, "ssd_1b_text_encoder_2"),
        *tokenizers,
        load(diffusers.UNet2DConditionModel, "ssd_1b_unet", low_cpu_mem_usage=False),
        scheduler,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_the_picture_is_that_of_the_public_pipeline(folder, public, monkeypatch):
    """From the words to the picture, with the noise of both pipelines the same."""
    model = first_frame.open_first_frame(folder)
    text = first_frame.encode_prompts(model, PROMPTS[:2], np.float32)
    shape = (*(side // model.vae.space_factor for side in SIZE), 4)
    noise = first_frame.draw_noise(jax.random.split(jax.random.key(0), 2), shape)
    params = load_component(folder / "ssd_1b_unet").params
    latents = first_frame.denoise(UNet(model.unet), params, text, noise, SIZE)
    decode = first_frame.image_decoder(model, np.float32)
    pictures = np.stack([decode(row) for row in np.asarray(latents)])

    theirs = torch.from_numpy(np.moveaxis(np.asarray(noise), -1, 2).copy())
    later = iter(theirs.unbind(1)[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *args, **kwargs: next(later))
    call = dict(height=SIZE[0], width=SIZE[1], guidance_scale=0.0, timesteps=[999, 749, 499, 249])
    expected = public(list(PROMPTS[:2]), latents=theirs[:, 0], output_type="np", **call).images
    assert expected.shape == pictures.shape == (2, *SIZE, 3) and expected.std() > 0.05
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-3)
    # The prompts matter, and so do the numbers of both pipelines' later noise.
    assert np.abs(pictures[0] - pictures[1]).max() > 0.05
    assert len(list(later)) == 1

    resized = public.image_processor.numpy_to_pil(expected)[0].resize((24, 16), resample=Image.Resampling.LANCZOS)
    path = folder.parent / "picture.png"
    Image.fromarray(to_picture(pictures[0])).save(path)
    ours = read_image(path, 16, 24)
    # A level of 8 bits that falls the other way is 2 / 255 here.
    np.testing.assert_allclose(ours, np.asarray(resized, np.float32) / 127.5 - 1, rtol=0, atol=0.017)
    assert np.abs(ours - (np.asarray(resized, np.float32) / 127.5 - 1)).mean() < 1e-3


def test_the_first_encoder_may_have_a_projection(folder, tmp_path):
    """Some folders hold the class with projection; its penultimate states are the same."""
    mixed = tmp_path / "model"
    shutil.copytree(folder, mixed)
    plain = load_component(folder / "ssd_1b_text_encoder")
    assert plain.network is CLIP_TEXT_MODEL and plain.config.projection_dim is None
    config = CLIP_TEXT.read_config({**json.loads((folder / "ssd_1b_text_encoder" / "config.json").read_text())})
    shape = (config.hidden_size, config.projection_dim)
    params = {**plain.params, "text_projection": {"kernel": np.ones(shape, np.float32)}}
    save_component(mixed / "ssd_1b_text_encoder", CLIP_TEXT, config, params)
    texts = [
        first_frame.encode_prompts(first_frame.open_first_frame(root), PROMPTS[:1], np.float32)
        for root in (folder, mixed)
    ]
    jax.tree.map(np.testing.assert_array_equal, *texts)


# --- the command ------------------------------------------------------------------------------------------------------


def run(folder, output, *more):
    prompts = folder.parent / "prompts.txt"
    command = ["--model", folder, "--prompts", prompts, "--output", output, "--dtype", "float32", *more]
    return generate.main([str(part) for part in command])


EVERYTHING = ("--keep-first-frames", "--latents", "--super-resolution", "both")


@pytest.fixture(scope="module")
def made(folder):
    output = folder.parent / "made"
    assert run(folder, output, *EVERYTHING) == 0
    return output


def arrays(output, suffix):
    read = {".npy": np.load, ".png": lambda path: np.asarray(Image.open(path))}[suffix]
    return {path.stem: read(path) for path in sorted(output.glob(f"*{suffix}"))}


def test_prompts_become_large_videos(made):
    import av

    summary = json.loads((made / "generate.json").read_text())
    assert set(summary["files"]) == {path.name for path in made.iterdir()} - {"generate.json"}
    assert len(summary["files"]) == 4 * len(PROMPTS) and not list(made.glob(".*"))
    for suffix, side in ((".mp4", 128), (".small.mp4", 64)):
        videos = [path for path in sorted(made.glob("*.mp4")) if ("small" in path.name) == ("small" in suffix)]
        assert len(videos) == len(PROMPTS)
        with av.open(str(videos[0])) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height, stream.average_rate) == (side, side, 8)
            assert len(list(container.decode(video=0))) == 9
    assert set(summary["seconds"]) == {
        *("first_frame_text", "first_frame_unet", "first_frame_decoder"),
        *("text", "encoder", "transformer", "decoder", "super_resolution"),
    }
    assert list(summary["seconds_per_call"]["first_frame"]) == ["unet"]
    assert summary["settings"]["first_frame_steps"] == 4 and summary["settings"]["image"] is None


def test_every_video_starts_from_its_own_picture(folder, made):
    model, pictures = open_model(folder), arrays(made, ".png")
    assert [picture.shape for picture in pictures.values()] == [(128, 128, 3)] * 3
    images = [read_image(path, 64, 64) for path in sorted(made.glob("*.png"))]
    posterior = pipeline.encode_first_frames(model, images, np.float32)
    mean = np.asarray(normalize_latents(model.vae, posterior.mean))
    std = model.vae.latent_scale[0] * np.exp(0.5 * posterior.logvar)
    z = np.stack([latents[:1] for latents in arrays(made, ".npy").values()])
    standard = (z - mean) / std
    assert abs(standard.mean()) < 0.1 and abs(standard.std() - 1) < 0.1
    # Not the picture of another prompt: those fit worse, each of them.
    for k in range(3):
        fits = [np.square((z[k] - mean[j]) / std[j]).mean() for j in range(3)]
        assert np.argmin(fits) == k


def test_what_is_missing_is_made_again_and_the_same(folder, made, tmp_path, capsys):
    output = tmp_path / "again"
    shutil.copytree(made, output)
    (lost,) = output.glob("00001*.small.mp4")
    stem = lost.name.removesuffix(".small.mp4")
    for path in output.glob(f"{stem}*"):
        path.unlink()
    assert run(folder, output, *EVERYTHING) == 0
    assert "1 videos made, 2 there already" in capsys.readouterr().out
    for suffix in (".npy", ".png"):
        np.testing.assert_array_equal(arrays(output, suffix)[stem], arrays(made, suffix)[stem])
    assert lost.read_bytes() == (made / lost.name).read_bytes()


def test_an_interrupted_run_goes_on_from_its_pictures(folder, made, tmp_path):
    output = tmp_path / "resumed"
    shutil.copytree(made, output)
    for path in (*output.glob("*.mp4"), *output.glob("*.npy")):
        path.unlink()
    assert run(folder, output, "--latents", "--super-resolution", "both") == 0
    assert not {"first_frame_text", "first_frame_unet"} & set(
        json.loads((output / "generate.json").read_text())["seconds"]
    )
    assert not list(output.glob("*.png"))
    for name, expected in arrays(made, ".npy").items():
        np.testing.assert_array_equal(arrays(output, ".npy")[name], expected)


def test_batches_and_devices_change_nothing(folder):
    """Three prompts one by one, and filled up to eight on eight devices."""
    model, ids = first_frame.open_first_frame(folder), (4, 0, 7)
    text = first_frame.encode_prompts(model, PROMPTS, np.float32)
    sample = lambda *more: [
        row for batch in first_frame.sample_latents(model, text, ids, 3, SIZE, *more) for row in batch
    ]
    alone, together = sample(1, np.float32), sample(8, np.float32, make_mesh({"data": -1}))
    assert [row.shape for row in together] == [(8, 12, 4)] * 3
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5 * np.abs(one).max())
    with pytest.raises(UserError, match="a batch of 3 does not divide among 8 devices"):
        sample(3, np.float32, make_mesh({"data": -1}))


def test_other_settings_in_the_same_folder_are_refused(folder, made):
    for more, message in (
        (("--super-resolution", "off"), "made with super_resolution 'both', not None"),
        (
            ("--super-resolution", "both", "--prompt-modifier", ", sharp"),
            "made with prompt_modifier None, not ', sharp'",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, made, *more)


def test_the_modifier_is_a_part_of_every_prompt(folder, tmp_path, monkeypatch):
    """Of the first frame's and of the video's; the command is stopped behind either."""

    class Stop(Exception):
        pass

    def keep(model, texts, *rest):
        seen.append(list(texts))
        raise Stop

    seen = []
    Image.new("RGB", (8, 8)).save(tmp_path / "first.png")
    for module, more in ((first_frame, ()), (pipeline, ("--image", tmp_path / "first.png"))):
        monkeypatch.setattr(module, "encode_prompts", keep)
        with pytest.raises(Stop):
            run(folder, tmp_path / module.__name__, "--prompt-modifier", ", sharp", *more)
    assert seen == [[f"{prompt}, sharp" for prompt in PROMPTS]] * 2


# --- super-resolution -------------------------------------------------------------------------------------------------


def test_an_untrained_network_repeats_pixels(tmp_path):
    config = QuickSRNetConfig(scaling_factor=3, num_channels=8)
    params = QuickSRNet(config).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    save_component(tmp_path / "quicksrnet", QUICKSRNET, config, params)
    frame = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    larger = upscaler(tmp_path)(frame)
    assert larger.dtype == np.uint8
    np.testing.assert_array_equal(larger, frame.repeat(3, axis=0).repeat(3, axis=1))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_folder_without_these_parts_says_so(folder, tmp_path):
    bare = tmp_path / "model"
    shutil.copytree(folder, bare)
    shutil.rmtree(bare / "quicksrnet")
    (bare.parent / "prompts.txt").write_text(PROMPTS[0])
    with pytest.raises(UserError, match=r"has no quicksrnet; import one \(docs/super_resolution.md\)"):
        run(bare, tmp_path / "out", "--super-resolution", "on")
    shutil.rmtree(bare / "ssd_1b_vae")
    with pytest.raises(UserError, match="has no ssd_1b_vae, so it makes no first frame"):
        run(bare, tmp_path / "out")
    shutil.rmtree(bare / "ssd_1b_unet")
    with pytest.raises(UserError, match="has no ssd_1b_unet to make one: give --image, or --mode monolithic"):
        run(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("ssd_1b_unet", "cross_attention_dim", 24, "32 channels of the text context, but ssd_1b_unet has 24"),
        ("ssd_1b_unet", "projection_class_embeddings_input_dim", 30, "8 channels of the pooled text, but .* has 6"),
        ("ssd_1b_vae", "latent_channels", 3, "3 latent channels of the image autoencoder, but ssd_1b_unet has 4"),
        ("ssd_1b_text_encoder", "architectures", ["T5EncoderModel"], "ssd_1b_text_encoder"),
    ],
)
def test_parts_of_unlike_models_are_named(folder, tmp_path, name, key, value, message):
    mixed = tmp_path / "model"
    shutil.copytree(folder, mixed)
    path = mixed / name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=message):
        first_frame.open_first_frame(mixed)
