"""The video transformer beyond its golden cases: padding, masks, block stacks, pruning, the teacher's embedder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.models.mmdit import LOGICAL_AXES, MMDiTConfig, PyramidMMDiT, keep_blocks, stack_blocks, unstack_blocks
from nd_jax.pyramid.layout import VideoSize, stack_geometries, token_layout, video_layouts
from nd_jax.train.sharding import make_mesh, param_shardings
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT
from nd_jax.weights.network import abstract_params
from nd_jax.weights.table import flatten

CONFIG = MMDiTConfig(
    sample_size=16,
    in_channels=3,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=6,
    pos_embed_max_size=16,
)
VIDEO = VideoSize(latent_frames=4, height=16, width=16)
TEXT_MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
LAYOUTS = video_layouts(CONFIG, VIDEO, TEXT_MASK.shape[1])


def random_params(network, config):
    rng = np.random.default_rng(1)
    draw = lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, abstract_params(network, config))


def random_inputs(layout, config=CONFIG):
    """(clips, context, pooled, timestep) of a batch of two."""
    rng = np.random.default_rng(2)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    clips = [normal(2, *shape, config.in_channels) for shape in layout.clips]
    context = normal(2, TEXT_MASK.shape[1], config.context_dim)
    return clips, context, normal(2, config.pooled_projection_dim), np.array([386.0, 900.0], np.float32)


# One program per layout and model: the layouts are module constants, and compared by identity.
@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(model, layout, params, clips, context, pooled, timestep):
    tokens, geometry = layout.pack(clips), layout.geometry(TEXT_MASK)
    return model.apply({"params": params}, tokens, context, pooled, timestep, geometry, layout.output_tokens, True)


@pytest.fixture(scope="module")
def params():
    return random_params(PYRAMID_MMDIT, CONFIG)


def assert_close(got, expected, tolerance=2e-5):
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=0, atol=tolerance * float(jnp.abs(e).max())), got, expected
    )


@pytest.mark.parametrize(("unit", "stage"), [(1, 0), (1, 1), (2, 2)])
def test_padding_changes_no_real_token(params, unit, stage):
    padded = LAYOUTS[unit, stage]
    plain = token_layout(CONFIG, padded.clips, padded.text_length)
    assert padded.padding > 0 and padded.length == LAYOUTS[3, stage].length
    inputs = random_inputs(plain)
    one, other = (apply(PyramidMMDiT(CONFIG), layout, params, *inputs) for layout in (plain, padded))
    assert_close(other.velocity, one.velocity)
    assert_close(other.states.image[:, :, padded.padding :], one.states.image)
    assert_close(other.states.text, one.states.text)
    assert np.isfinite(other.states.image).all()


LAYOUT = LAYOUTS[3, 1]  # Needs no padding, so the token counts are those of the clips.


@pytest.fixture(scope="module")
def reference(params):
    """(inputs, output) of one call, with block states."""
    inputs = random_inputs(LAYOUT)
    return inputs, apply(PyramidMMDiT(CONFIG), LAYOUT, params, *inputs)


def test_samples_of_unlike_units_share_a_call(params, reference):
    """One program at the envelope's length serves a batch whose samples have unlike histories."""
    (_, context, pooled, timestep), output = reference
    short = LAYOUTS[1, 1]
    clips, *_ = random_inputs(short)
    alone = apply(PyramidMMDiT(CONFIG), short, params, clips, context, pooled, timestep)
    tokens = jnp.concatenate([short.pack(clips)[:1], LAYOUT.pack(reference[0][0])[1:]])
    geometry = stack_geometries([short.geometry(TEXT_MASK[:1]), LAYOUT.geometry(TEXT_MASK[1:])])
    mixed = jax.jit(PyramidMMDiT(CONFIG).apply, static_argnums=6)(
        {"params": params}, tokens, context, pooled, timestep, geometry, LAYOUT.output_tokens
    )
    assert_close(mixed.velocity, jnp.concatenate([alone.velocity[:1], output.velocity[1:]]))


