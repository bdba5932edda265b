"""Full-size networks have every key and shape of the released state dicts; nothing is allocated."""

import collections
import json
import math
from pathlib import Path

import pytest

from nd_jax.weights import networks
from nd_jax.weights.table import expand

LAYOUTS = Path(__file__).parent / "layouts"


@pytest.mark.parametrize(
    ("name", "network", "parameters"),
    [
        ("distil_t5", networks.DISTIL_T5, 129_551_488),
        ("context_adapter", networks.CONTEXT_ADAPTER, 130_041_344),
        ("t5_v1_1_xxl_encoder", networks.T5_ENCODER, 4_762_310_656),
        ("clip_l_text_with_projection", networks.CLIP_TEXT, 123_650_304),
        ("clip_g_text_with_projection", networks.CLIP_TEXT, 694_659_840),
        ("pyramid_mmdit_18", networks.PYRAMID_MMDIT, 1_512_155_200),
        ("pyramid_mmdit_24", networks.PYRAMID_MMDIT, 2_022_041_152),
        ("pyramid_flow_mmdit_teacher", networks.PYRAMID_FLOW_MMDIT, 2_028_334_144),
        ("asymmetric_causal_video_vae", networks.ASYMMETRIC_VIDEO_VAE, 119_543_507),
        ("pyramid_flow_causal_video_vae", networks.CAUSAL_VIDEO_VAE, 335_402_067),
        ("ssd1b_unet", networks.UNET, 1_331_334_404),
        ("sdxl_autoencoder_kl", networks.AUTOENCODER_KL, 83_653_863),
    ],
)
def test_keys_shapes_and_totals(name, network, parameters):
    layout = json.loads((LAYOUTS / f"{name}.json").read_text(encoding="utf-8"))
    config = network.read_config(layout["config_kwargs"])
    shapes = networks.flat_shapes(network, config)
    tensors = list(expand(network.table(config), shapes))
    buffers = layout.get("persistent_buffers", {})
    assert {key: list(t.shape) for t in tensors for key in t.keys} | buffers == layout["state_dict"]
    assert set(network.buffers(config)) == set(buffers)
    assert sorted(list(t.keys) for t in tensors if len(t.keys) > 1) == sorted(layout["tied"])
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters == layout["total_parameters"]


@pytest.mark.parametrize(
    ("name", "network", "decoder"),
    [
        ("asymmetric_causal_video_vae", networks.ASYMMETRIC_VIDEO_VAE, 9_910_147),
        ("pyramid_flow_causal_video_vae", networks.CAUSAL_VIDEO_VAE, 225_768_707),
    ],
)
def test_halves_of_the_video_vae(name, network, decoder):
    layout = json.loads((LAYOUTS / f"{name}.json").read_text(encoding="utf-8"))
    shapes = networks.flat_shapes(network, network.read_config(layout["config_kwargs"]))
    modules = collections.Counter()
    for path, shape in shapes.items():
        modules[path.partition("/")[0]] += math.prod(shape)
    assert modules == layout["parameters_by_top_module"]
    assert (modules["encoder"], modules["decoder"]) == (109_632_032, decoder)
    half = networks.VIDEO_VAE_ENCODER
    frozen = networks.flat_shapes(
        half, half.read_config({**layout["config_kwargs"], "_class_name": network.class_names[0]})
    )
    assert frozen == {path: shape for path, shape in shapes.items() if path.startswith(("encoder/", "quant_conv/"))}


def test_a_clip_without_projection():
    """The first encoder of SSD-1B; its config.json has a projection_dim all the same."""
    layout = json.loads((LAYOUTS / "clip_l_text_with_projection.json").read_text(encoding="utf-8"))
    del layout["state_dict"]["text_projection.weight"]
    network = networks.CLIP_TEXT_MODEL
    config = network.read_config(layout["config_kwargs"])
    shapes = networks.flat_shapes(network, config)
    assert {t.keys[0]: list(t.shape) for t in expand(network.table(config), shapes)} == layout["state_dict"]
    assert sum(math.prod(shape) for shape in shapes.values()) == layout["parameters_by_top_module"]["text_model"]


def test_written_configs_are_read_back_as_the_same():
    # The settings without which these classes are others than ours.
    needed = {name: {"feed_forward_proj": "gated-gelu"} for name in ("t5_encoder", "distil_t5")}
    needed["unet"] = json.loads((LAYOUTS / "ssd1b_unet.json").read_text(encoding="utf-8"))["config_kwargs"]
    for network in networks.NETWORKS:
        config = network.read_config(needed.get(network.name, {}))
        written = json.loads(json.dumps(network.write_config(config)))
        assert network.read_config(written) == config
        whole = networks.network_of(written, "x")
        assert whole is network or (network.partial and not whole.partial)
