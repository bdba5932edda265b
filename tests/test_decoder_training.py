"""Training of the tiny decoder: equation 2, what trains and what stays, cached latents, growth, and a tiny run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from converters import export_torch
from experiments import evaluate, prepare, train
from experiments.config_file import load_config, plain
from nd_jax.data.latent_clips import LatentClips, LatentClipTransform
from nd_jax.data.latents import LatentSource
from nd_jax.data.registry import build_data
from nd_jax.data.toy_world import ToyWorld
from nd_jax.distill import decoder, perceptual
from nd_jax.distill.registry import build_method, resolve_config
from nd_jax.errors import UserError
from nd_jax.models.lpips import LPIPSConfig
from nd_jax.models.taehv import TAEHVConfig, TAEHVDecoder
from nd_jax.models.video_vae import AsymmetricCausalVideoVAE, AsymmetricVideoVAEConfig, CausalVideoVAEConfig
from nd_jax.train.metrics import read_metrics
from nd_jax.weights.folder import load_component, save_component
from nd_jax.weights.lpips import LPIPS_VGG16
from nd_jax.weights.taehv import taehv_sizes
from nd_jax.weights.vae import CAUSAL_VIDEO_VAE
from tests.taehv_case import taehv_file

CONFIG = str(Path(__file__).parent.parent / "experiments" / "configs" / "decoder.py") + ":tiny"
NATIVE = CausalVideoVAEConfig(
    encoder_out_channels=4,
    encoder_layers_per_block=(1, 1, 1, 1),
    encoder_block_out_channels=(4, 4, 4, 4),
    encoder_norm_num_groups=2,
    decoder_in_channels=4,
    decoder_layers_per_block=(1, 1, 1, 1),
    decoder_block_out_channels=(4, 4, 4, 4),
    decoder_norm_num_groups=2,
)
OVERRIDES = {
    "num_steps": 12,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": 6,
    "checkpoint.every": 6,
    "optimizer.learning_rate": 0.01,
    "optimizer.warmup_steps": 2,
    "data.toy_clips": 16,
    "data.video_frames": 9,
    "data.height": 32,
    "data.width": 32,
    "data.eval_fraction": 0.2,
    "data.crop.height": 16,
    "data.crop.width": 16,
    "loss.scales": 1,
    "model.decoder.num_features": (6, 4, 4, 4),
    "model.discriminator.widths": (4,),
}

rng = np.random.default_rng(0)


def clips(*shape):
    return rng.uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Folder of a random VAE."""
    folder = tmp_path_factory.mktemp("teacher") / "causal_video_vae"
    params = jax.jit(lambda: CAUSAL_VIDEO_VAE.module(NATIVE).init(jax.random.key(0), jnp.zeros((1, 9, 8, 8, 3))))()
    save_component(folder, CAUSAL_VIDEO_VAE, NATIVE, jax.device_get(params["params"]))
    return folder


def arguments(folder, **changes):
    values = OVERRIDES | {"model.folder": str(folder)} | changes
    return [f"--config.{key}={value!r}" for key, value in values.items()]


def tiny_config(folder, **changes):
    return resolve_config(plain(load_config(CONFIG, arguments(folder, **changes))))


@pytest.fixture(scope="module")
def method(vae):
    return build_method(tiny_config(vae, **{"loss.adversarial_weight": 0.1}))


@pytest.fixture(scope="module")
def roles(method):
    return {name: role.load() if role.load else jax.jit(role.init)() for name, role in method.roles.items()}


@pytest.fixture(scope="module")
def batch():
    return {"video": jnp.asarray(clips(2, 9, 16, 16, 3))}


def test_loss_is_equation_2(method, roles, batch):
    loss, parts = jax.jit(method.losses["vae"])(roles, batch, jax.random.key(3))
    student = AsymmetricCausalVideoVAE(AsymmetricVideoVAEConfig(**_student_sizes()))
    apply = jax.jit(lambda x, name: student.apply({"params": roles["vae"]}, x, method=name), static_argnums=1)
    y = apply(apply(batch["video"], "encode").sample_with_key(jax.random.key(3)), "decode")
    mse = np.square(y - batch["video"]).mean()
    seen = perceptual.gradient_ssim_loss(y, batch["video"], 1).mean()
    logits = decoder._logits(decoder.DiscriminatorConfig((4,)), roles["discriminator"], y, jnp.float32)
    assert set(parts) == {"mse", "gradient_ssim", "adversarial"}
    np.testing.assert_allclose(parts["mse"].value, mse, rtol=1e-5)
    np.testing.assert_allclose(parts["gradient_ssim"].value, seen, rtol=1e-5)
    np.testing.assert_allclose(parts["adversarial"].value, -logits.mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss.value, mse + 0.01 * seen - 0.1 * logits.mean(), rtol=1e-5)
    assert float(loss.weight) == 2