def test_states_are_the_streams_around_every_block(params, reference):
    (clips, context, _, _), output = reference
    assert output.states.image.shape == (4, 2, LAYOUT.image_length, 16)
    assert output.states.text.shape == (3, 2, 5, 16)
    assert output.velocity.shape == (2, LAYOUT.output_tokens, CONFIG.token_dim)
    assert np.array_equal(output.states.text[0], context)
    first = PyramidMMDiT(CONFIG).apply(
        {"params": params}, LAYOUT.pack(clips), LAYOUT.positions[None], method="embed_tokens"
    )
    assert_close(output.states.image[0], first)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("wanted", [(1,), (0, 3), (1, 2), (3,)])
def test_some_states_are_those_of_all(params, reference, wanted, scan):
    (clips, *rest), output = reference
    given = params if scan else unstack_blocks(params)
    arguments = (LAYOUT.pack(clips), *rest, LAYOUT.geometry(TEXT_MASK), LAYOUT.output_tokens, wanted)
    some = jax.jit(PyramidMMDiT(CONFIG, scan=scan).apply, static_argnums=(6, 7))({"params": given}, *arguments)
    assert_close(some.states.image, output.states.image[np.array(wanted)])
    texts = output.states.text[np.array([k for k in wanted if k < 3], np.int32)]
    np.testing.assert_allclose(some.states.text, texts, rtol=1e-5, atol=1e-5)
    assert_close(some.velocity, output.velocity)


def test_states_that_there_are_not_are_refused(params, reference):
    (clips, *rest), _ = reference
    arguments = (LAYOUT.pack(clips), *rest, LAYOUT.geometry(TEXT_MASK), LAYOUT.output_tokens)
    for wanted in ((2, 1), (4,), (-1,)):
        with pytest.raises(ValueError, match=r"give rising numbers of 0\.\.3"):
            PyramidMMDiT(CONFIG).apply({"params": params}, *arguments, wanted)


def test_the_current_clip_and_padded_text_are_unseen_by_the_rest(params, reference):
    (clips, context, pooled, timestep), output = reference
    current = LAYOUT.output_tokens
    moved = apply(PyramidMMDiT(CONFIG), LAYOUT, params, [*clips[:-1], clips[-1] + 1], context, pooled, timestep)
    assert np.array_equal(moved.states.text, output.states.text)
    assert np.array_equal(moved.states.image[:, :, :-current], output.states.image[:, :, :-current])
    assert not np.allclose(moved.velocity, output.velocity, atol=1e-2)

    padded_text = np.where(TEXT_MASK[..., None] == 1, context, context + 1)
    moved = apply(PyramidMMDiT(CONFIG), LAYOUT, params, clips, padded_text, pooled, timestep)
    assert np.array_equal(moved.velocity, output.velocity)

    # The newest history frame is seen by the current clip and by itself only.
    moved = apply(PyramidMMDiT(CONFIG), LAYOUT, params, [clips[0], clips[1] + 1, clips[2]], context, pooled, timestep)
    assert np.array_equal(moved.states.text, output.states.text)
    assert not np.allclose(moved.velocity, output.velocity, atol=1e-2)


def test_scanned_equals_unrolled(params, reference):
    inputs, output = reference
    unstacked = unstack_blocks(params)
    assert set(unstacked) == {*params, "block_0", "block_1"} - {"blocks"}
    assert_close(apply(PyramidMMDiT(CONFIG, scan=False), LAYOUT, unstacked, *inputs), output)
    again = stack_blocks(unstacked)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(again))


def test_pruning_is_an_index(params, reference):
    """A block whose gates are zero passes both streams on, so taking it out changes nothing."""
    inputs, _ = reference
    closed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.where(np.arange(2).reshape(2, *[1] * (leaf.ndim - 1)) == 1, 0, leaf).astype(leaf.dtype)
            if "modulation" in jax.tree_util.keystr(path)
            else leaf
        ),
        params["blocks"],
    )
    whole = apply(PyramidMMDiT(CONFIG), LAYOUT, {**params, "blocks": closed}, *inputs)
    kept, config = keep_blocks(params, CONFIG, [0, 2])
    assert config == dataclasses.replace(CONFIG, num_layers=2)
    assert_close(apply(PyramidMMDiT(config), LAYOUT, kept, *inputs).velocity, whole.velocity)
    for bad in ([0, 1], [2, 0], [0, 0, 2], [], [-1, 2], [0, 3]):
        with pytest.raises(ValueError, match=r"give rising numbers of 0\.\.2, the last block 2 among them"):
            keep_blocks(params, CONFIG, bad)


