"""Stage graphs of the video transformer: padded units, blocks, export, Hexagon binary, errors."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters import (
    compile_hexagon,
    export_onnx,
    graph_sizes,
    graphs,
    mmdit_device,
    mmdit_graph,
    onnx_check,
    onnx_edit,
    onnx_lint,
    onnx_rewrite,
)
from converters.graph import TRANSFORMER, GraphOptions
from converters.numerics import snr_db
from nd_jax.errors import UserError, run_command
from nd_jax.generate.stage_inputs import conditioning_input, geometry_inputs, stage_layouts
from nd_jax.models.mmdit import MMDiTConfig, PyramidMMDiT
from nd_jax.models.mmdit_block import rotate
from nd_jax.models.positions import rotary_table
from nd_jax.pyramid.layout import VideoSize, token_layout
from nd_jax.weights.folder import Component, save_component
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT
from nd_jax.weights.network import abstract_params

TOY_TEACHER = Path(__file__).parent.parent / "experiments" / "models" / "toy_teacher"
TEXT, VIDEO = 4, VideoSize(latent_frames=7, height=8, width=16)
OPTIONS = GraphOptions(length=TEXT, latent_height=8, latent_width=16)


@functools.cache
def transformer(embedder=False, layers=2):
    """Random weights; with 0.3 N(0, 1) modulations are of the size of what they modulate."""
    config = MMDiTConfig(
        sample_size=16,
        in_channels=2,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=16,
        context_embedder=embedder,
    )
    network, rng = PYRAMID_FLOW_MMDIT if embedder else PYRAMID_MMDIT, np.random.default_rng(1)
    draw = lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
    return Component(network, config, jax.tree.map(draw, abstract_params(network, config)))


def stage_graph(stage, blocks=None, **model):
    options = dataclasses.replace(OPTIONS, blocks=blocks)
    return mmdit_graph.mmdit_stage({TRANSFORMER: transformer(**model)}, options, stage)


# --- padded units -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _unpadded(layout, params, tokens, context, pooled, timestep, text_mask):
    """The model that training uses, on a unit's own tokens."""
    out = PyramidMMDiT(transformer().config, scan=False).apply(
        {"params": params}, tokens, context, pooled, timestep, layout.geometry(text_mask), layout.output_tokens
    )
    return out.velocity


@pytest.mark.parametrize("stage", range(3))
def test_one_graph_serves_every_unit(stage):
    """All 18 (unit, stage) pairs of a 49-frame video behind its first frame; padding holds garbage."""
    model, graph = transformer(), stage_graph(stage)
    apply, layouts = jax.jit(graph.apply), stage_layouts(transformer().config, VIDEO, stage, TEXT)
    text_mask, params = (
        np.array([[1, 1, 1, 0]]),
        {**model.params, "block_0": jax.tree.map(lambda x: x[0], model.params["blocks"])},
    )
    padding = []
    for unit, padded in enumerate(layouts[1:], 1):
        rng = np.random.default_rng(unit)
        normal = lambda *shape, rng=rng: rng.standard_normal((1, *shape)).astype(np.float32)
        tokens, context = 3 * normal(padded.image_length, 8), normal(TEXT, 16)
        pooled, timestep = normal(6), rng.uniform(0, 1000, 1).astype(np.float32)
        inputs = {
            "tokens": tokens,
            "context": context,
            "conditioning": conditioning_input(model.config, model.params, timestep, pooled),
            **geometry_inputs(padded, text_mask),
        }
        (got,) = apply(graph.params, *(inputs[spec.name] for spec in graph.inputs))
        padding.append(padded.padding)
        plain = token_layout(model.config, padded.clips, TEXT)
        other = tokens[:, padded.padding :], context, pooled, timestep, text_mask
        expected = _unpadded(plain, params, *other)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert padding[-1] == 0 and padding == sorted(padding, reverse=True) and len(set(padding)) == 6


def test_the_first_unit_too():
    """It sees the text and is seen by it, so that text and image are mixed in all blocks."""
    model, graph, (padded, *_) = transformer(), stage_graph(1), stage_layouts(transformer().config, VIDEO, 1, TEXT)
    sample = graph.sample(np.random.default_rng(0)) | geometry_inputs(padded, np.ones((1, TEXT)))
    plain, real = token_layout(model.config, padded.clips, TEXT), slice(padded.padding, None)
    own = geometry_inputs(plain, np.ones((1, TEXT)))
    own |= {name: sample[name] for name in ("context", "conditioning")} | {"tokens": sample["tokens"][:, real]}
    (got,) = jax.jit(graph.apply)(graph.params, *sample.values())
    (expected,) = graph.reference(*(own[spec.name] for spec in graph.inputs))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_padding_matters_without_the_mask():
    graph = stage_graph(0)
    sample = graph.sample(np.random.default_rng(2))
    apply = jax.jit(graph.apply)
    (masked,), (open_,) = (
        apply(graph.params, *{**sample, "mask": mask}.values()) for mask in (sample["mask"], 0 * sample["mask"])
    )
    assert np.abs(masked - open_).max() > 1e-2 * np.abs(masked).max()


