"""Few steps a stage: equations 1 to 10, where gradients flow, guidance, and rows that the student makes itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.distill import steps, steps_training
from nd_jax.distill.steps import StepsObjective
from nd_jax.distill.student_history import StudentHistory, student_rollout
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.pyramid import paths
from nd_jax.pyramid.layout import VideoSize
from nd_jax.pyramid.noise import halve, latent_pyramid, upsample
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.pyramid.units import stage_units

SCHEDULE = PyramidSchedule()
SIZES = MMDiTConfig(
    sample_size=32,
    num_layers=1,
    attention_head_dim=4,
    num_attention_heads=4,
    in_channels=2,
    joint_attention_dim=16,
    caption_projection_dim=16,
    pooled_projection_dim=16,
    pos_embed_max_size=16,
)
VIDEO = VideoSize(latent_frames=3, height=8, width=8)
UNITS = [stage_units(SIZES, VIDEO, stage, 4) for stage in range(3)]
TEXT_MASK = jnp.ones((4, 4), jnp.int32)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def rows_of(stage, objective=None, seed=0):
    objective = objective or StepsObjective()
    return steps.draw_student_rows(
        objective, SCHEDULE, UNITS[stage], normal(1, 4, 3, 8, 8, 2), TEXT_MASK, jax.random.key(seed)
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_student_rows_lie_on_the_path_at_the_steps_of_inference(stage):
    objective = StepsObjective(steps=(1, 4, 8), first_frame=False)
    rows = rows_of(stage, objective)
    table = SCHEDULE.inference_steps(stage, objective.steps[stage])
    np.testing.assert_allclose(rows.batch.state.sigma, table.sigmas[:-1][rows.step], rtol=1e-6)
    np.testing.assert_allclose(rows.batch.state.timestep, table.timesteps[rows.step], rtol=1e-6)
    assert int(rows.unit.min()) >= 1
    # The exact velocity leads from the state to the clean frame, by the noise that is in it.
    velocity = UNITS[stage].unpack(rows.batch.state.target)
    t = rows.batch.state.sigma
    exact = steps.clean_prediction(SCHEDULE, stage, "exact", rows.state, t, velocity, rows.noise)
    np.testing.assert_allclose(exact, rows.clean, atol=2e-5)
    paper = steps.clean_prediction(SCHEDULE, stage, "extrapolated", rows.state, t, velocity, rows.noise)
    if stage != 1:
        np.testing.assert_allclose(paper, rows.clean, atol=2e-5)
    else:  # `paths` (7): sharpened
        start, end = SCHEDULE.flow_range(1)
        sharp = (start * (1 - end) * rows.clean - end * (1 - start) * upsample(halve(rows.clean))) / (start - end)
        np.testing.assert_allclose(paper, sharp, atol=2e-5)
        assert float(jnp.abs(paper - rows.clean).max()) > 0.1


@pytest.mark.parametrize("stage", [0, 2])
def test_a_renoised_frame_is_on_a_path_of_its_own(stage):
    rows, objective = rows_of(stage), StepsObjective()
    clean = normal(3, *rows.clean.shape)
    fresh = steps.draw_renoised(objective, SCHEDULE, UNITS[stage], rows, clean, jax.random.key(4), on_grid=True)
    start, end = SCHEDULE.flow_range(stage)
    tau = fresh.batch.state.sigma
    assert set(np.round(np.asarray(tau), 6)) <= set(objective.tau_grid)
    index = np.round((1 - np.asarray(tau)) * 1000).astype(int)
    np.testing.assert_allclose(fresh.batch.state.timestep, SCHEDULE.timesteps[stage][index], rtol=1e-6)
    # z~_τ and v' give the two ends; the noise in both is the same.
    point = UNITS[stage].unpack(fresh.batch.state.tokens[:, -UNITS[stage].output_tokens :])
    tau = paths.per_sample(tau, point)
    y_end = point - tau * fresh.target
    y_start = y_end + fresh.target
    if stage == 0:
        np.testing.assert_allclose((y_end - (1 - end) * clean) / end, y_start, atol=1e-4)
    else:
        np.testing.assert_allclose(y_end, clean, atol=1e-5)
        noise = (y_start - (1 - start) * upsample(halve(clean))) / start
        assert 0.8 < float(jnp.std(noise)) < 1.2 and abs(float(jnp.mean(noise * clean))) < 0.1
    history = slice(0, -UNITS[stage].output_tokens)
    np.testing.assert_array_equal(fresh.batch.state.tokens[:, history], rows.batch.state.tokens[:, history])


def test_gradients_flow_where_the_paper_says():
    """By a hand-made network v = a + b y: dL/da and dL/db are w (D - D_φ) dz~/da and dz~/db; D and D_φ get none."""
    stage, objective = 1, StepsObjective(cauchy_weight=0.0)
    units, rows, key = UNITS[stage], rows_of(1), jax.random.key(7)
    frame = lambda batch: units.unpack(batch.state.tokens[:, -units.output_tokens :])
    network = lambda p: lambda batch: p["a"] + p["b"] * frame(batch)
    params = {
        name: {"a": jnp.float32(a), "b": jnp.float32(b)}
        for name, a, b in (("s", 0.3, 0.2), ("t", -0.4, 0.5), ("f", 0.1, 0.6))
    }

    def loss(params):
        networks = tuple(network(params[name]) for name in "stf")
        return jnp.sum(steps.student_terms(objective, SCHEDULE, units, networks, rows, key)["loss"])

    grads = jax.jit(jax.grad(loss))(params)
    assert not any(jax.tree.leaves(grads["t"])) and not any(jax.tree.leaves(grads["f"]))

    # The same by hand, in numpy.
    start, end = SCHEDULE.flow_range(stage)
    t = rows.batch.state.sigma
    factor = np.asarray((t * start + (1 - t) * end) / (start - end))[:, None, None, None, None]
    state = np.asarray(rows.state)
    clean = state - factor * (0.3 + 0.2 * state)
    fresh = steps.draw_renoised(objective, SCHEDULE, units, rows, jnp.asarray(clean), key, on_grid=True)
    point = np.asarray(frame(fresh.batch))
    teacher, fake = -0.4 + 0.5 * point, 0.1 + 0.6 * point
    weight = 1 / np.abs(teacher - np.asarray(fresh.target)).sum(axis=(1, 2, 3, 4), keepdims=True)
    direction = weight * (teacher - fake)
    np.testing.assert_allclose(grads["s"]["a"], np.sum(direction * -factor), rtol=1e-4)
    np.testing.assert_allclose(grads["s"]["b"], np.sum(direction * -factor * state), rtol=1e-4)


def test_a_fake_model_that_knows_the_teacher_leaves_the_student_alone():
    units, rows = UNITS[2], rows_of(2)
    same = lambda batch: 0.3 * units.unpack(batch.state.tokens[:, -units.output_tokens :])
    objective = StepsObjective(cauchy_weight=0.0)
    student = lambda a: lambda batch: a * same(batch)
    loss = lambda a: jnp.sum(
        steps.student_terms(objective, SCHEDULE, units, (student(a), same, same), rows, jax.random.key(0))["loss"]
    )
    assert float(jax.grad(loss)(1.5)) == 0.0


def test_a_step_against_the_direction_moves_samples_to_the_teachers():
    """One Gaussian each: a perfect teacher of mean 2 and a perfect fake model of mean 0 draw z~ upwards."""
    units, start = UNITS[2], SCHEDULE.flow_range(2)[0]

    def perfect(mean):
        """E[v | y] of a constant frame of unit variance around `mean`, with U(Down(z)) = z at a path's start."""

        def velocity(batch):
            y = units.unpack(batch.state.tokens[:, -units.output_tokens :])
            tau = paths.per_sample(batch.state.sigma, y)
            noise, signal = tau * start, 1 - tau * start
            residual = y - signal * mean
            scale = signal**2 + noise**2
            return start * (noise - signal) / scale * residual - start * mean

        return velocity

    rows = rows_of(2)
    clean = jnp.zeros_like(rows.clean)
    fresh = steps.draw_renoised(StepsObjective(), SCHEDULE, units, rows, clean, jax.random.key(1), on_grid=True)
    direction, _ = steps.matching_direction(perfect(2.0)(fresh.batch), perfect(0.0)(fresh.batch), fresh.target)
    assert float(direction.max()) < 0


