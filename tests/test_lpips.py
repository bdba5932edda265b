"""LPIPS against the same computation in plain torch, its gradients, and the way from the two published files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from converters import import_lpips
from nd_jax.errors import UserError, run_command
from nd_jax.models.lpips import SMALLEST_SIDE, LPIPSConfig, lpips_distance
from nd_jax.weights.folder import load_component, save_component
from nd_jax.weights.lpips import LPIPS_VGG16, load_lpips, lpips_table
from nd_jax.weights.network import flat_shapes
from nd_jax.weights.safetensors_io import SafetensorsFile
from nd_jax.weights.table import to_ours

# The lpips package's own file, see lpips_LICENSE.txt beside it.
PUBLISHED_HEADS = Path(__file__).parent / "data" / "lpips_vgg_v0.1.pth"
# Places of the convolutions in torchvision's list; an output is taken, and a pool follows, after the last of each.
VGG16 = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
NARROW = LPIPSConfig((4, 6, 8, 8, 8))

rng = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_trunk(widths, bias=0.1):
    """A state dict as of torchvision's vgg16, its numbers random, of about the same size in every layer."""
    state, inputs = {}, 3
    for stage, width in zip(VGG16, widths, strict=True):
        for index in stage:
            kernel = rng.standard_normal((width, inputs, 3, 3), np.float32) * np.float32(np.sqrt(2 / (9 * inputs)))
            state[f"features.{index}.weight"] = torch.from_numpy(kernel)
            state[f"features.{index}.bias"] = torch.from_numpy(bias * rng.standard_normal(width, np.float32))
            inputs = width
    return state | {"classifier.0.weight": torch.ones(2, 3), "classifier.0.bias": torch.ones(2)}


def random_heads(widths):
    draw = lambda width: torch.from_numpy(rng.uniform(0, 1, (1, width, 1, 1)).astype(np.float32))
    return {f"lin{i}.model.1.weight": draw(width) for i, width in enumerate(widths)}