def _student_sizes():
    encoder = {k: getattr(NATIVE, k) for k in AsymmetricVideoVAEConfig().__dict__ if k.startswith("encoder")}
    return encoder | {"decoder_num_features": (6, 4, 4, 4)}


def test_the_decoder_learns_and_the_encoder_stays(method, roles, batch):
    grad = jax.jit(jax.grad(lambda p: method.losses["vae"](roles | {"vae": p}, batch, jax.random.key(0))[0].value))
    # Memory blocks begin as the identity, whatever their first convolutions are.
    trained = jax.tree.map(lambda w: w + 0.01, roles["vae"])
    flat = traverse_util.flatten_dict(grad(trained), sep="/")
    for path, value in flat.items():
        assert bool(np.any(value)) == path.startswith(("decoder/", "post_quant_conv/")), path
    assert method.roles["vae"].trainable == (r"^decoder/", r"^post_quant_conv/")


def test_the_discriminator_learns_from_both_and_tells_the_decoder_nothing(method, roles, batch):
    def loss(params, vae):
        given = roles | {"discriminator": params, "vae": vae}
        return method.losses["discriminator"](given, batch, jax.random.key(0))[0].value

    mine, theirs = jax.jit(jax.grad(loss, (0, 1)))(roles["discriminator"], roles["vae"])
    assert all(np.any(g) for g in jax.tree.leaves(mine)) and not any(np.any(g) for g in jax.tree.leaves(theirs))
    assert method.schedule == ("vae", "discriminator")


def test_cached_latents_give_the_loss_of_the_encoder(method, roles, batch):
    student = AsymmetricCausalVideoVAE(AsymmetricVideoVAEConfig(**_student_sizes()))
    posterior = jax.jit(lambda x: student.apply({"params": roles["vae"]}, x, method="encode"))(batch["video"])
    cached = batch | {"mean": posterior.mean, "std": jnp.exp(posterior.logvar / 2)}
    loss = jax.jit(lambda b: method.losses["vae"](roles, b, jax.random.key(1))[0].value)
    np.testing.assert_allclose(loss(cached), loss(batch), rtol=1e-5)


def test_evaluation_has_the_native_decoder_and_valid_clips_alone(method, roles):
    video = jnp.asarray(clips(3, 9, 16, 16, 3))
    evaluate_ = jax.jit(method.evaluate)
    means = evaluate_(roles, {"video": video, "valid": jnp.array([True, True, False])})
    assert set(means) == {f"{who}{what}" for who in ("", "native_") for what in ("psnr_db", "ssim", "flicker")}
    two = evaluate_(roles, {"video": video[:2], "valid": jnp.array([True, True])})
    for name in means:
        np.testing.assert_allclose(means[name].value, two[name].value, rtol=1e-4, atol=1e-6)
    native = CAUSAL_VIDEO_VAE.module(NATIVE)
    whole = {**roles["vae"], **roles["native"]}
    y = jnp.clip(jax.jit(native.apply)({"params": whole}, video[:2]), -1, 1)
    np.testing.assert_allclose(two["native_psnr_db"].value, perceptual.psnr_db(y, video[:2], 2.0).mean(), rtol=1e-4)


def test_lpips_is_used_where_its_weights_are_given(vae, tmp_path, batch):
    sizes = LPIPSConfig((2, 2, 2, 2, 2))
    picture = jnp.zeros((1, 16, 16, 3))
    params = jax.jit(lambda: LPIPS_VGG16.module(sizes).init(jax.random.key(0), picture, picture)["params"])()
    save_component(tmp_path / "lpips", LPIPS_VGG16, sizes, jax.device_get(params))
    given = {"loss.perceptual": "lpips", "model.lpips": str(tmp_path / "lpips"), "model.evaluate_native": False}
    method = build_method(tiny_config(vae, **given))
    roles = {name: role.load() for name, role in method.roles.items()}
    assert set(roles) == {"vae", "lpips"} and method.roles["lpips"].frozen
    _, parts = jax.jit(method.losses["vae"])(roles, batch, jax.random.key(0))
    metrics = jax.jit(method.evaluate)(roles, batch | {"valid": jnp.array([True, True])})
    assert float(parts["lpips"].value) > 0 and float(metrics["lpips"].value) > 0


