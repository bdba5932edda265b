"""What a call may read from DRAM at the released size, by the Hexagon compiler's own plan.

A graph that compiles and is right can still move forty times as much (docs/routes.md): no number of a tiny graph
would show it. Weights are random; nothing is run.
"""

import jax
import numpy as np
import onnx_ir as ir

from converters import decoder_graph, export_onnx, hexagon, mmdit_graph
from converters.graph import TRANSFORMER, GraphOptions
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
