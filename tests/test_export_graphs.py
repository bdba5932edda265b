"""The graphs of CLIP, the video encoder, the first frame and super-resolution: export, exact rewrites, operators."""

import functools
import json

import jax
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from converters import clip_graph, export_onnx, first_frame_graph, graph_sizes, graphs, onnx_edit, onnx_rewrite
from converters.graph import GraphOptions
from converters.numerics import snr_db
from experiments.random_model import component_configs, random_params
from nd_jax.errors import UserError, run_command
from nd_jax.models.autoencoder_kl import AutoencoderKLConfig
from nd_jax.models.clip_text import CLIPTextConfig, eos_positions
from nd_jax.models.quicksrnet import QuickSRNetConfig
from nd_jax.models.unet import UNet, UNetConfig
from nd_jax.models.video_vae import VideoVAEEncoder
from nd_jax.weights import networks
from nd_jax.weights.folder import Component, save_component

OPTIONS = GraphOptions(
    latent_height=2,
    latent_width=3,
    height=6,
    width=10,
    image_latent_height=7,  # Odd, so that the way up has to cut a row and a column.
    image_latent_width=5,
    context_length=3,
)
CLIP = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
)
CLIP_G = CLIPTextConfig(**CLIP, projection_dim=10, hidden_act="gelu", eos_token_id=2)
# Text on every level and in the middle, depths that differ within a block, and a guidance scale.
UNET = UNetConfig(
    block_out_channels=(8, 12),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    mid_block_type="UNetMidBlock2DCrossAttn",
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=2,
    cross_attention_dim=10,
    transformer_layers_per_block=1,
    reverse_transformer_layers_per_block=((1, 2), 1),
    attention_head_dim=(2, 3),
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=29,
    time_cond_proj_dim=6,
)
CONFIGS = {
    "text_encoder": (networks.CLIP_TEXT, CLIPTextConfig(**CLIP, projection_dim=6, eos_token_id=39)),
    "text_encoder_2": (networks.CLIP_TEXT, CLIP_G),
    "ssd_1b_text_encoder": (networks.CLIP_TEXT_MODEL, CLIPTextConfig(**CLIP, projection_dim=None, eos_token_id=39)),
    "ssd_1b_text_encoder_2": (networks.CLIP_TEXT, CLIP_G),
    "causal_video_vae": component_configs("tiny")[0]["causal_video_vae"],
    "ssd_1b_unet": (networks.UNET, UNET),
    "ssd_1b_vae": (
        networks.AUTOENCODER_KL,
        AutoencoderKLConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2),
    ),
    "quicksrnet": (networks.QUICKSRNET, QuickSRNetConfig(3, num_channels=8, num_intermediate_layers=1)),
}
# Operators of each graph beside those that its builder counts, and an initializer.
GRAPHS = {
    "clip_l": ({"MatMul": 2 * 8 + 2, "Sigmoid": 2, "Transpose": 8}, "blocks/1/attention/query/kernel"),
    "clip_g": ({"MatMul": 2 * 8 + 2, "Gelu": 0, "Sigmoid": 2, "Transpose": 8}, "text_projection/kernel"),
    "first_frame_clip_l": ({"MatMul": 8, "LayerNormalization": 2}, "blocks/0/mlp/down/kernel"),
    "first_frame_clip_g": ({"MatMul": 2 * 8 + 2}, "blocks/1/mlp/down/kernel"),
    "vae_encoder": ({"Conv": 22, "MatMul": 6, "Transpose": 6}, "encoder/down_1_time/kernel"),
    "unet": ({"Slice": 1}, "up_0_block_1_transformer/blocks/1/mlp/gate/kernel"),
    "image_decoder": ({}, "decoder/up_0_sample/conv/kernel"),
    "quicksrnet": ({"Conv": 3, "Clip": 3, "DepthToSpace": 1, "Transpose": 2}, "conv_last/kernel"),
}


@functools.cache
def component(folder):
    network, config = CONFIGS[folder]
    return Component(network, config, random_params(network, config, np.random.default_rng(0), np.float32))


