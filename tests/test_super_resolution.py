"""QuickSRNet: agreement with PyTorch under the public keys, the start, weights in and out, and a tiny training."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from converters import export_torch, import_torch
from experiments import train
from experiments.config_file import load_config, plain
from nd_jax.data.frames import FrameTransform
from nd_jax.data.registry import build_data
from nd_jax.distill import super_resolution
from nd_jax.distill.registry import build_method, resolve_config
from nd_jax.errors import UserError
from nd_jax.models.quicksrnet import SCALES, VARIANTS, QuickSRNet, QuickSRNetConfig, depth_to_space, variant_config
from nd_jax.train.metrics import read_metrics
from nd_jax.weights.folder import load_component, save_component
from nd_jax.weights.network import abstract_params, flat_shapes
from nd_jax.weights.quicksrnet import QUICKSRNET, quicksrnet_table
from nd_jax.weights.store import load_stored, read_store
from nd_jax.weights.table import expand, to_ours

CONFIG = str(Path(__file__).parent.parent / "experiments" / "configs" / "super_resolution.py") + ":tiny"
OVERRIDES = {
    "num_steps": 80,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": 80,
    "checkpoint.every": 80,
    # Adam, which the config has, needs some hundred steps to leave the start behind.
    "optimizer.name": "muon",
    "optimizer.learning_rate": 5e-3,
    "optimizer.warmup_steps": 10,
    "data.toy_clips": 24,
    "data.height": 32,
    "data.width": 32,
    "data.eval_fraction": 0.2,
    "data.crop.height": 24,
    "data.crop.width": 16,
}

rng = np.random.default_rng(0)


class Anchor(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 3 * scale**2, 1)


class Plain(torch.nn.Module):
    """The network in PyTorch, with the names of the public class."""

    def __init__(self, config):
        super().__init__()
        width, scale = config.num_channels, config.scaling_factor
        layers = []
        for inputs in [3] + [width] * config.num_intermediate_layers:
            layers += [torch.nn.Conv2d(inputs, width, 3, padding=1), torch.nn.Hardtanh(0, 1)]
        self.cnn = torch.nn.Sequential(*layers)
        self.conv_last = torch.nn.Conv2d(width, 3 * scale**2, 3, padding=1)
        self.anchor = Anchor(scale) if config.use_ito_connection else None
        self.scale = scale

    def forward(self, x):
        y = self.conv_last(self.cnn(x))
        y = y if self.anchor is None else y + self.anchor.net(x)
        return torch.nn.functional.pixel_shuffle(y.clamp(0, 1), self.scale)


def plain_network(config, seed=0):
    """With random weights that reach both ends of the clipping."""
    torch.manual_seed(seed)
    network = Plain(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
        network.conv_last.weight.mul_(5.0)
    return network


def state_of(network):
    return {key: tensor.numpy() for key, tensor in network.state_dict().items()}


def ours_of(config, state):
    return to_ours(state, quicksrnet_table(config), flat_shapes(QUICKSRNET, config))


def pictures(*shape):
    return rng.uniform(0, 1, shape).astype(np.float32)


def arguments(**changes):
    return [f"--config.{key}={value!r}" for key, value in (OVERRIDES | changes).items()]


def tiny_config(**changes):
    return resolve_config(plain(load_config(CONFIG, arguments(**changes))))


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_the_public_ones(variant):
    """Numbers of Qualcomm AI Hub for the 4x checkpoints: 33.3K, 61.0K and 436K parameters."""
    published = {"small": 33_300, "medium": 61_000, "large": 436_000}[variant]
    leaves = jax.tree.leaves(abstract_params(QUICKSRNET, variant_config(variant, 4)))
    assert sum(leaf.size for leaf in leaves) == pytest.approx(published, rel=2e-3)
    for scale in SCALES:
        config = variant_config(variant, scale)
        tensors = expand(quicksrnet_table(config), flat_shapes(QUICKSRNET, config))
        expected = {key: tuple(tensor.shape) for key, tensor in Plain(config).state_dict().items()}
        assert {tensor.keys[0]: tensor.shape for tensor in tensors} == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", SCALES)
def test_agrees_with_pytorch(variant, scale):
    config = variant_config(variant, scale)
    theirs = plain_network(config, seed=scale)
    x = pictures(2, 5, 7, 3)
    y = QuickSRNet(config).apply({"params": ours_of(config, state_of(theirs))}, jnp.asarray(x))
    expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    assert y.shape == (2, 5 * scale, 7 * scale, 3)
    assert expected.min() == 0 and expected.max() == 1 and 0.01 < expected.std()
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_network_repeats_pixels(variant):
    config = variant_config(variant, 3)
    x = jnp.asarray(pictures(1, 6, 5, 3)).at[0, 0, 0].set(0.0).at[0, 1, 0].set(1.0)
    params = jax.jit(QuickSRNet(config).init)(jax.random.key(0), x)["params"]
    y = QuickSRNet(config).apply({"params": params}, x)
    np.testing.assert_allclose(y, np.repeat(np.repeat(x, 3, axis=1), 3, axis=2), atol=1e-6)
    assert np.std(params["conv_in"]["kernel"][..., 3:]) > 0.05  # The other channels are random.


def test_depth_to_space_is_pixel_shuffle():
    x = pictures(2, 3, 4, 18)
    expected = torch.nn.functional.pixel_shuffle(torch.from_numpy(x).permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(depth_to_space(jnp.asarray(x), 3), expected)


def test_half_precision_stays_close():
    config = QuickSRNetConfig(num_channels=8)
    params = ours_of(config, state_of(plain_network(config)))
    x = jnp.asarray(pictures(1, 6, 6, 3))
    exact, half = (QuickSRNet(config, dtype=d).apply({"params": params}, x) for d in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuickSRNetConfig(1.5), "scaling_factor is 1.5: use 2, 3, 4"),
        (lambda: QuickSRNetConfig(2, num_channels=2), "num_channels is 2"),
        (lambda: variant_config("huge", 2), "variant is 'huge': use small, medium, large"),
        (lambda: QuickSRNet().init(jax.random.key(0), jnp.zeros((8, 8, 3))), r"pictures are \[8, 8, 3\]"),
        (lambda: super_resolution.reduce_frames(jnp.zeros((1, 9, 8, 3)), 2), "give multiples of 2"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- weights ----------------------------------------------------------------------------------------------------------


def wrapped_by_aimet(state):
    """What a `QuantizationSimModel` of AIMET 1 with learned ranges makes of a state dict."""
    keys = {key: key.rpartition(".") for key in state}
    wrapped = {f"{layer}._module_to_wrap.{leaf}": state[key] for key, (layer, _, leaf) in keys.items()}
    ranges = {f"{layer}.{leaf}_encoding_{end}" for layer, _, leaf in keys.values() for end in ("min", "max")}
    return wrapped | dict.fromkeys(ranges | {"cnn.1.output0_encoding_max"}, torch.zeros(1))


def with_quantizers(state):
    """The same of AIMET 2."""
    return state | dict.fromkeys(("cnn.0.param_quantizers.weight.min", "cnn.1.output_quantizers.0.max"), torch.ones(1))


@pytest.mark.parametrize(
    ("variant", "wrap"), [("small", lambda state: state), ("large", wrapped_by_aimet), ("medium", with_quantizers)]
)
def test_the_zoos_checkpoints_are_read_with_their_model_cards(tmp_path, variant, wrap):
    config = variant_config(variant, 2)
    network = plain_network(config)
    file, card = tmp_path / "quicksrnet_2x_checkpoint_float32.pth.tar", tmp_path / "quicksrnet_2x_w8a8.json"
    torch.save({"epoch": 7, "state_dict": wrap(network.state_dict()), "optimizer": {"state": {}}}, file)
    card.write_text(json.dumps({"name": "QuickSRNet", "model_args": vars(config), "input_shape": [None, 3, 8, 8]}))
    given = ["--source", str(file), "--config", str(card), "--network", "quicksrnet", "--component", "quicksrnet"]
    assert import_torch.main([*given, "--output", str(tmp_path / "store")]) == 0
    assert list(read_store(tmp_path / "store")["components"]) == ["quicksrnet"]
    stored = load_stored(tmp_path / "store", "quicksrnet")
    assert stored.config == config
    jax.tree.map(np.testing.assert_array_equal, stored.params, ours_of(config, state_of(network)))

    assert export_torch.main(["--checkpoint", str(tmp_path / "store"), "--output", str(tmp_path / "model")]) == 0
    written = load_file(tmp_path / "model" / "quicksrnet" / "model.safetensors")
    assert set(written) == set(network.state_dict())
    Plain(config).load_state_dict({k: torch.from_numpy(v) for k, v in written.items()}, strict=True)
    for key, tensor in network.state_dict().items():
        np.testing.assert_array_equal(written[key], tensor)
    # And in again, now by the config.json alone.
    assert import_torch.main(["--source", str(tmp_path / "model"), "--output", str(tmp_path / "again")]) == 0
    jax.tree.map(np.testing.assert_array_equal, load_stored(tmp_path / "again", "quicksrnet").params, stored.params)


def test_checkpoints_of_other_networks_are_refused(tmp_path):
    config = variant_config("small", 2)
    params = ours_of(config, state_of(plain_network(config)))
    save_component(tmp_path / "quicksrnet", QUICKSRNET, config, params)
    text = json.loads((tmp_path / "quicksrnet" / "config.json").read_text())
    for changes, message in (
        ({"scaling_factor": 4}, r"conv_last.weight \[12, 32, 3, 3\] instead of \[48, 32, 3, 3\]"),
        ({"num_intermediate_layers": 5}, "6 missing: cnn.6.weight, cnn.8.weight, cnn.10.weight"),
        ({"use_ito_connection": True}, "2 missing: anchor.net.weight, anchor.net.bias"),
        ({"scaling_factor": 1.5}, r"config.json: not a config of quicksrnet \(scaling_factor is 1.5"),
    ):
        (tmp_path / "quicksrnet" / "config.json").write_text(json.dumps(text | changes))
        with pytest.raises(UserError, match=message):
            load_component(tmp_path / "quicksrnet")


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_reductions_and_enlargements_are_pytorchs(scale):
    x = pictures(2, 12, 24, 3)
    resize = lambda a, size: (
        torch.nn.functional.interpolate(torch.from_numpy(a).permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
        .clamp(0, 1)
        .permute(0, 2, 3, 1)
        .numpy()
    )
    small = super_resolution.reduce_frames(jnp.asarray(x), scale)
    np.testing.assert_allclose(small, resize(x, (12 // scale, 24 // scale)), atol=0.501 / 255)
    np.testing.assert_allclose(255 * small, np.round(255 * small), atol=1e-4)
    np.testing.assert_allclose(
        super_resolution.enlarge_bicubic(small, scale), resize(np.array(small), (12, 24)), atol=1e-5
    )
    np.testing.assert_array_equal(super_resolution.enlarge_nearest(small, scale)[:, ::scale, ::scale], small)


@pytest.fixture(scope="module")
def method():
    return build_method(tiny_config())


def test_the_loss_is_the_mean_difference(method):
    config = variant_config("small", 2)
    network = plain_network(config)
    video = 2 * pictures(3, 1, 24, 16, 3) - 1
    params = ours_of(config, state_of(network))
    loss, parts = jax.jit(method.losses["quicksrnet"])(
        {"quicksrnet": params}, {"video": jnp.asarray(video)}, jax.random.key(0)
    )
    frames = (video[:, 0] + 1) / 2
    small = np.array(super_resolution.reduce_frames(jnp.asarray(frames), 2))
    y = network(torch.from_numpy(small).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(loss.value, np.abs(y - frames).mean(), rtol=1e-4)
    psnr = -10 * np.log10(((y - frames) ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(parts["psnr_db"].value, psnr.mean(), rtol=1e-4)
    assert float(loss.weight) == 3


def test_cut_outs_are_turned_over():
    video = np.arange(8 * 6, dtype=np.uint8).reshape(1, 8, 6, 1).repeat(3, axis=-1)
    cut = FrameTransform(height=4, width=4, flips=True)
    seen = set()
    for seed in range(40):
        arrays = cut({"video": video}, np.random.default_rng(seed))
        assert arrays["video"].shape == (1, 4, 4, 3) and arrays["video"].dtype == np.float32
        part = np.round((arrays["video"][0, :, :, 0] + 1) * 127.5).astype(int)
        down, right = part[1, 0] - part[0, 0], part[0, 1] - part[0, 0]
        assert abs(down) == 6 and abs(right) == 1
        assert part.min() % 6 <= 2 and part.max() == part.min() + 3 * 6 + 3
        seen.add((int(np.sign(down)), int(np.sign(right))))
    assert len(seen) == 4
    still = FrameTransform()({"video": video}, np.random.default_rng(0))
    np.testing.assert_allclose(still["video"], video / 127.5 - 1, atol=1e-6)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("super_resolution") / "run"
    assert train.main(["--config", CONFIG, "--workdir", str(folder), *arguments()]) == 0
    return folder


def test_a_tiny_run_starts_at_nearest_and_learns(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    evaluations = [line for line in lines if "eval/psnr_db" in line]
    first, last = evaluations[0], evaluations[-1]
    for measure in ("psnr_db", "ssim"):
        assert first[f"eval/{measure}"] == pytest.approx(first[f"eval/nearest_{measure}"], abs=1e-3)
        assert first[f"eval/bicubic_{measure}"] == last[f"eval/bicubic_{measure}"] > first[f"eval/nearest_{measure}"]
    assert last["eval/psnr_db"] > first["eval/psnr_db"] + 0.5
    loss = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(loss) == 80 and np.mean(loss[-20:]) < 0.9 * np.mean(loss[:20])


def test_what_was_trained_becomes_a_component_and_goes_on(workdir, tmp_path):
    assert export_torch.main(["--checkpoint", str(workdir), "--output", str(tmp_path)]) == 0
    component = load_component(tmp_path / "quicksrnet")
    assert component.network is QUICKSRNET and component.config == variant_config("small", 2)
    given = {"model.folder": str(tmp_path / "quicksrnet"), "model.variant": "large", "model.scaling_factor": 4}
    config = tiny_config(**given)
    assert config["model"]["quicksrnet"]["num_channels"] == 32 and config["model"]["quicksrnet"]["scaling_factor"] == 2
    jax.tree.map(np.testing.assert_array_equal, build_method(config).roles["quicksrnet"].load(), component.params)


def test_batches_are_cut_in_training_and_whole_in_evaluation(tmp_path):
    batches, held_out = build_data(tiny_config(), tmp_path)
    assert next(batches)["video"].shape == (8, 1, 24, 16, 3)
    (batch,) = held_out
    assert batch["video"].shape == (8, 1, 32, 32, 3) and np.abs(batch["video"]).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.variant": "tiny"}, "config.model: variant is 'tiny'"),
        ({"model.scaling_factor": 5}, "scaling_factor is 5: use 2, 3, 4"),
        ({"model.scaling_factor": 3}, r"data\.crop\.width is 16 pixels .* does not divide"),
        ({"data.eval_crop.height": 8}, r"data\.eval_crop\.height is 8 pixels: SSIM needs 11"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        build_method(tiny_config(**changes))


def test_full_config_is_below_the_papers_size():
    config = resolve_config(plain(load_config(CONFIG.replace(":tiny", ":full"))))
    abstract = build_method(config).roles["quicksrnet"].abstract
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 50_604 < 100_000