def test_one_block_is_the_last(params):
    kept, config = keep_blocks(params, CONFIG, [2])
    assert "blocks" not in kept and unstack_blocks(kept) == kept and stack_blocks(kept) == kept
    layout = LAYOUTS[0, 0]
    output = apply(PyramidMMDiT(config), layout, kept, *random_inputs(layout))
    assert output.states.image.shape[0] == 2 and output.states.text.shape[0] == 1
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(PYRAMID_MMDIT, config)).items()}
    assert shapes == {path: leaf.shape for path, leaf in flatten(kept).items()}


def test_teacher_equals_student_behind_the_embedder(params, reference):
    (clips, _, pooled, timestep), _ = reference
    config = dataclasses.replace(CONFIG, context_embedder=True)
    embedder = random_params(PYRAMID_FLOW_MMDIT, config)["context_embedder"]
    teacher = {**params, "context_embedder": embedder}
    tokens = np.random.default_rng(3).standard_normal((2, 5, 12)).astype(np.float32)
    embedded = PyramidMMDiT(config).apply({"params": teacher}, tokens, method="embed_context")
    one = apply(PyramidMMDiT(config), LAYOUT, teacher, clips, tokens, pooled, timestep)
    other = apply(PyramidMMDiT(CONFIG), LAYOUT, params, clips, np.asarray(embedded), pooled, timestep)
    assert_close(one, other)


def test_bfloat16_is_near_and_gives_float32(params, reference):
    inputs, output = reference
    half = apply(PyramidMMDiT(CONFIG, dtype=jnp.bfloat16), LAYOUT, params, *inputs)
    assert half.velocity.dtype == jnp.float32 and half.states.image.dtype == jnp.bfloat16
    error = np.abs(half.velocity - output.velocity).max() / np.abs(output.velocity).max()
    assert 1e-5 < error < 0.05


def test_remat_changes_no_gradient(params):
    layout = LAYOUTS[0, 0]
    inputs = random_inputs(layout)

    def gradient(remat):
        model = PyramidMMDiT(CONFIG, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.square(apply(model, layout, p, *inputs).velocity).mean()))(params)

    plain = gradient("none")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))
    assert_close(gradient("dots"), plain, 1e-4)


def test_a_fresh_model_predicts_nothing():
    """AdaLN-zero: every block passes its input on, and the output layer is zero."""
    layout = LAYOUTS[0, 0]
    clips, context, pooled, timestep = random_inputs(layout)
    model = PyramidMMDiT(CONFIG)
    arguments = (layout.pack(clips), context, pooled, timestep, layout.geometry(TEXT_MASK))
    fresh = jax.jit(model.init)(jax.random.key(0), *arguments)["params"]
    output = apply(model, layout, fresh, clips, context, pooled, timestep)
    assert not output.velocity.any()
    assert_close(output.states.image, jnp.broadcast_to(output.states.image[0], output.states.image.shape))


def test_every_large_parameter_is_split():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    config = dataclasses.replace(CONFIG, context_embedder=True)
    flat = flatten(param_shardings(abstract_params(PYRAMID_FLOW_MMDIT, config), LOGICAL_AXES, mesh))
    whole = {path for path, sharding in flat.items() if path.endswith("/kernel") and sharding.is_fully_replicated}
    assert whole == {"patch_embed/kernel"}
    assert flat["blocks/image/mlp_up/kernel"].spec == jax.P(None, ("fsdp",), ("tensor",))
    assert flat["last_block/text/query/kernel"].spec == jax.P(("fsdp",), ("tensor",))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PyramidMMDiT(CONFIG, remat="some"), "remat 'some' is not one of none, full, dots"),
        (lambda: PyramidMMDiT(CONFIG, attention="fast"), "attention 'fast' is not one of xla"),
        (lambda: dataclasses.replace(CONFIG, num_layers=0), "at least 1 block"),
        (lambda: dataclasses.replace(CONFIG, attention_head_dim=3), "even head"),
        (lambda: dataclasses.replace(CONFIG, caption_projection_dim=9, context_embedder=True), "must be the model wid"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