@pytest.mark.parametrize(("widths", "colours"), [((6, 6, 6, 6), 3), ((4, 5, 4, 4), 2)])
def test_a_new_decoder_shows_colours_of_the_latent(widths, colours):
    """Random ones lost them: of two seeds one made grey clips, 19.8 dB after 1200 steps, and the other 25.1."""
    config = TAEHVConfig(latent_channels=5, num_features=widths)
    module = TAEHVDecoder(config)
    latents = jnp.asarray(clips(2, 3, 2, 2, 5))
    params = decoder.carry_colours(module.init(jax.random.key(0), latents)["params"])
    video, _ = module.apply({"params": params}, latents)
    first = params["conv_in"]["kernel"][..., :colours]
    squashed = 3 * jnp.tanh(latents / 3)
    small = jnp.stack([lax_convolution(frames, first) for frames in jnp.moveaxis(squashed, 1, 0)], axis=1)
    expected = small.repeat(8, axis=1)[:, 7:].repeat(8, axis=2).repeat(8, axis=3)
    np.testing.assert_allclose(video[..., :colours], expected, atol=1e-5)


def lax_convolution(frames, kernel):
    """[N, H, W, C] and [3, 3, C, D] -> [N, H, W, D], zeros around the picture."""
    return jax.lax.conv_general_dilated(frames, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_growth_plays_the_frames_of_a_latent_twice():
    """A 4x decoder grown to 8x: at first the frames of a latent frame come twice, and in [-1, 1]."""
    small = TAEHVConfig(4, (6, 4, 4, 4), (False, True, True))
    large = TAEHVConfig(4, (6, 4, 4, 4), (True, True, True))
    z = jnp.asarray(clips(1, 3, 2, 2, 4))
    params = jax.jit(lambda: TAEHVDecoder(small).init(jax.random.key(0), z)["params"])()
    # Memory aside: blocks behind the new growth see the frame before, which is now a copy.
    quiet = lambda path, x: x.at[..., x.shape[2] // 2 :, :].set(0) if x.ndim == 4 and path[-2].key == "convs_0" else x
    params = jax.tree_util.tree_map_with_path(quiet, params)
    grown = decoder.grow_taehv(params, small.time_upscale, large.time_upscale)
    before, _ = jax.jit(TAEHVDecoder(small).apply)({"params": params}, z)
    after, _ = jax.jit(TAEHVDecoder(large).apply)({"params": grown}, z)
    for k in (-4, -8):
        np.testing.assert_allclose(after[:, k : k + 4 or None], 2 * before[:, -4:] - 1, atol=1e-5)
    with pytest.raises(ValueError, match="group 1 of the TAEHV checkpoint doubles the frames"):
        decoder.grow_taehv(params, small.time_upscale, (True, False, True))


def test_taehv_files_are_read_and_grown(vae, tmp_path):
    tensors = taehv_file(tmp_path / "taehv.safetensors", latent_channels=4, widths=(6, 4, 4, 4), seed=1)
    assert taehv_sizes(tmp_path / "taehv.safetensors") == ((6, 4, 4, 4), (False, True, True))
    params = build_method(tiny_config(vae, **{"model.taehv": str(tmp_path / "taehv.safetensors")})).roles["vae"].load()
    kernel = params["decoder"]["grow_0"]["kernel"][0, 0]
    np.testing.assert_array_equal(kernel, np.tile(tensors["decoder.7.conv.weight"][:, :, 0, 0].T, (1, 2)))
    np.testing.assert_array_equal(
        params["decoder"]["memory_3"]["convs_2"]["kernel"],
        tensors["decoder.9.conv.4.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(params["post_quant_conv"]["kernel"][0, 0, 0], np.eye(4))
    with pytest.raises(UserError, match=r"cannot grow into model\.decoder"):
        tiny_config(vae, **{"model.taehv": str(tmp_path / "taehv.safetensors"), "model.decoder.num_features": (8,) * 4})
    del tensors["decoder.20.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"cut.safetensors: has no tensor decoder\.20\.weight"):
        tiny_config(vae, **{"model.taehv": str(tmp_path / "cut.safetensors")})
    with pytest.raises(UserError, match=r"from \.safetensors alone"):
        tiny_config(vae, **{"model.taehv": str(tmp_path / "taehv.pth")})


@pytest.fixture(scope="module")
def latents(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    sizes = ["--frames", "9", "--height", "32", "--width", "32"]
    given = ["--toy-world", "16", *sizes, "--model", str(vae), "--output", str(folder / "latents")]
    assert prepare.main(given) == 0
    return folder / "latents"


def test_latents_and_frames_belong_together(latents):
    world = ToyWorld(16, 0, 9, 32, 32)
    source = LatentClips(LatentSource(latents), world)
    record = source[5]
    assert record["id"] == "toy-0-000005" and record["mean"].shape == (2, 4, 4, 4)
    np.testing.assert_array_equal(record["video"], world[5]["video"])
    with pytest.raises(UserError, match="give the videos, captions, sizes and seed"):
        LatentClips(LatentSource(latents), ToyWorld(16, 1, 9, 32, 32))
    with pytest.raises(UserError, match="encodes clips of 9x32x32"):
        LatentClips(LatentSource(latents), ToyWorld(16, 0, 9, 48, 32))
    with pytest.raises(UserError, match="has 16 records"):
        LatentClips(LatentSource(latents), ToyWorld(17, 0, 9, 32, 32))


def test_cut_outs_are_the_same_place_of_both():
    video = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None, None], (17, 32, 24, 3))
    mean = np.broadcast_to(np.arange(4, dtype=np.float32)[None, :, None, None], (3, 4, 3, 2))
    cut = LatentClipTransform(video_frames=9, height=16, width=8)
    starts = set()
    for seed in range(8):
        arrays = cut({"video": video, "mean": mean, "std": mean + 1}, np.random.default_rng(seed))
        assert arrays["video"].shape == (9, 16, 8, 3) and arrays["mean"].shape == (2, 2, 1, 2)
        first = round((float(arrays["video"][0, 0, 0, 0]) + 1) * 127.5)
        assert first == 8 * arrays["mean"][0, 0, 0, 0] and arrays["std"][0, 0, 0, 0] == first / 8 + 1
        starts.add(first)
    assert len(starts) > 1
    with pytest.raises(UserError, match="video_frames 25 is no beginning"):
        LatentClipTransform(video_frames=25)({"video": video, "mean": mean, "std": mean}, rng)
    with pytest.raises(UserError, match="height 12 is no part"):
        LatentClipTransform(height=12)({"video": video, "mean": mean, "std": mean}, rng)


def test_batches_with_cached_latents(vae, latents, tmp_path):
    batches, held_out = build_data(tiny_config(vae, **{"data.latents": str(latents)}), tmp_path)
    first = next(batches)
    assert first["video"].shape == (8, 9, 16, 16, 3) and first["mean"].shape == (8, 2, 2, 2, 4)
    (batch,) = held_out
    assert batch["video"].shape == (8, 9, 32, 32, 3) and batch["std"].shape == (8, 2, 4, 4, 4)


@pytest.fixture(scope="module")
def workdir(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "run"
    assert train.main(["--config", CONFIG, "--workdir", str(folder), *arguments(vae)]) == 0
    return folder


def test_a_tiny_run_learns_and_becomes_a_model_folder(workdir, vae, tmp_path):
    lines = read_metrics(workdir / "metrics.jsonl")
    psnr = [line["eval/psnr_db"] for line in lines if "eval/psnr_db" in line]
    native = [line["eval/native_psnr_db"] for line in lines if "eval/native_psnr_db" in line]
    assert psnr[-1] > psnr[0] and len(set(native)) == 1
    model = tmp_path / "model"
    assert export_torch.main(["--checkpoint", str(workdir), "--output", str(model)]) == 0
    component = load_component(model / "causal_video_vae")
    assert component.config.decoder_num_features == (6, 4, 4, 4)
    kept = load_component(vae).params
    jax.tree.map(np.testing.assert_array_equal, component.params["encoder"], kept["encoder"])
    # Training goes on from a tiny decoder that is there.
    again = build_method(tiny_config(model / "causal_video_vae"))
    assert set(again.roles) == {"vae"}
    jax.tree.map(np.testing.assert_array_equal, again.roles["vae"].load(), component.params)

    sizes = ["--frames", "9", "--height", "32", "--width", "32", "--batch", "4"]
    given = ["--student", str(model), "--native", str(vae), "--output", str(tmp_path / "measured"), *sizes]
    assert evaluate.main(["decoder", *given, "--toy-world", "6"]) == 0
    written = sorted(path.name for path in (tmp_path / "measured").iterdir())
    assert written == [*(f"decoder-{k:02d}.mp4" for k in range(6)), "decoder.json", "decoder.png"]
    with pytest.raises(UserError, match="give --videos with --captions, or --toy-world"):
        evaluate.main(["decoder", *given])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.folder": ""}, "config.model.folder is empty"),
        ({"loss.perceptual": "lpips"}, "loss.perceptual=gradient_ssim, which needs no download"),
        ({"loss.perceptual": "vgg"}, "loss.perceptual is 'vgg'"),
        ({"loss.mse_weight": -1.0}, r"loss\.mse_weight is -1\.0"),
        ({"loss.mse_weight": 0.0, "loss.perceptual": "none"}, "nothing would be reconstructed"),
        ({"model.decoder.num_features": (4, 4)}, "num_features is"),
    ],
)
def test_bad_values_are_named(vae, changes, message):
    with pytest.raises(UserError, match=message):
        build_method(tiny_config(vae, **changes))


def test_full_config_has_the_published_size(vae):
    config = plain(load_config(CONFIG.replace(":tiny", ":full")))
    sizes = AsymmetricVideoVAEConfig(**{f"decoder_{k}": tuple(v) for k, v in config["model"]["decoder"].items()})
    module = AsymmetricCausalVideoVAE(sizes)
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))["params"]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(abstract["decoder"]) == 9_910_147
