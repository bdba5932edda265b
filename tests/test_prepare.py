"""`experiments.prepare`: the latents of the right clips, whatever stops it, whoever shares the work."""

import json

import jax
import numpy as np
import pytest

from experiments import prepare
from nd_jax.data import latent_shards
from nd_jax.data.latents import LatentSource, LatentTransform, read_manifest
from nd_jax.data.toy_world import ToyWorld
from nd_jax.data.video_reader import read_clip
from nd_jax.errors import UserError
from nd_jax.models.video_vae import VideoVAEEncoder
from nd_jax.weights.folder import load_component, save_component
from nd_jax.weights.vae import CAUSAL_VIDEO_VAE, VIDEO_VAE_ENCODER
from tests.test_video_vae import NATIVE, NATIVE_PARAMS
from tests.video_case import cut_short, grey_frames, noise_frames, write_video

RATE, FRAMES, HEIGHT, WIDTH = 10, 9, 16, 24


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "grey.mp4", grey_frames(20), RATE)
    write_video(folder / "noise.mp4", noise_frames(30), RATE)
    cut_short(write_video(folder / "cut.mp4", noise_frames(20), RATE))
    (folder / "text.mp4").write_text("no video")
    names = ("grey", "cut", "text", "noise")
    lines = [json.dumps({"video": f"{name}.mp4", "caption": f"a video of {name}"}) for name in names]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def model(tmp_path):
    save_component(tmp_path / "model" / "causal_video_vae", CAUSAL_VIDEO_VAE, NATIVE, NATIVE_PARAMS)
    return tmp_path / "model"


def arguments(videos, model, output, **options):
    options = {
        "videos": videos,
        "captions": videos / "captions.jsonl",
        "model": model,
        "output": output,
        "frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "frame_rate": RATE,
        "batch": 2,
        "shard_size": 2,
    } | options
    return [f"--{k.replace('_', '-')}={v}" for k, v in options.items() if v is not None]


