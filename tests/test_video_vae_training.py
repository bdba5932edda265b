"""Training of the video VAE: equations 3 and 5, the metrics, a tiny run, and the way to a model folder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

from converters import export_torch
from experiments import train
from experiments.config_file import load_config, plain
from nd_jax.data.registry import build_data
from nd_jax.distill import video_vae
from nd_jax.distill.registry import build_method, resolve_config
from nd_jax.errors import UserError
from nd_jax.models.video_vae import CausalVideoVAE, CausalVideoVAEConfig, Posterior
from nd_jax.train.deployed import load_deployed
from nd_jax.train.metrics import read_metrics
from nd_jax.weights.folder import load_component

CONFIG = str(Path(__file__).parent.parent / "experiments" / "configs" / "video_vae.py") + ":tiny"
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
    "data.crop.video_frames": 9,
    "data.crop.height": 16,
    "data.crop.width": 16,
    "model.vae.encoder_out_channels": 4,
    "model.vae.decoder_in_channels": 4,
    "model.vae.encoder_block_out_channels": (4, 4, 4, 4),
    "model.vae.decoder_block_out_channels": (4, 4, 4, 4),
    "model.vae.encoder_norm_num_groups": 2,
    "model.vae.decoder_norm_num_groups": 2,
}

rng = np.random.default_rng(0)


def arguments(**changes):
    return [f"--config.{key}={value!r}" for key, value in (OVERRIDES | changes).items()]


def tiny_config(**changes):
    return resolve_config(plain(load_config(CONFIG, arguments(**changes))))


def clips(*shape):
    return rng.uniform(-1, 1, shape).astype(np.float32)


@given(st.integers(1, 3), st.integers(0, 10_000))
def test_gradient_distance_is_equation_3(scales, seed):
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(2, 2, 3, 8, 12, 3))
    expected = np.zeros(2)
    for scale in range(scales):
        size = 2**scale
        coarse = lambda x, size=size: x.reshape(2, 3, 8 // size, size, 12 // size, size, 3).mean((3, 5))
        differences = [np.abs(np.diff(coarse(a), axis=k) - np.diff(coarse(b), axis=k)).reshape(2, -1) for k in (2, 3)]
        expected += np.concatenate(differences, axis=1).mean(1) / scales
    distance_of = jax.jit(video_vae.gradient_distance, static_argnums=2)
    distance = distance_of(a.astype(np.float32), b.astype(np.float32), scales)
    np.testing.assert_allclose(distance, expected, rtol=2e-5)


def test_gradient_distance_sees_edges_and_no_brightness():
    video = jnp.asarray(clips(2, 3, 8, 8, 3))
    np.testing.assert_allclose(video_vae.gradient_distance(video + 0.3, video, 3), 0.0, atol=1e-6)
    assert float(video_vae.gradient_distance(jnp.roll(video, 1, axis=2), video, 1).min()) > 0.1


def test_loss_is_equation_5():
    video, reconstruction = clips(3, 5, 8, 8, 3), clips(3, 5, 8, 8, 3)
    posterior = Posterior(clips(3, 2, 1, 1, 4), clips(3, 2, 1, 1, 4))
    config = video_vae.VideoVAELoss(0.7, 0.4, 0.3, gradient_scales=2, kl_weight=0.05)
    loss, parts = video_vae.autoencoder_loss(
        jnp.asarray(reconstruction), jnp.asarray(video), jax.tree.map(jnp.asarray, posterior).kl(), 8, config
    )
    error = reconstruction - video
    mean, logvar = posterior
    expected = {
        "l1": np.abs(error).mean(),
        "mse": (error**2).mean(),
        "kl": 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean(),
        "gradient": float(video_vae.gradient_distance(jnp.asarray(reconstruction), jnp.asarray(video), 2).mean()),
    }
    assert set(parts) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name].value, value, rtol=1e-5)
    weighted = 0.7 * expected["l1"] + 0.4 * expected["mse"] + 0.3 * expected["gradient"] + 0.05 * expected["kl"]
    np.testing.assert_allclose(loss.value, weighted, rtol=1e-5)
    assert float(loss.weight) == 3


@pytest.fixture(scope="module")
def method():
    return build_method(tiny_config())


@pytest.fixture(scope="module")
def params(method):
    return jax.jit(method.roles["vae"].init)()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_kl_weight(weight):
    """Without it nothing holds the variance up but the reconstruction; with it, its gradient is beta dK."""
    video, mean = jnp.asarray(clips(2, 5, 8, 8, 3)), jnp.asarray(clips(2, 2, 1, 1, 4))
    config = video_vae.VideoVAELoss(kl_weight=weight)

    def loss(mean):
        kl = Posterior(mean, jnp.zeros_like(mean)).kl()
        return video_vae.autoencoder_loss(video, video, kl, mean[0].size, config)[0].value

    np.testing.assert_allclose(jax.grad(loss)(mean), weight * mean / mean.size, atol=1e-7)


def test_branches_start_closed_and_posteriors_as_narrow_as_told():
    config = lambda logvar: tiny_config(**{"model.initial_logvar": logvar})
    init = lambda logvar: jax.jit(build_method(config(logvar)).roles["vae"].init)()
    wide, narrow = (traverse_util.flatten_dict(init(logvar), sep="/") for logvar in (0.0, -5.0))
    assert {path for path in wide if np.any(wide[path] != narrow[path])} == {"quant_conv/bias"}
    np.testing.assert_array_equal(narrow["quant_conv/bias"], [0.0] * 4 + [-5.0] * 4)
    silent = {path for path, x in wide.items() if path.endswith("kernel") and not np.any(x)}
    assert silent and all("conv2" in path or "attention/out" in path for path in silent)
    assert not any(np.any(x[:-1]) for x in wide.values() if x.ndim == 5)


def test_every_parameter_learns_and_the_key_decides_the_sample(method, params):
    # Branches that start closed have no gradient but at their ends.
    params = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), params)
    batch = {"video": jnp.asarray(clips(2, 9, 16, 16, 3))}
    loss = jax.jit(jax.value_and_grad(lambda p, key: method.losses["vae"]({"vae": p}, batch, key)[0].value))
    (first, gradient), (again, _), (other, _) = (loss(params, jax.random.key(k)) for k in (0, 0, 1))
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradient))
    assert first == again != other


def test_evaluation_counts_valid_clips_alone():
    video, reconstruction = clips(3, 5, 8, 8, 3), clips(3, 5, 8, 8, 3)
    mean, logvar = clips(3, 2, 1, 1, 4), clips(3, 2, 1, 1, 4)
    valid = np.array([True, False, True])
    means = video_vae.evaluate_autoencoder(*map(jnp.asarray, (reconstruction, video, mean, logvar, valid)))
    got = video_vae.summarize({name: float(value.value) for name, value in means.items()})
    error = (reconstruction - video)[valid]
    samples = mean[valid] + np.exp(logvar[valid] / 2) * np.random.default_rng(1).normal(size=(100_000, 1, 1, 1, 1, 1))
    assert got["psnr_db"] == pytest.approx(10 * np.log10(4 / (error**2).mean()), rel=1e-5)
    assert got["l1"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert got["latent_mean"] == pytest.approx(mean[valid].mean(), rel=1e-4)
    assert got["latent_std"] == pytest.approx(samples.std(), rel=1e-2)


def test_reconstruction_out_of_range_is_cut_for_the_psnr():
    video = jnp.ones((1, 5, 8, 8, 3))
    latent = jnp.zeros((1, 2, 1, 1, 4))
    means = video_vae.evaluate_autoencoder(3 * video, video, latent, latent, jnp.array([True]))
    assert float(means["mse"].value) == 0


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video_vae") / "run"
    assert train.main(["--config", CONFIG, "--workdir", str(folder), *arguments()]) == 0
    return folder


def test_a_tiny_run_learns(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    psnr = [line["eval/psnr_db"] for line in lines if "eval/psnr_db" in line]
    loss = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(loss) == 12 and np.mean(loss[-3:]) < 0.8 * np.mean(loss[:3])
    assert psnr[-1] > psnr[0]


def test_what_was_trained_is_in_the_model_folder(workdir):
    folder = workdir.parent / "model"
    assert export_torch.main(["--checkpoint", str(workdir), "--output", str(folder)]) == 0
    component = load_deployed(workdir).components["causal_video_vae"]
    read = load_component(folder / "causal_video_vae")
    assert read.config == component.config and read.config.encoder_out_channels == 4
    jax.tree.map(np.testing.assert_array_equal, read.params, component.params)
    # And training goes on from there, with the sizes of the folder.
    given = {"model.folder": str(folder / "causal_video_vae"), "model.vae.encoder_out_channels": 8}
    config = tiny_config(**given, **{"model.inflate": False})
    assert config["model"]["vae"]["encoder_out_channels"] == 4
    jax.tree.map(np.testing.assert_array_equal, build_method(config).roles["vae"].load(), component.params)
    inflated = build_method(tiny_config(**given)).roles["vae"].load()
    jax.tree.map(np.testing.assert_array_equal, inflated, jax.device_get(video_vae.inflate(component.params)))


def test_inflation_keeps_single_frames_and_repeats_them(method, params):
    """With kernels that see the present alone, a still clip is then reconstructed as its frame is."""
    nudge = lambda path, x: x if path[-1].key == "kernel" and x.ndim == 5 else x + 0.1
    inflated = video_vae.inflate(jax.tree_util.tree_map_with_path(nudge, params))
    vae = CausalVideoVAE(CausalVideoVAEConfig(**tiny_config()["model"]["vae"]))
    reconstruct = jax.jit(lambda video: vae.apply({"params": inflated}, video))
    frame = jnp.asarray(clips(1, 1, 16, 16, 3))
    single = reconstruct(frame)
    still = reconstruct(jnp.repeat(frame, 9, axis=1))
    assert float(jnp.std(single)) > 0.01
    np.testing.assert_allclose(still, jnp.repeat(single, 9, axis=1), atol=1e-5)


def test_full_config_has_the_published_sizes():
    config = plain(load_config(CONFIG.replace(":tiny", ":full")))
    abstract = build_method(resolve_config(config)).roles["vae"].abstract
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract["encoder"])) == 109_632_032


def test_tiny_config_is_small():
    abstract = build_method(resolve_config(plain(load_config(CONFIG)))).roles["vae"].abstract
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) <= 800_000


def test_batches_are_cut_in_training_and_whole_in_evaluation(tmp_path):
    batches, held_out = build_data(tiny_config(), tmp_path)
    assert next(batches)["video"].shape == (8, 9, 16, 16, 3)
    (batch,) = held_out
    assert batch["video"].shape == (8, 9, 32, 32, 3) and batch["valid"].sum() == 3
    assert batch["video"].dtype == np.float32 and np.abs(batch["video"]).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.toy_clips": 0}, "give a folder of videos with toy_clips 0"),
        ({"data.videos": "clips"}, "give a folder of videos with toy_clips 0"),
        ({"data.toy_clips": 0, "data.videos": "clips"}, "config.data.captions is empty"),
        ({"data.crop.height": 12}, "height 12 does not fit the video VAE"),
    ],
)
def test_bad_data_is_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_data(tiny_config(**changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.kl_weight": -1.0}, r"loss\.kl_weight is -1\.0"),
        ({"loss.l1_weight": 0.0, "loss.mse_weight": 0.0}, "nothing would be reconstructed"),
        ({"loss.gradient_scales": 0}, "gradient_scales is 0"),
        ({"model.vae.decoder_in_channels": 8}, "they must be equal"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        build_method(tiny_config(**changes))