def test_cauchy_and_the_shown_norm():
    clean, target = normal(0, 2, 1, 2, 2, 3), normal(1, 2, 1, 2, 2, 3)
    np.testing.assert_allclose(
        steps.cauchy(clean, target), np.log1p(np.square(np.asarray(clean - target)).sum(axis=(1, 2, 3, 4))), rtol=1e-6
    )
    direction = normal(2, *clean.shape)
    value, grad = jax.value_and_grad(lambda x: jnp.sum(steps.with_gradient(direction, x)))(clean)
    np.testing.assert_allclose(value, np.linalg.norm(np.asarray(direction).reshape(2, -1), axis=1).sum(), rtol=1e-6)
    np.testing.assert_array_equal(grad, direction)


@pytest.mark.parametrize("first_frame", [True, False])
def test_a_students_rollout_stands_on_its_own_frames(first_frame):
    """A network whose one step ends at 1 + 2 x (mean of its history), so that every frame is known."""
    objective, latents = StepsObjective(first_frame=first_frame), normal(5, 4, 3, 8, 8, 2)

    def student(units):
        def velocity(batch):
            tokens, last = batch.state.tokens, units.output_tokens
            history, noisy = tokens[:, :-last], tokens[:, -last:]
            assert noisy.shape == batch.state.target.shape
            return units.unpack(noisy - (1 + 2 * jnp.mean(history, axis=(1, 2), keepdims=True)))

        return velocity

    made = jax.jit(lambda x: student_rollout(objective, SCHEDULE, UNITS, student, x, TEXT_MASK, jax.random.key(0)))(
        latents
    )
    if not first_frame:
        np.testing.assert_array_equal(made[:, 0], latents[:, 0])
    expected = made
    for unit in range(0 if first_frame else 1, 3):
        history = UNITS[2].clean_history(latent_pyramid(expected, 3), jnp.full((4,), unit))
        frame = 1 + 2 * jnp.mean(history, axis=(1, 2))
        np.testing.assert_allclose(
            made[:, unit], jnp.broadcast_to(frame[:, None, None, None], made[:, 0].shape), rtol=1e-4
        )