# --- weights ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from([2, 8, 24]), st.integers(0, 9))
def test_halves_turn_as_pairs_do(head_dim, seed):
    x = np.random.default_rng(seed).standard_normal((1, 3, 2, head_dim)).astype(np.float32)
    tables = [table[None] for table in rotary_table(np.array([0, 1, 5]), head_dim)]
    order = mmdit_device.halves_order(head_dim)
    np.testing.assert_allclose(
        mmdit_device.rotate_halves(x[..., order], *tables), rotate(x, *tables)[..., order], rtol=0, atol=1e-6
    )


def test_logits_stay_below_their_bound():
    """With equality for a head whose norms are one number each and whose query is its key."""
    scale = lambda value: {"scale": np.full(4, value, np.float32)}
    stream = {"query_norm": scale(3.0 * 4**-0.5), "key_norm": scale(-2.0)}
    bound = mmdit_device.logit_bound({"blocks": {"0": {"image": stream, "text": stream}}}, 4)
    head = np.ones(4)  # normalised
    assert bound == pytest.approx(abs(head * 3.0 @ (head * -2.0)) * 4**-0.5)


def test_blocks_chained_are_the_whole():
    whole, parts = stage_graph(1, layers=3), [stage_graph(1, (0, 1), layers=3), stage_graph(1, (1, 3), layers=3)]
    assert [graph.name for graph in parts] == ["mmdit_stage1_blocks0-1", "mmdit_stage1_blocks1-3"]
    sample = whole.sample(np.random.default_rng(3))
    image, text = parts[0].reference(*sample.values())
    between = {"image": image, "text": text} | {name: sample[name] for name in mmdit_graph.COMMON_INPUTS}
    assert list(between) == [spec.name for spec in parts[1].inputs]
    assert [(*x.shape,) for x in between.values()] == [spec.shape for spec in parts[1].inputs]
    (expected,) = whole.reference(*sample.values())
    (got,) = parts[1].reference(*between.values())
    assert snr_db(expected, got) > 120
    for graph, inputs in ((parts[0], sample), (parts[1], between)):
        for ours, theirs in zip(
            jax.jit(graph.apply)(graph.params, *inputs.values()), graph.reference(*inputs.values()), strict=True
        ):
            assert snr_db(theirs, ours) > 100
    # What a part is given by default are streams that the blocks before it leave behind.
    np.testing.assert_allclose(parts[1].sample(np.random.default_rng(3))["text"], text, rtol=0, atol=1e-5)
    assert set(parts[0].params["blocks"]) == {"0"} and set(parts[1].params["blocks"]) == {"1"}


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, report) of a transformer of the teacher's kind, by way of a model folder."""
    root = tmp_path_factory.mktemp("mmdit")
    teacher = transformer(embedder=True)
    save_component(root / "model" / TRANSFORMER, teacher.network, teacher.config, teacher.params)
    return root / "out", export_onnx.export_graph(root / "model", "mmdit_stage1", root / "out", OPTIONS)


def test_graph_is_what_the_device_wants(exported):
    folder, report = exported
    model = onnx.load(str(folder / "mmdit_stage1.onnx"))
    names = ["tokens", "positions", "context", "conditioning", "mask", "rotary_cos", "rotary_sin"]
    assert [value.name for value in model.graph.input] == names
    assert [value.name for value in model.graph.output] == ["velocity"]
    ops = report["ops"]
    assert {name: ops[name] for name in ("LayerNormalization", "RMSNormalization", "Softmax", "Gelu", "Clip")} == {
        "LayerNormalization": 8,
        "RMSNormalization": 7,
        "Softmax": 2,
        "Gelu": 3,
        "Clip": 3,
    }
    # q, k, v and the result of each attention.
    assert ops["Transpose"] == 8
    # Modulations, projections, MLPs and attention of the two blocks; modulations of the output; embeddings and output.
    assert ops["MatMul"] == (12 + 8 + 4 + 2) + (8 + 6 + 2 + 2) + 2 + 3
    assert not set(ops) & {"Max", "Sqrt", "Reciprocal", "Exp", "Where", "Shape", "Gather", "ReduceSum", "Split"}
    assert report["snr_db"]["velocity"] > 100
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    params = transformer(embedder=True).params
    shift = params["blocks"]["image"]["modulation"]["kernel"][0][:, :16]
    np.testing.assert_array_equal(arrays["blocks/0/image/modulation/attention_shift/kernel"], shift)
    np.testing.assert_array_equal(
        arrays["last_block/text/value/kernel"], params["last_block"]["text"]["value"]["kernel"]
    )
    np.testing.assert_array_equal(arrays["context_embedder/bias"], params["context_embedder"]["bias"])
    nodes = [node.name for node in model.graph.node]
    assert any("last_block/image/mlp_up/" in name for name in nodes)