def torch_distance(state, a, b):
    """The package's forward pass on [N, 3, H, W]."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]

    def unit_features(x):
        x = (x - shift) / scale
        for number, stage in enumerate(VGG16):
            x = functional.max_pool2d(x, 2, 2) if number else x
            for index in stage:
                x = functional.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
                x = torch.relu(x)
            yield x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + 1e-10)

    total = 0
    for stage, (of_a, of_b) in enumerate(zip(unit_features(a), unit_features(b), strict=True)):
        total = total + functional.conv2d((of_a - of_b) ** 2, state[f"lin{stage}.model.1.weight"]).mean((1, 2, 3))
    return total


def pictures(*shape):
    return rng.uniform(-1, 1, shape).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@functools.cache
def narrow():
    """(state dict, our parameters)"""
    state = random_trunk(NARROW.widths) | random_heads(NARROW.widths)
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    return state, to_ours(arrays, lpips_table(NARROW), flat_shapes(LPIPS_VGG16, NARROW))


distance = jax.jit(lambda params, a, b: lpips_distance(params, a, b, NARROW))
gradient = jax.jit(jax.grad(lambda a, params, b: lpips_distance(params, a, b, NARROW).sum()))


def test_values_and_gradients_are_those_of_plain_torch():
    """Sides that no pool divides evenly, so that rows and columns are dropped as torch drops them."""
    state, params = narrow()
    a, b = pictures(2, 35, 23, 3), pictures(2, 35, 23, 3)
    a_torch = to_torch(a).requires_grad_()
    expected = torch_distance(state, a_torch, to_torch(b))
    expected.sum().backward()
    np.testing.assert_allclose(distance(params, a, b), expected.detach().numpy(), rtol=2e-5)
    grad = a_torch.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient(a, params, b), grad, rtol=0, atol=2e-5 * np.abs(grad).max())


def test_published_heads_on_a_trunk_of_full_width(tmp_path, capsys):
    """From the two files as they are published, through the command, to the distance."""
    config = LPIPSConfig()
    trunk = random_trunk(config.widths)
    torch.save(trunk, tmp_path / "vgg16.pth")
    command = ["--trunk", str(tmp_path / "vgg16.pth"), "--heads", str(PUBLISHED_HEADS)]
    assert import_lpips.main([*command, "--output", str(tmp_path / "lpips")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("imported lpips, 14,716,160 parameters") and captured.out.count("\n") == 1
    report = json.loads((tmp_path / "lpips" / "import.json").read_text())
    assert report["parameters"] == 14_716_160
    assert report["sources"]["heads"] == {
        "file": "lpips_vgg_v0.1.pth",
        "sha256": import_lpips.hash_files([PUBLISHED_HEADS]),
    }

    read, params = load_lpips(tmp_path / "lpips")
    assert read == config
    heads = torch.load(PUBLISHED_HEADS, map_location="cpu", weights_only=True)
    a = pictures(2, 32, 32, 3)
    b = np.clip(a + 0.2 * pictures(2, 32, 32, 3), -1, 1)
    with torch.no_grad():
        expected = torch_distance(trunk | heads, to_torch(a), to_torch(b)).numpy()
    ours = jax.jit(lambda p: lpips_distance(p, a, b, config))(params)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


@given(st.integers(0, 10_000))
@settings(max_examples=5)
def test_it_is_a_distance(seed):
    _, params = narrow()
    a, b = np.random.default_rng(seed).uniform(-1, 1, (2, 1, 16, 16, 3)).astype(np.float32)
    there, back = distance(params, a, b), distance(params, b, a)
    np.testing.assert_allclose(there, back, rtol=1e-5)
    assert float(there[0]) > 0
    np.testing.assert_allclose(distance(params, a, a), 0.0, atol=1e-10)


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (1.0, -100.0), (1e-30, 0.0)])
def test_gradients_are_finite_where_pictures_are_equal_or_features_vanish(scale, bias):
    """Equal, flat and unlike pictures at once. A bias of -100 leaves the last stage no feature above 0; at a scale of
    1e-30 features are above 0 and their squares are not."""
    _, params = narrow()
    last = {name: x * np.float32(scale) for name, x in params["convs_4_2"].items()}
    params = {**params, "convs_4_2": {**last, "bias": last["bias"] + np.float32(bias)}}
    same, other = pictures(2, 16, 16, 3)
    a, b = np.stack([same, np.zeros_like(same), same]), np.stack([same, np.zeros_like(same), other])
    grad = np.asarray(gradient(a, params, b))
    assert np.isfinite(grad).all()
    assert np.abs(grad[:2]).max() < 1e-7 and np.abs(grad[2]).max() > 1e-4


def test_bfloat16_is_close():
    _, params = narrow()
    a, b = pictures(2, 32, 32, 3), pictures(2, 32, 32, 3)
    half = jax.jit(lambda p: lpips_distance(p, a, b, NARROW, jnp.bfloat16))(params)
    assert half.dtype == jnp.float32
    exact = np.asarray(distance(params, a, b))
    assert not np.array_equal(half, exact)
    np.testing.assert_allclose(half, exact, rtol=0.03)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((1, SMALLEST_SIDE - 1, 32, 3), (1, SMALLEST_SIDE - 1, 32, 3), "15 x 32 pixels.*16 or more"),
        ((1, 32, 8, 3), (1, 32, 8, 3), "32 x 8 pixels"),
        ((2, 16, 16, 3), (1, 16, 16, 3), r"\[2, 16, 16, 3\] and \[1, 16, 16, 3\]"),
        ((1, 16, 16, 4), (1, 16, 16, 4), "give two arrays"),
        ((1, 2, 16, 16, 3), (1, 2, 16, 16, 3), "give two arrays"),
    ],
)
def test_pictures_that_do_not_fit_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        lpips_distance(narrow()[1], jnp.zeros(a), jnp.zeros(b), NARROW)


def test_a_written_folder_has_the_keys_of_both_files(tmp_path):
    state, params = narrow()
    save_component(tmp_path / "lpips", LPIPS_VGG16, NARROW, params)
    with SafetensorsFile(tmp_path / "lpips" / "model.safetensors") as file:
        written = {key: file.read(key) for key in file.keys()}
    expected = {key: tensor.numpy() for key, tensor in state.items() if not key.startswith("classifier")}
    assert set(written) == set(expected)
    assert all(np.array_equal(written[key], expected[key]) for key in expected)
    component = load_component(tmp_path / "lpips", LPIPS_VGG16)
    assert component.config == NARROW
    assert jax.tree.all(jax.tree.map(np.array_equal, component.params, params))


def save(folder, trunk, heads):
    torch.save(trunk, folder / "trunk.pth")
    torch.save(heads, folder / "heads.pth")
    return folder / "trunk.pth", folder / "heads.pth"


@pytest.mark.parametrize(
    ("change_trunk", "change_heads", "message"),
    [
        (lambda t: t.pop("features.28.bias"), None, r"trunk\.pth: .*1 missing: features\.28\.bias.*--trunk needs"),
        # VGG19 and the variant with batch norms have further entries.
        (lambda t: t.update({"features.30.weight": torch.ones(1)}), None, r"1 extra: features\.30\.weight"),
        (
            lambda t: t.update({"features.0.weight": torch.ones(4, 3, 1, 1)}),
            None,
            r"features\.0\.weight \[4, 3, 1, 1\]",
        ),
        (None, lambda h: h.pop("lin4.model.1.weight"), r"heads\.pth: .*lin4\.model\.1\.weight.*--heads needs lpips/"),
        (None, lambda h: h.update({"lin1.model.1.weight": torch.ones(1, 192, 1, 1)}), r"\[1, 192, 1, 1\] instead of"),
        (None, lambda h: h["lin2.model.1.weight"].sub_(2), r"heads\.pth: lin2\.model\.1\.weight goes down to -"),
        (None, lambda h: h["lin2.model.1.weight"].fill_(np.nan), "goes down to nan"),
    ],
)
def test_wrong_files_are_named(tmp_path, change_trunk, change_heads, message):
    trunk, heads = random_trunk(NARROW.widths), random_heads(NARROW.widths)
    for change, state in ((change_trunk, trunk), (change_heads, heads)):
        if change:
            change(state)
    with pytest.raises(UserError, match=message):
        import_lpips.import_lpips(*save(tmp_path, trunk, heads), tmp_path / "out", NARROW)
    assert not (tmp_path / "out").exists()


def test_swapped_and_absent_files_are_named(tmp_path, capsys):
    trunk, heads = save(tmp_path, random_trunk(NARROW.widths), random_heads(NARROW.widths))
    with pytest.raises(UserError, match=r"heads\.pth: tensors do not fit lpips: 26 missing"):
        import_lpips.import_lpips(heads, trunk, tmp_path / "out", NARROW)
    arguments = ["--trunk", str(tmp_path / "none.pth"), "--heads", str(heads), "--output", str(tmp_path / "out")]
    assert run_command(lambda: import_lpips.main(arguments)) == 1
    assert "none.pth: no such file; --trunk needs the state dict of torchvision's vgg16" in capsys.readouterr().err


def test_another_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "CausalVideoVAE"}')
    with pytest.raises(UserError, match=r"config\.json: _class_name is 'CausalVideoVAE', 'LPIPS' is needed"):
        load_lpips(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "LPIPS", "widths": [1, 2]}')
    with pytest.raises(UserError, match=r"widths is \[1, 2\]: give 5"):
        load_lpips(tmp_path)