@functools.cache
def build(name):
    folders, builder = graphs.GRAPHS[name]
    return builder({folder: component(folder) for folder in folders}, OPTIONS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Graph name -> (model, report)."""

    @functools.cache
    def export(name):
        folder = tmp_path_factory.mktemp(name)
        report = export_onnx.export_loaded(build(name), folder)
        return onnx.load(str(folder / f"{name}.onnx")), report

    return export


def on_device(graph, *inputs):
    """The traced function in JAX."""
    return [np.asarray(y) for y in jax.jit(graph.apply)(graph.params, *inputs)]


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_is_what_the_device_wants(name, exported):
    model, report = exported(name)
    counts, weight = GRAPHS[name]
    assert {op: report["ops"].get(op, 0) for op in counts} == counts
    graph = build(name)
    assert [value.name for value in model.graph.input] == [spec.name for spec in graph.inputs]
    assert [value.name for value in model.graph.output] == [spec.name for spec in graph.outputs]
    assert weight in {tensor.name for tensor in model.graph.initializer}
    assert not set(report["ops"]) & {"Shape", "Where", "GatherND", "Expand", "Max", "Min", "ReduceSum", "Pad"}
    assert min(report["snr_db"].values()) > 100
    assert not any("jit(" in node.name for node in model.graph.node)


def test_weights_are_the_models_own(exported):
    """Convolutions as OIHW, norms of small pictures as [C], the last time slice of a 3D kernel."""
    model, _ = exported("vae_encoder")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    encoder = component("causal_video_vae").params["encoder"]
    kernel = encoder["down_0_block_0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(arrays["encoder/down_0_block_0/conv1/kernel"], kernel[2].transpose(3, 2, 0, 1))
    scale = encoder["norm_out"]["scale"]
    np.testing.assert_array_equal(arrays["encoder/norm_out/scale"], scale)


def test_the_command_takes_sizes_from_the_folder_unless_they_are_given(tmp_path, capsys):
    large = component("quicksrnet")
    save_component(tmp_path / "quicksrnet", large.network, large.config, large.params)
    (tmp_path / "generation.json").write_text('{"height": 32, "width": 48}')
    sizes = graph_sizes.folder_sizes(tmp_path)
    assert (sizes["image_latent_height"], sizes["image_latent_width"], sizes["context_length"]) == (8, 12, 77)
    command = ["--model", str(tmp_path), "--output", str(tmp_path / "out"), "--graph", "quicksrnet", "--height"]
    assert run_command(lambda: export_onnx.main([*command, "6"])) == 0
    assert "agrees with JAX" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "quicksrnet.json").read_text())
    assert report["inputs"][0]["shape"] == [1, 6, 48, 3] and report["outputs"][0]["shape"] == [1, 18, 144, 3]
    assert run_command(lambda: export_onnx.main([*command, "0"])) == 1
    assert "--height 0" in capsys.readouterr().err


# --- exact rewrites against the models, in JAX ------------------------------------------------------------------------


def test_one_frame_is_the_first_latent_of_every_clip_that_it_begins():
    """On a clip the encoder uses whole 3D kernels: only zeros in front of it give this."""
    vae, graph = component("causal_video_vae"), build("vae_encoder")
    encode = jax.jit(functools.partial(VideoVAEEncoder(vae.config).apply, method="encode"))
    params = {name: vae.params[name] for name in ("encoder", "quant_conv")}
    clip = np.random.default_rng(1).uniform(-1, 1, (2, 9, *graph.inputs[0].shape[1:])).astype(np.float32)
    clip[1, 0] = clip[0, 0]
    posterior = encode({"params": params}, clip)
    assert posterior.mean.shape[1] == 2
    mean, logvar = on_device(graph, clip[:1, 0])
    for k in range(2):
        assert snr_db(posterior.mean[k : k + 1, 0], mean) > 100
        assert snr_db(posterior.logvar[k : k + 1, 0], logvar) > 100
    assert snr_db(posterior.mean[0, 1], posterior.mean[1, 1]) < 40


def test_the_unet_is_the_whole_one_on_conditioning_from_the_host():
    unet, graph, rng = component("ssd_1b_unet"), build("unet"), np.random.default_rng(2)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    latents, context = normal(*graph.inputs[0].shape), normal(*graph.inputs[2].shape)
    timestep, time_ids = np.array([749], np.float32), np.array([[640, 1024, 0, 8, 640, 1024]], np.float32)
    given = (normal(1, UNET.pooled_dim), time_ids, normal(1, UNET.time_cond_proj_dim))
    expected = jax.jit(UNet(UNET).apply)({"params": unet.params}, latents, timestep, context, *given).prediction
    conditioning = first_frame_graph.unet_conditioning(UNET, unet.params, timestep, *given)
    assert conditioning.shape == graph.inputs[1].shape
    (prediction,) = on_device(graph, latents, conditioning, context)
    assert snr_db(expected, prediction) > 100
    (other,) = on_device(graph, latents, 0.9 * conditioning, context)
    assert snr_db(expected, other) < 60


@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
def test_the_end_token_is_picked_and_sees_none_behind_it(name):
    graph = build(name)
    config = component({"clip_l": "text_encoder", "clip_g": "text_encoder_2"}[name]).config
    end = 39  # The end token, or the largest id where the config says 2.
    ids = np.array([[5, 7, end, 3, end, 1, 1, 1, 2]], np.int32)
    ends = clip_graph.end_weights(ids, config)
    np.testing.assert_array_equal(ends, [[0, 0, 1, 0, 0, 0, 0, 0, 0]])
    assert eos_positions(ids, config).tolist() == [2]
    changed = ids.copy()
    changed[0, 3:] = 0
    (pooled,), (same,) = on_device(graph, ids, ends), on_device(graph, changed, ends)
    np.testing.assert_allclose(same, pooled, rtol=0, atol=1e-6)
    changed[0, 1] = 0
    assert snr_db(pooled, on_device(graph, changed, ends)[0]) < 40
    assert snr_db(graph.reference(ids, ends)[0], pooled) > 100


# --- rewrites on graphs that are almost the pattern -------------------------------------------------------------------


def rewritten(text, **constants):
    """(model, its operators) after the rewriting pass on a graph in ONNX's text form, with constants."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items())
    model = ir.from_proto(proto)
    onnx_rewrite.restore_native(model)
    return model, onnx_edit.op_counts(model)


def norm(shape, behind=""):
    return f"""
    agraph (float{shape} x) => (float{shape} y) {{
      total = ReduceSum <keepdims = 1> (x, axis)
      mean = Mul (total, share)
      centred = Sub (x, mean)
      square = Mul (centred, centred)
      squares = ReduceSum <keepdims = 1> (square, axis)
      variance = Mul (squares, share)
      shifted = Add (variance, eps)
      root = Sqrt (shifted)
      inverse = Reciprocal (root)
      {"y" if not behind else "normed"} = Mul (centred, inverse)
      {behind}
    }}"""


NORM = {"axis": np.array([-1]), "share": np.float32(1 / 8), "eps": np.float32(1e-5)}
VECTORS = {name: np.arange(8, dtype=np.float32) for name in ("scale", "bias")}
AFFINE = "scaled = Mul (normed, scale)\n y = Add (scaled, bias)"


def test_layer_norm_takes_scale_and_bias_along():
    model, ops = rewritten(norm([2, 4, 8], AFFINE), **NORM, **VECTORS)
    assert ops == {"LayerNormalization": 1}
    (node,) = model.graph
    assert [value.name for value in node.inputs] == ["x", "scale", "bias"]
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    model, ops = rewritten(norm([2, 4, 8]), **NORM)
    assert ops == {"LayerNormalization": 1}
    np.testing.assert_array_equal(model.graph[0].inputs[1].const_value.numpy(), np.ones(8, np.float32))


@pytest.mark.parametrize(
    "changes", [{"axis": np.array([1])}, {"share": np.float32(1 / 4)}, {"axis": np.array([-1, 1])}]
)
def test_moments_of_something_else_are_no_norm(changes):
    _, ops = rewritten(norm([2, 8, 8]), **NORM | changes)
    assert "LayerNormalization" not in ops and ops["Sqrt"] == 1


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (4, {"Reshape": 2, "LayerNormalization": 1, "BatchNormalization": 1}),
        (7 * 2**14, {"Reshape": 2, "LayerNormalization": 1, "BatchNormalization": 1}),
        (7 * 2**14 + 1, {"Reshape": 2, "InstanceNormalization": 1, "Mul": 1, "Add": 1}),
    ],
)
def test_the_form_of_a_group_norm_goes_by_the_size_of_the_picture(width, expected):
    text = f"""
    agraph (float[1,4,4,{width}] x) => (float[1,4,4,{width}] y) {{
      rows = Reshape (x, groups)
      normed = LayerNormalization <axis = -1> (rows, ones)
      back = Reshape (normed, picture)
      wide = Reshape (scale, channels)
      scaled = Mul (back, wide)
      high = Reshape (bias, channels)
      y = Add (high, scaled)
    }}"""
    shapes = {"groups": np.array([1, 2, 8 * width]), "picture": np.array([1, 4, 4, width])}
    vectors = {name: np.arange(4, dtype=np.float32) for name in ("scale", "bias")}
    constants = {"channels": np.array([1, 4, 1, 1]), "ones": np.ones(8 * width, np.float32), **vectors}
    model, ops = rewritten(text, **shapes, **constants)
    assert ops == expected
    wanted = [4] if "BatchNormalization" in ops else [4, 1, 1]
    assert [list(model.graph.initializers[name].shape) for name in vectors] == [wanted] * 2