def test_exported_graph_runs_a_unit(exported):
    """By the names of its inputs, without knowing how it was made."""
    folder, report = exported
    model, layout = transformer(embedder=True), stage_layouts(transformer(embedder=True).config, VIDEO, 1, TEXT)[2]
    rng, text_mask = np.random.default_rng(9), np.array([[1, 1, 0, 0]])
    clips = [rng.standard_normal((1, *shape, 2)).astype(np.float32) for shape in layout.clips]
    context, pooled = (rng.standard_normal((1, *shape)).astype(np.float32) for shape in ((TEXT, 12), (6,)))
    timestep = np.array([321.0], np.float32)
    inputs = {
        "tokens": np.asarray(layout.pack(clips)),
        "context": context,
        "conditioning": conditioning_input(model.config, model.params, timestep, pooled),
        **geometry_inputs(layout, text_mask),
    }
    (got,) = onnx_check.run_on_cpu(folder / "mmdit_stage1.onnx", [inputs])
    expected = jax.jit(PyramidMMDiT(model.config).apply, static_argnums=6)(
        {"params": model.params},
        layout.pack(clips),
        context,
        pooled,
        timestep,
        layout.geometry(text_mask),
        layout.output_tokens,
    )
    assert snr_db(expected.velocity, got["velocity"]) > 100
    assert report["notes"]["padding"][2] == layout.padding


def test_on_the_simulator(exported, tmp_path):
    report = compile_hexagon.compile_graph(exported[0] / "mmdit_stage1.onnx", tmp_path, "8-elite", runs=2)
    assert report["simulator"]["snr_db"]["velocity"] > 45
    assert report["simulator"]["outputs_differ"] == {"velocity": True}


# --- rewrites and lint ------------------------------------------------------------------------------------------------


def _onnx(text):
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> g {text}'))


@pytest.mark.parametrize(("other", "op"), [("float[1] z = {-6}", "Clip"), ("float[8] z = {0,1,2,3,4,5,6,7}", "Max")])
def test_a_maximum_with_one_number_is_a_clip(other, op):
    model = _onnx(f"(float[2, 8] x) => (float[2, 8] y) <{other}> {{ y = Max(z, x) }}")
    onnx_rewrite.restore_native(model)
    assert onnx_edit.op_counts(model) == {op: 1}


@pytest.mark.parametrize(("shape", "refused"), [("1, 16, 4", False), ("1, 8, 2, 4", True)])
def test_lint_refuses_rms_norms_of_rank_four(shape, refused):
    """The simulator has 0 to 10 dB for them from 8 rows on, and 68 dB for the same norm of rank 3."""
    norm = "y = RMSNormalization<axis = -1>(x, s)"
    model = _onnx(f"(float[{shape}] x, float[4] s) => (float[{shape}] y) {{ {norm} }}")
    assert [("rank 3" in problem.reason) for problem in onnx_lint.problems(model)] == [True] * refused


# --- options and errors -----------------------------------------------------------------------------------------------


def test_sizes_come_from_the_model_folder(tmp_path):
    toy = {"length": 28, "latent_height": 8, "latent_width": 8, "latent_frames": 3}
    assert graph_sizes.folder_sizes(TOY_TEACHER).items() >= toy.items()
    released = {"length": 128, "latent_height": 40, "latent_width": 64, "latent_frames": 7}
    assert graph_sizes.folder_sizes(tmp_path).items() >= released.items()
    assert all(getattr(GraphOptions(), name) == value for name, value in released.items())


def test_components_and_blocks_must_exist():
    wrong = dataclasses.replace(transformer(), network=dataclasses.replace(PYRAMID_MMDIT, name="unet"))
    with pytest.raises(UserError, match="holds a unet; this graph needs a video transformer"):
        mmdit_graph.mmdit_stage({TRANSFORMER: wrong}, OPTIONS, 0)
    for blocks in ((0, 0), (1, 3), (2, 1)):
        with pytest.raises(UserError, match=r"a transformer with 2: give A:B with 0 <= A < B <= 2"):
            stage_graph(0, blocks)
    with pytest.raises(UserError, match="needs 20 positions along an axis and the model's table has 16"):
        mmdit_graph.mmdit_stage({TRANSFORMER: transformer()}, GraphOptions(), 2)


def test_command_reports_bad_options(tmp_path, capsys):
    command = ["--model", str(tmp_path), "--graph", "mmdit_stage0", "--output", str(tmp_path / "out")]
    assert run_command(lambda: export_onnx.main([*command, "--latent-frames", "0"])) == 1
    assert "--latent-frames 0 is not positive" in capsys.readouterr().err
    assert run_command(lambda: export_onnx.main([*command, "--transformer", "other"])) == 1
    assert str(tmp_path / "other") in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export_onnx.parse([*command, "--blocks", "6"])
    assert "'6' is not a range of blocks such as 0:6" in capsys.readouterr().err
    assert export_onnx.parse([*command, "--blocks", "6:12"]).blocks == (6, 12)
    assert set(graphs.GRAPHS) >= {f"mmdit_stage{stage}" for stage in range(3)}