def test_the_share_of_own_rows_rises():
    history = StudentHistory(probability=0.5, start=100, ramp=200)
    shares = [float(history.share(jnp.int32(step))) for step in (0, 100, 200, 300, 1000)]
    np.testing.assert_allclose(shares, [0, 0, 0.25, 0.5, 0.5])
    with pytest.raises(ValueError, match="is not a probability"):
        StudentHistory(probability=1.5)


def test_the_teachers_point_is_its_own_euler_steps():
    objective, stage = StepsObjective(steps=(2, 2, 2)), 1
    units, rows = UNITS[stage], rows_of(1, StepsObjective(steps=(2, 2, 2)), seed=3)
    seen = []

    def teacher(batch):
        seen.append((batch.state.sigma, batch.state.timestep))
        return 0.5 * units.unpack(batch.state.tokens[:, -units.output_tokens :])

    with jax.disable_jit():
        end, length = steps_training.teacher_point(objective, SCHEDULE, units, teacher, rows, 3)
    table = SCHEDULE.inference_steps(stage, 2)
    step = np.asarray(rows.step)
    assert set(step) == {0, 1}
    from_, to = table.sigmas[:-1][step], table.sigmas[1:][step]
    np.testing.assert_allclose(length, from_ - to, rtol=1e-5, atol=1e-7)
    y = np.asarray(rows.state)
    for k, (sigma, timestep) in enumerate(seen):
        np.testing.assert_allclose(sigma, from_ + (to - from_) * k / 3, rtol=1e-5, atol=1e-6)
        index = np.clip(np.round((1 - np.asarray(sigma)) * 1000), 0, 999).astype(int)
        np.testing.assert_allclose(timestep, SCHEDULE.timesteps[stage][index], atol=0.4)
        y = y + (((to - from_) / 3)[:, None, None, None, None]) * 0.5 * y
    np.testing.assert_allclose(end, y, rtol=1e-5, atol=1e-6)


def test_guidance_is_one_pass_over_both_branches():
    """g = 1 is the guided branch alone; g = 0 does not depend on the caption."""
    units, rows = UNITS[1], rows_of(1)
    seen = []

    def apply(batch, text):
        seen.append(batch.state.tokens.shape[0])
        return batch.state.tokens[:, -units.output_tokens :] * text.pooled[:, None, :1]

    text = steps_training.Conditioning(normal(0, 4, 4, 16), TEXT_MASK, normal(1, 4, 16))
    negative = steps_training.Conditioning(normal(2, 1, 4, 16), TEXT_MASK[:1], normal(3, 1, 16))
    run = lambda g: steps_training.guided_velocity(
        apply, units, rows.unit, rows.batch, text, negative, jnp.full((4,), g)
    )
    frame = rows.batch.state.tokens[:, -units.output_tokens :]
    np.testing.assert_allclose(run(1.0), frame * text.pooled[:, None, :1], rtol=1e-6)
    np.testing.assert_allclose(run(0.0), frame * negative.pooled[:, None, :1], rtol=1e-6)
    np.testing.assert_allclose(run(3.0), 3 * run(1.0) - 2 * run(0.0), rtol=1e-4, atol=1e-5)
    assert seen == [8] * len(seen)
