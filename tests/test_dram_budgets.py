"""What a call may read from DRAM at the released size, by the Hexagon compiler's own plan.

A graph that compiles and is right can still move forty times as much (docs/routes.md): no number of a tiny graph
would show it. Weights are random; nothing is run.
"""

import jax
import numpy as np
import onnx_ir as ir
import pytest

from converters import decoder_graph, device_layers, export_onnx, hexagon, mmdit_graph, onnx_norm
from converters.graph import TRANSFORMER, Graph, GraphOptions, TensorSpec
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.video_vae import AsymmetricVideoVAEConfig
from nd_jax.weights.folder import Component
from nd_jax.weights.mmdit import PYRAMID_MMDIT
from nd_jax.weights.network import abstract_params
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE


def random_component(network, config, wanted):
    """Random weights in the wanted parts alone; the others are zeros that take no memory."""
    rng = np.random.default_rng(0)

    def leaf(path, spec):
        if path[0].key not in wanted:
            return np.broadcast_to(np.float32(0), spec.shape)
        return rng.standard_normal(spec.shape, np.float32) * 0.02

    return Component(network, config, jax.tree_util.tree_map_with_path(leaf, abstract_params(network, config)))


def planned(graph, folder):
    """(megabytes that a call reads, megabytes of the weights in FP16)."""
    model = export_onnx.convert(graph, folder / "graph.tflite")[0]
    ir.save(model, folder / "graph.onnx", external_data="graph.onnx.data", size_threshold_bytes=1024)
    del model
    traffic = hexagon.planned_traffic(folder / "graph.onnx", "8-elite")
    weights = sum(np.size(leaf) for leaf in jax.tree.leaves(graph.params))
    return traffic["dram_read_bytes"] / 1e6, 2 * weights / 1e6


def test_streaming_decoder_reads_at_most_250_mb(tmp_path):
    wanted = ("decoder", "post_quant_conv")
    vae = random_component(ASYMMETRIC_VIDEO_VAE, AsymmetricVideoVAEConfig(), wanted)
    graph = decoder_graph.decoder_stream({"causal_video_vae": vae}, GraphOptions())
    assert graph.inputs[0].shape == (1, 40, 64, 16)
    read, weights = planned(graph, tmp_path)
    assert weights < read <= 250


def test_a_block_of_the_video_transformer_at_408_tokens_reads_at_most_200_mb(tmp_path):
    transformer = random_component(PYRAMID_MMDIT, MMDiTConfig(num_layers=2), ("blocks", "patch_embed"))
    graph = mmdit_graph.mmdit_stage({TRANSFORMER: transformer}, GraphOptions(blocks=(0, 1)), stage=0)
    assert graph.inputs[4].shape[-1] == 408
    read, weights = planned(graph, tmp_path)
    assert 160 < weights < read <= 200


@pytest.mark.parametrize(("height", "width", "small"), [(16, 24, True), (48, 80, False)])
def test_a_group_norm_has_the_form_that_reads_less(height, width, small, tmp_path, monkeypatch):
    """640 channels, as in the UNet: 0.5 MB, and 4.7 MB."""
    channels, rng = 640, np.random.default_rng(0)
    dense = lambda: {"kernel": rng.standard_normal((1, 1, channels, channels), np.float32) * 0.04}
    vectors = {name: rng.standard_normal(channels, np.float32) for name in ("scale", "bias")}
    picture = (1, height, width, channels)

    def apply(params, x):
        y = device_layers.group_norm(params["norm"], device_layers.conv(params["before"], x), 32, 1e-6)
        return (device_layers.conv(params["behind"], jax.nn.silu(y)),)

    params = {"before": dense(), "norm": vectors, "behind": dense()}
    ends = ((TensorSpec("x", picture, "float32"),), (TensorSpec("y", picture, "float32"),))
    graph = Graph("norm", *ends, params, apply, apply, lambda rng: {}, {"Conv": 2})
    read = {}
    for bound in (0, onnx_norm.SMALL_PICTURE, height * width * channels):
        monkeypatch.setattr(onnx_norm, "SMALL_PICTURE", bound)
        (tmp_path / str(bound)).mkdir()
        read[bound], _ = planned(graph, tmp_path / str(bound))
    as_large, ours, as_small = read.values()
    better, worse = (as_small, as_large) if small else (as_large, as_small)
    assert ours == better < 0.8 * worse
