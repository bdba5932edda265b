"""Rollouts beyond their golden cases: against a plain loop, over batches and devices, and how often they compile."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.generate import sampler
from nd_jax.generate.config import SamplerConfig, hybrid, monolithic
from nd_jax.generate.sampler import draw_noise, prompt_keys, rollout, rollout_stages, stage_program
from nd_jax.models.mmdit import LOGICAL_AXES, MMDiTConfig, PyramidMMDiT
from nd_jax.models.text_conditioning import Conditioning
from nd_jax.pyramid import noise
from nd_jax.pyramid.history import history_clips, history_plan
from nd_jax.pyramid.layout import VideoSize, token_layout
from nd_jax.train.sharding import make_mesh, param_shardings, place
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT
from nd_jax.weights.network import abstract_params

MMDIT = MMDiTConfig(
    sample_size=16,
    in_channels=3,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=6,
    pos_embed_max_size=16,
)
MODEL = PyramidMMDiT(MMDIT)
VIDEO = VideoSize(latent_frames=3, height=8, width=16)
GUIDED = SamplerConfig(VIDEO, "monolithic", (2, 1, 2), (1, 2, 1), 3.0, 2.0)
HYBRID = hybrid(VIDEO)


def random_params(network=PYRAMID_MMDIT, config=MMDIT):
    rng = np.random.default_rng(1)
    draw = lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, abstract_params(network, config))


def random_text(rows, seed=2, width=MMDIT.context_dim):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    mask = (np.arange(5)[None] < rng.integers(1, 6, (rows, 1))).astype(np.int32)
    return Conditioning(normal(rows, 5, width), mask, normal(rows, MMDIT.pooled_projection_dim))


def random_frame(rows):
    return np.random.default_rng(5).standard_normal((rows, 1, 8, 16, 3)).astype(np.float32)


def rows_of(tree, rows):
    return jax.tree.map(lambda x: x[rows], tree)


def assert_close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))


@pytest.fixture(scope="module")
def params():
    return random_params()


@functools.lru_cache
def guided_batch():
    """Inputs and latents of two prompts with guidance."""
    inputs = dict(text=random_text(2), noise=draw_noise(prompt_keys(0, np.arange(2)), GUIDED, 3))
    inputs["negative"] = random_text(1, seed=3)
    return inputs, np.asarray(rollout(MODEL, random_params(), GUIDED, **inputs))


@functools.lru_cache
def hybrid_batch():
    """Inputs and latents of four prompts behind given frames."""
    inputs = dict(text=random_text(4), noise=draw_noise(prompt_keys(0, np.arange(4)), HYBRID, 3))
    inputs["first_frame"] = random_frame(4)
    return inputs, np.asarray(rollout(MODEL, random_params(), HYBRID, **inputs))


# --- a plain loop -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def velocity(layout, params, clips, text, timestep):
    """One row of the transformer, its clips without any padding."""
    timestep = jnp.full((1,), timestep, jnp.float32)
    out = MODEL.apply(
        {"params": params},
        layout.pack(clips),
        text.context,
        text.pooled,
        timestep,
        layout.geometry(text.mask),
        layout.output_tokens,
    )
    return layout.unpack(out.velocity)


def plain_rollout(params, config, text, drawn, negative=None, first_frame=None):
    """Equations 1 to 6 for one prompt: a loop over units, stages, steps and branches, a layout of its own for each."""
    schedule, finished = config.schedule, [] if first_frame is None else [first_frame]
    for unit in range(len(finished), config.video.units):
        steps, guidance = config.unit_settings(unit == 0)
        x = noise.noise_pyramid(drawn.initial[:, unit : unit + 1], 3)[0]
        for stage in range(3):
            if stage:
                x = noise.stage_jump(x, drawn.jumps[stage - 1][:, unit : unit + 1], *schedule.renoise_weights(stage))
            history = []
            if finished:
                pyramid = noise.latent_pyramid(jnp.concatenate(finished, axis=1), 3)
                history = history_clips(pyramid, history_plan(unit, stage))
            layout = token_layout(MMDIT, [clip.shape[1:4] for clip in (*history, x)], 5)
            table = schedule.inference_steps(stage, steps[stage])
            for k, timestep in enumerate(table.timesteps):
                v = velocity(layout, params, (*history, x), text, timestep)
                if guidance is not None:
                    unguided = velocity(layout, params, (*history, x), negative, timestep)
                    v = unguided + guidance * (v - unguided)
                x = x + (table.sigmas[k + 1] - table.sigmas[k]) * v
        finished.append(x)
    return jnp.concatenate(finished, axis=1)


def test_guided_rollout_is_the_plain_loop(params):
    inputs, got = guided_batch()
    row = slice(1, 2)
    expected = plain_rollout(
        params, GUIDED, rows_of(inputs["text"], row), rows_of(inputs["noise"], row), inputs["negative"]
    )
    assert_close(got[row], expected, 1e-4)


def test_hybrid_rollout_is_the_plain_loop_and_keeps_the_given_frame(params):
    inputs, got = hybrid_batch()
    row = slice(2, 3)
    expected = plain_rollout(params, HYBRID, *(rows_of(inputs[k], row) for k in ("text", "noise")), None, got[row, :1])
    assert_close(got[row], expected)
    np.testing.assert_array_equal(got[:, :1], inputs["first_frame"])
    assert np.isfinite(got).all() and got.dtype == np.float32


# --- batches and devices ----------------------------------------------------------------------------------------------


def test_a_prompt_alone_is_the_prompt_in_a_batch(params):
    inputs, batch = guided_batch()
    row = slice(1, 2)
    alone = dict(text=rows_of(inputs["text"], row), negative=inputs["negative"])
    alone["noise"] = draw_noise(prompt_keys(0, np.array([1])), GUIDED, 3)
    assert_close(rollout(MODEL, params, GUIDED, **alone), batch[row])


def test_noise_of_a_prompt_depends_on_seed_and_id_alone():
    drawn = draw_noise(prompt_keys(0, np.array([7, 3])), GUIDED, 3)
    alone = draw_noise(prompt_keys(0, np.array([3])), GUIDED, 3)
    jax.tree.map(np.testing.assert_array_equal, rows_of(drawn, slice(1, 2)), alone)
    other = draw_noise(prompt_keys(1, np.array([3])), GUIDED, 3)
    assert [n.shape for n in drawn.jumps] == [(2, 3, 4, 8, 3), (2, 3, 8, 16, 3)]
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(other), strict=True):
        assert np.abs(a - b).max() > 0.1
    # At the default gamma every block of block noise sums to zero.
    assert float(jnp.abs(noise.halve(drawn.jumps[1])).max()) < 1e-6


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_sharded_rollouts_are_those_of_one_device(params, axes):
    mesh = make_mesh(axes, jax.devices()[: np.prod(list(axes.values()))])
    placed = place(params, param_shardings(abstract_params(PYRAMID_MMDIT, MMDIT), LOGICAL_AXES, mesh))
    inputs, expected = hybrid_batch()
    before = stage_program(mesh)._cache_size()
    got = rollout(MODEL, placed, HYBRID, **inputs, mesh=mesh)
    assert len(got.sharding.device_set) == mesh.size
    assert stage_program(mesh)._cache_size() - before == 3
    assert_close(np.asarray(got), expected)


def test_a_batch_that_does_not_divide_is_refused(params):
    inputs, _ = hybrid_batch()
    mesh = make_mesh({"data": 3}, jax.devices()[:3])
    with pytest.raises(UserError, match="a batch of 4 does not divide among 3 devices"):
        rollout(MODEL, params, HYBRID, **inputs, mesh=mesh)


# --- programs ---------------------------------------------------------------------------------------------------------


def test_units_share_one_program_per_stage(params, monkeypatch):
    traced = []
    original = sampler.stage_units
    monkeypatch.setattr(sampler, "stage_units", lambda *args: traced.append(args[1:3]) or original(*args))
    config = dataclasses.replace(GUIDED, guidance=2.5)  # Settings of its own, which no other test has compiled.
    inputs, _ = guided_batch()
    ends = list(rollout_stages(MODEL, params, config, **inputs))
    assert [(end.unit, end.stage) for end in ends] == [(unit, stage) for unit in range(3) for stage in range(3)]
    assert [end.steps for end in ends] == [2, 1, 2, *(1, 2, 1) * 2]
    assert len(traced) == 6 == len(set(traced))
    # Other parameters, prompts and noise: nothing is compiled again.
    before = stage_program()._cache_size()
    other = dict(inputs, noise=draw_noise(prompt_keys(9, np.arange(2)), config, 3))
    rollout(MODEL, jax.tree.map(lambda p: p * 0.5, params), config, **other)
    assert len(traced) == 6 and stage_program()._cache_size() == before


def test_function_evaluations_are_the_published_ones():
    video = VideoSize()
    assert monolithic(video).function_evaluations == 480
    assert monolithic(video, (4,) * 3, (4,) * 3, None, None).function_evaluations == 84
    assert monolithic(video, (1,) * 3, (1,) * 3, None, None).function_evaluations == 21
    assert hybrid(video).function_evaluations == 18


def test_a_teacher_embeds_the_context_itself(params):
    config = dataclasses.replace(MMDIT, context_embedder=True)
    teacher = random_params(PYRAMID_FLOW_MMDIT, config)
    kernel, bias = (teacher["context_embedder"][name] for name in ("kernel", "bias"))
    student = {name: tree for name, tree in teacher.items() if name != "context_embedder"}
    inputs, _ = hybrid_batch()
    tokens = random_text(4, width=12)
    embedded = tokens._replace(context=tokens.context @ kernel + bias)
    got = rollout(PyramidMMDiT(config), teacher, HYBRID, **dict(inputs, text=tokens))
    assert_close(got, np.asarray(rollout(MODEL, student, HYBRID, **dict(inputs, text=embedded))))


def test_latents_stay_float32_around_a_bfloat16_transformer(params):
    inputs, expected = hybrid_batch()
    half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    model = PyramidMMDiT(MMDIT, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    got = rollout(model, half, HYBRID, **inputs)
    assert got.dtype == jnp.float32
    assert 0 < float(np.abs(got - expected).max()) < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_frame": None}, "mode 'hybrid' needs a first_frame"),
        ({"first_frame": random_frame(1)}, r"first_frame is \[1, 1, 8, 16, 3\] and this rollout needs \[4, 1, 8"),
        ({"text": random_text(3)}, r"noise is \[4, .* and this rollout needs \[3, "),
        ({"text": random_text(4, width=15)}, r"text context is \[4, 5, 15\] and this rollout needs \[4, 5, 16\]"),
    ],
)
def test_arrays_that_do_not_fit_are_named(params, changes, message):
    inputs, _ = hybrid_batch()
    with pytest.raises(UserError, match=message):
        rollout(MODEL, params, HYBRID, **dict(inputs, **changes))


def test_guidance_without_a_negative_prompt_is_refused(params):
    inputs, _ = guided_batch()
    with pytest.raises(UserError, match="guidance needs the negative conditioning"):
        rollout(MODEL, params, GUIDED, text=inputs["text"], noise=inputs["noise"])
    with pytest.raises(UserError, match="makes its own first_frame"):
        rollout(MODEL, params, GUIDED, **inputs, first_frame=random_frame(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "both"}, "mode 'both' is not one of hybrid, monolithic"),
        ({"steps": (1, 1)}, r"steps is \[1, 1\]: give 3 positive numbers"),
        ({"first_steps": (1, 0, 1)}, r"first_steps is \[1, 0, 1\]"),
        ({"video": VideoSize(5, 8, 8, frames_per_unit=2)}, "frames_per_unit is 2"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(GUIDED, **changes)