def toy_arguments(model, output, count, **options):
    none = dict.fromkeys(("captions", "frame_rate"))
    small = dict(frames=9, height=32, width=32)
    return [
        a for a in arguments(model, model, output, toy_world=count, **none, **small, **options) if "videos" not in a
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def prepared(tmp_path, videos, model):
    assert prepare.main(arguments(videos, model, tmp_path / "latents")) == 0
    return tmp_path / "latents"


def test_the_latents_are_those_of_the_clips(prepared, videos):
    source = LatentSource(prepared)
    ids = [source[k]["id"] for k in range(len(source))]
    assert ids == [
        "grey.mp4@0.000",
        "grey.mp4@0.900",
        "cut.mp4@0.000",
        *(f"noise.mp4@{s}" for s in ("0.000", "0.900", "1.800")),
    ]
    assert source[4]["caption"] == "a video of noise"
    encode = jax.jit(lambda video: VideoVAEEncoder(NATIVE).apply({"params": NATIVE_PARAMS}, video))
    for index, (name, start) in {1: ("grey", 0.9), 5: ("noise", 1.8)}.items():
        clip = read_clip(videos / f"{name}.mp4", start, FRAMES, RATE, HEIGHT, WIDTH)
        expected = encode(clip[None].astype(np.float32) / 127.5 - 1)
        np.testing.assert_allclose(source[index]["mean"], expected.mean[0], rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(source[index]["std"], np.exp(0.5 * expected.logvar[0]), rtol=2e-3, atol=1e-3)
    manifest = source.manifest
    assert (manifest.video_frames, manifest.height, manifest.width, manifest.frame_rate) == (
        FRAMES,
        HEIGHT,
        WIDTH,
        RATE,
    )
    assert manifest.latent_shape == (2, 2, 3, 4)
    assert (manifest.latent_shift, manifest.latent_scale) == (NATIVE.latent_shift, NATIVE.latent_scale)


def test_what_cannot_be_read_is_told(tmp_path, videos, model, capsys):
    prepare.main(arguments(videos, model, tmp_path / "latents"))
    skipped = dict(read_manifest(tmp_path / "latents").skipped)
    assert skipped.keys() == {"text.mp4", "cut.mp4@0.900"}
    printed = capsys.readouterr()
    assert all(f"left out {name}: {reason}" in printed.err for name, reason in skipped.items())
    assert "6 records in 4 shards, 2 inputs left out" in printed.out


def test_nothing_readable_is_an_error(tmp_path, videos, model):
    (tmp_path / "c.txt").write_text("text.mp4\ta text\n")
    with pytest.raises(UserError, match="none of 1 captioned videos"):
        prepare.main(arguments(videos, model, tmp_path / "latents", captions=tmp_path / "c.txt"))
    assert not (tmp_path / "latents").exists()


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches a signal."""


def test_a_killed_run_goes_on(tmp_path, videos, model, prepared, monkeypatch):
    output, write, written = tmp_path / "again", latent_shards._write, []

    def dying(writer, record, path):
        write(writer, record, path)
        written.append(path)
        if len(written) == 4:
            (output / f".{path.name}.1.tmp").write_bytes(b"what a killed process leaves")
            raise Killed

    monkeypatch.setattr(latent_shards, "_write", dying)
    with pytest.raises(Killed):
        prepare.main(arguments(videos, model, output))
    assert not (output / "latents.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("latents-*.array_record")}
    assert len(kept) == 2
    with pytest.raises(UserError, match="finish it"):
        LatentSource(output)

    monkeypatch.setattr(latent_shards, "_write", lambda *args: (write(*args), written.append(args[2])))
    written.clear()
    assert prepare.main(arguments(videos, model, output)) == 0
    assert len(written) == 6 - 3 and all(output.joinpath(name).stat().st_mtime_ns == kept[name] for name in kept)
    assert contents(output) == contents(prepared)
    # A complete folder is left as it is, and a shard that is damaged is made again.
    (output / sorted(kept)[0]).write_bytes(b"")
    written.clear()
    assert prepare.main(arguments(videos, model, output)) == 0
    assert len(written) == 2 and contents(output) == contents(prepared)


def test_two_processes_make_what_one_makes(tmp_path, videos, model, prepared, capsys):
    for process in (1, 0):
        prepare.main(arguments(videos, model, tmp_path / "shared", num_processes=2, process_id=process))
        assert (tmp_path / "shared" / "latents.json").exists() is (process == 0)
        if process:
            assert "2 of 4 shards are left to other processes" in capsys.readouterr().out
    assert contents(tmp_path / "shared") == contents(prepared)


def test_batches_and_chunks_change_no_latent(tmp_path, videos, model, prepared):
    prepare.main(arguments(videos, model, tmp_path / "other", batch=3, shard_size=5, chunk=1))
    source, other = LatentSource(prepared), LatentSource(tmp_path / "other")
    assert len(source) == len(other)
    for index in range(len(source)):
        np.testing.assert_allclose(other[index]["mean"], source[index]["mean"], rtol=2e-3, atol=1e-3)


def test_a_folder_of_other_latents_is_left_alone(tmp_path, videos, model, prepared):
    before = contents(prepared)
    changed = jax.tree.map(lambda leaf: leaf * 1.5, NATIVE_PARAMS)
    save_component(tmp_path / "changed", CAUSAL_VIDEO_VAE, NATIVE, changed)
    for options, message in (
        (dict(height=32), "height is 16 there and 32 here"),
        (dict(shard_size=3), "shard_size is 2 there and 3 here"),
        (dict(model=tmp_path / "changed"), "encoder_sha256 is"),
        (dict(clips_per_video=1), "source is"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.main(arguments(videos, options.pop("model", model), prepared, **options))
    with pytest.raises(UserError, match="exists and is no folder of latents"):
        prepare.main(arguments(videos, model, videos))
    assert contents(prepared) == before


def test_normalisation_is_measured(tmp_path, model, capsys):
    output = tmp_path / "latents"
    prepare.main(toy_arguments(model, output, 10))
    before, shards = read_manifest(output), {k: v for k, v in contents(output).items() if k != "latents.json"}
    assert before.latent_scale == NATIVE.latent_scale
    vae = model / "causal_video_vae"
    weights = (vae / "diffusion_pytorch_model.safetensors").read_bytes()
    assert prepare.main([*toy_arguments(model, output, 10), "--update-normalization"]) == 0
    manifest, config = read_manifest(output), load_component(vae, VIDEO_VAE_ENCODER).config
    assert config.latent_shift == manifest.latent_shift == (before.first.mean, before.later.mean)
    assert config.latent_scale == manifest.latent_scale == (1 / before.first.std, 1 / before.later.std)
    # The weights and all shards are as they were, and the VAE still fits them.
    assert (vae / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert {k: v for k, v in contents(output).items() if k != "latents.json"} == shards
    assert prepare.main(toy_arguments(vae, output, 10)) == 0
    assert read_manifest(output) == manifest
    assert capsys.readouterr().out.count("nothing to encode") == 2

    source, transform = LatentSource(output), LatentTransform(manifest.latent_shift, manifest.latent_scale)
    latents = np.stack([transform(source[k], np.random.default_rng(k))["latents"] for k in range(10)])
    for part in (latents[:, :1], latents[:, 1:]):
        assert abs(part.mean()) < 0.05 and part.std() == pytest.approx(1, abs=0.05)


def test_the_toy_world_is_encoded(tmp_path, model):
    prepare.main([*toy_arguments(model, tmp_path / "latents", 5, seed=3, batch=None), "--frames=1"])
    source, world = LatentSource(tmp_path / "latents"), ToyWorld(5, 3, 1, 32, 32)
    assert source.manifest.latent_shape == (1, 4, 4, 4) and source.manifest.later is None
    assert [source[k]["caption"] for k in range(5)] == [world[k]["caption"] for k in range(5)]
    assert source[4]["id"] == "toy-3-000004"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(frames=10), r"10 video frames .* give 9 or 17"),
        (dict(height=20), "20x24 pixels do not fit"),
        (dict(model="absent"), "holds neither causal_video_vae/config.json nor config.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path, videos, model, options, message):
    with pytest.raises(UserError, match=message) as error:
        prepare.main(arguments(videos, options.pop("model", model), tmp_path / "latents", **options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    "change", [dict(toy_world=3), dict(captions=None), dict(batch=0), dict(num_processes=2, process_id=2)]
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, videos, model, change, capsys):
    with pytest.raises(SystemExit) as status:
        prepare.main(arguments(videos, model, tmp_path / "latents", **change))
    assert status.value.code == 2 and "give" in capsys.readouterr().err.replace("is not below", "give")