def test_a_group_norm_without_a_bias_keeps_its_scale():
    text = """
    agraph (float[1,4,3,4] x) => (float[1,4,3,4] y) {
      rows = Reshape (x, groups)
      normed = LayerNormalization <axis = -1> (rows, ones)
      back = Reshape (normed, picture)
      wide = Reshape (scale, channels)
      y = Mul (back, wide)
    }"""
    shapes = {"groups": np.array([1, 2, 24]), "picture": np.array([1, 4, 3, 4]), "channels": np.array([1, 4, 1, 1])}
    _, ops = rewritten(text, **shapes, ones=np.ones(24, np.float32), scale=np.arange(4, dtype=np.float32))
    assert ops == {"Reshape": 2, "LayerNormalization": 1, "Mul": 1}


@pytest.mark.parametrize(("parts", "resized"), [("x, x, x, x", 1), ("x, x, x, z", 0)])
def test_only_a_picture_beside_itself_is_resized(parts, resized):
    text = f"""
    agraph (float[1,2,3,4] x, float[1,2,3,4] z) => (float[1,2,6,8] y) {{
      beside = Concat <axis = 1> ({parts})
      y = DepthToSpace <blocksize = 2, mode = "DCR"> (beside)
    }}"""
    assert rewritten(text)[1].get("Resize", 0) == resized


def test_bounds_become_a_clip():
    text = """
    agraph (float[2,3] x) => (float[2,3] y) {
      above = Max (low, x)
      y = Min (above, high)
    }"""
    model, ops = rewritten(text, low=np.full((1, 1), -2, np.float32), high=np.full((1, 1), 3, np.float32))
    assert ops == {"Clip": 1}
    assert [float(value.const_value.numpy()) for value in model.graph[0].inputs[1:]] == [-2, 3]
    _, ops = rewritten(text, low=np.zeros((1, 1), np.float32), high=np.arange(3, dtype=np.float32))
    assert ops == {"Clip": 1, "Min": 1}


@pytest.mark.parametrize(
    ("pads", "fill", "merged"),
    [([0, 0, 1, 0, 0, 0, 2, 1], 0, 1), ([0, 0, 1, 0, 0, 0, 2, 1], 1, 0), ([0, 1, 0, 0, 0, 0, 0, 0], 0, 0)],
)
def test_zeros_around_a_picture_are_the_convolutions_own(pads, fill, merged):
    channels = 2 + pads[1]
    text = """
    agraph (float[1,2,4,4] x) => (float[1,3,R,C] y) {
      wide = Pad (x, pads, fill)
      y = Conv <pads = [0, 1, 0, 1]> (wide, kernel)
    }"""
    kernel = np.ones((3, channels, 3, 3), np.float32)
    model, ops = rewritten(text, pads=np.array(pads), fill=np.float32(fill), kernel=kernel)
    assert ops.get("Pad", 0) == 1 - merged
    if merged:
        assert list(model.graph[0].attributes["pads"].as_ints()) == [1, 1, 2, 2]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_a_component_of_another_class_is_named(name):
    (folder,), builder = graphs.GRAPHS[name]
    other = component("quicksrnet" if folder != "quicksrnet" else "ssd_1b_vae")
    with pytest.raises(UserError, match=f"{folder} holds a {other.network.name}; this graph needs a"):
        builder({folder: other}, OPTIONS)
