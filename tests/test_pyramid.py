"""The pyramid's mathematics: schedule, noise covariance, stage jump, history, paths, training states."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.errors import UserError
from nd_jax.pyramid import history, noise, paths, training
from nd_jax.pyramid.schedule import PyramidSchedule, euler_step

SCHEDULE = PyramidSchedule()
STAGES = range(SCHEDULE.stages)
SHAPE = (2, 3, 8, 4, 2)

gammas = st.floats(0.01, 1 / 3)
schedules = st.builds(
    PyramidSchedule,
    stages=st.integers(1, 4),
    gamma=gammas,
    num_train_timesteps=st.sampled_from((50, 200)),
    shift=st.floats(0.5, 3.0),
)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def levels(seed: int, stage: int):
    """Noise, clean and coarser latents of one stage of a random video."""
    eps = noise.noise_pyramid(normal(seed), 3)
    clean = noise.latent_pyramid(normal(seed + 1), 3)
    return eps[stage], clean[stage], clean[stage - 1] if stage else None


def unit_images(height: int, width: int) -> jax.Array:
    """Every pixel alone, as a batch: a linear function of them has its matrix as output."""
    return jnp.eye(height * width).reshape(-1, 1, height, width, 1)


def covariance(first: jax.Array, second: jax.Array) -> np.ndarray:
    """Covariance of linear functions of white noise, from their outputs on `unit_images`."""
    first, second = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (first, second))
    return first.T @ second


@given(schedules)
def test_schedule_goes_down(schedule):
    start, end = np.array(schedule.start_sigmas), np.array(schedule.end_sigmas)
    assert np.all(start > end) and end[-1] == 0
    # A shifted grid is rounded to float32, so it may start just below 1.
    np.testing.assert_allclose([start[0], schedule.timesteps[0, 0] / schedule.num_train_timesteps], 1, rtol=2e-7)
    assert np.all(start[1:] > end[:-1]), "a jump adds noise"
    bounds = np.array(schedule.timestep_ratios)
    np.testing.assert_array_equal(bounds[1:, 0], bounds[:-1, 1])
    np.testing.assert_allclose(np.diff(bounds, axis=1)[:, 0], (start - end) / (start - end).sum(), rtol=1e-12)
    tables = schedule.timesteps
    assert np.all(np.diff(tables.ravel()) < 0)
    # Every table ends one entry short of where the next one starts.
    np.testing.assert_allclose(2 * tables[:-1, -1] - tables[:-1, -2], tables[1:, 0], atol=1e-4)
    assert tables.dtype == np.float32 and tables[-1, -1] > 0


@given(schedules, st.integers(1, 30), st.data())
def test_inference_steps_end_at_zero(schedule, count, data):
    stage = data.draw(st.integers(0, schedule.stages - 1))
    timesteps, sigmas = schedule.inference_steps(stage, count)
    assert timesteps.shape == (count,) and sigmas.shape == (count + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and np.all(np.diff(sigmas) < 0) and np.all(np.diff(timesteps) < 0)
    assert timesteps[0] == schedule.timesteps[stage, 0]
    if count > 1:
        assert timesteps[-1] == schedule.timesteps[stage, -1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stages": 0}, "stages is 0"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"stage_range": (0, 0.5, 1)}, "stage_range"),
        ({"stage_range": (0, 0.7, 0.3, 1)}, "stage_range"),
        ({"num_train_timesteps": 2}, "num_train_timesteps"),
    ],
)
def test_wrong_settings_are_refused(settings, named):
    with pytest.raises(UserError, match=named):
        PyramidSchedule(**settings)


def test_stages_that_do_not_exist_are_refused():
    for call in (SCHEDULE.flow_range, SCHEDULE.renoise_weights, lambda stage: SCHEDULE.inference_steps(stage, 1)):
        for stage in (-1, 3):
            with pytest.raises(UserError, match=f"stage {stage}"):
                call(stage)
    with pytest.raises(UserError, match="no jump"):
        SCHEDULE.renoise_weights(0)
    with pytest.raises(UserError, match="0 steps"):
        SCHEDULE.inference_steps(0, 0)


@given(gammas)
def test_block_noise_has_the_covariance_of_equation_4(gamma):
    got = noise.block_noise(unit_images(2, 4), gamma)
    pixels = np.arange(8).reshape(2, 4)
    same_block = (pixels % 4 // 2).ravel()
    expected = np.where(same_block[:, None] == same_block[None, :], -gamma, 0.0) + (1 + gamma) * np.eye(8)
    np.testing.assert_allclose(covariance(got, got), expected, atol=2e-6)


def test_block_noise_at_one_third_has_the_short_form():
    w = normal(0)
    got = noise.draw_block_noise(jax.random.key(1), SHAPE, 1 / 3)
    assert float(jnp.abs(noise.halve(got)).max()) < 1e-6, "every block sums to zero"
    np.testing.assert_allclose(
        noise.block_noise(w, 1 / 3), np.sqrt(4 / 3) * (w - noise.upsample(noise.halve(w))), atol=1e-6
    )


@given(schedules)
def test_the_jump_makes_white_noise_of_the_start_sigma(schedule):
    """In closed form: the jump's noise as a linear function of one coarse and four fine white numbers."""
    for stage in range(1, schedule.stages):
        alpha, beta = schedule.renoise_weights(stage)
        left = schedule.end_sigmas[stage - 1]
        coarse = jnp.asarray([left, 0, 0, 0, 0], jnp.float32).reshape(5, 1, 1, 1, 1)
        white = jnp.concatenate([jnp.zeros((1, 1, 2, 2, 1)), unit_images(2, 2)])
        got = noise.stage_jump(coarse, noise.block_noise(white, schedule.gamma), alpha, beta)
        np.testing.assert_allclose(covariance(got, got), schedule.start_sigmas[stage] ** 2 * np.eye(4), atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_jump_keeps_the_signal_of_the_path(stage):
    _, clean, coarser = levels(3, stage)
    before = paths.path_end(SCHEDULE, stage - 1, jnp.zeros_like(coarser), coarser)
    got = noise.stage_jump(before, jnp.zeros_like(clean), *SCHEDULE.renoise_weights(stage))
    np.testing.assert_allclose(got, paths.path_start(SCHEDULE, stage, jnp.zeros_like(clean), coarser), atol=1e-6)


def test_noise_is_white_at_every_stage_and_correlated_across():
    pyramid = noise.noise_pyramid(unit_images(8, 4), 3)
    for level in pyramid:
        np.testing.assert_allclose(covariance(level, level), np.eye(level[0].size), atol=1e-6)
    for coarse, fine in itertools.pairwise(pyramid):
        below = noise.upsample(unit_images(*coarse.shape[2:4])).reshape(coarse[0].size, -1)
        np.testing.assert_allclose(covariance(coarse, fine), below / 2, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (3, 2), (6, 9)])
def test_halving_is_bilinear_without_antialiasing(size):
    x = normal(4, (1, 2, *size, 3))
    got = noise.halve(x)
    assert got.shape == (1, 2, size[0] // 2, size[1] // 2, 3)
    np.testing.assert_allclose(got, jax.image.resize(x, got.shape, "linear", antialias=False), atol=1e-6)
    if size == (4, 6):
        np.testing.assert_allclose(got, np.asarray(x).reshape(1, 2, 2, 2, 3, 2, 3).mean((3, 5)), atol=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="1 x 4 cannot be halved"):
        noise.halve(jnp.zeros((1, 1, 1, 4, 1)))
    with pytest.raises(UserError, match="even sides"):
        noise.block_noise(jnp.zeros((1, 1, 3, 4, 1)), 0.2)
    with pytest.raises(UserError, match=r"gamma is 0\.5"):
        noise.block_noise(jnp.zeros((1, 1, 2, 2, 1)), 0.5)
    with pytest.raises(UserError, match="multiples of 4"):
        latents = jnp.zeros((1, 1, 6, 4, 1))
        task = training.full_sequence_task(1, 1)
        drawn = training.Randomness(noise=latents, u=jnp.zeros(1), corruption=jnp.zeros(1))
        training.training_state(SCHEDULE, task, latents, drawn)


@given(st.integers(0, 20), st.integers(0, 4), st.integers(1, 3))
def test_history_covers_the_past_once_from_coarse_to_fine(past, stage, per_unit):
    plan = history.history_plan(past, stage, per_unit)
    assert [frame for clip in plan for frame in range(clip.start, clip.stop)] == list(range(past))
    newest_first = plan[::-1]
    for behind, clip in enumerate(newest_first):
        assert clip.stage == max(stage - behind, 0)
        if clip.stage > 0 or behind == 0:
            assert clip.stop == past - behind * per_unit and clip.stop - clip.start <= per_unit
    assert len(plan) <= max(stage, 1) + 1


@given(st.integers(1, 9), st.integers(1, 4))
def test_units_tile_the_video(units, per_unit):
    spans = [history.unit_frames(unit, per_unit) for unit in range(units)]
    assert [frame for span in spans for frame in range(*span)] == list(range(1 + (units - 1) * per_unit))
    assert training.most_units(spans[-1][1], per_unit) == units


def test_history_that_is_not_there_is_refused():
    pyramid = noise.latent_pyramid(normal(0), 2)
    for plan in (history.history_plan(4, 1), history.history_plan(3, 2)):
        with pytest.raises(UserError, match="2 stages and 3 frames"):
            history.history_clips(pyramid, plan)
    for call in (lambda: history.history_plan(-1, 0), lambda: history.unit_frames(0, 0)):
        with pytest.raises(UserError):
            call()


@given(st.sampled_from(STAGES), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_the_path_is_straight(stage, t, t_next, seed):
    path = paths.stage_path(SCHEDULE, stage, *levels(seed, stage))
    batch = lambda value: jnp.full(SHAPE[0], value, jnp.float32)
    at = functools.partial(paths.point, path)
    np.testing.assert_array_equal(at(batch(1.0)), path.start)
    np.testing.assert_array_equal(at(batch(0.0)), path.end)
    stepped = euler_step(at(batch(t)), paths.velocity(path), t, t_next)
    np.testing.assert_allclose(stepped, at(batch(t_next)), atol=3e-6)


def test_end_points_are_equations_1_and_2():
    for stage in STAGES:
        eps, clean, coarser = levels(5, stage)
        path = paths.stage_path(SCHEDULE, stage, eps, clean, coarser)
        s, e = SCHEDULE.start_sigmas[stage], SCHEDULE.end_sigmas[stage]
        repeated = 0 if coarser is None else np.repeat(np.repeat(coarser, 2, 2), 2, 3)
        np.testing.assert_allclose(path.start, s * eps + (1 - s) * repeated, atol=1e-6)
        np.testing.assert_allclose(path.end, e * eps + (1 - e) * clean, atol=1e-6)
    np.testing.assert_array_equal(path.end, clean)


@pytest.mark.parametrize("stage", STAGES)
def test_both_clean_predictions(stage):
    eps, clean, coarser = levels(6, stage)
    path = paths.stage_path(SCHEDULE, stage, eps, clean, coarser)
    t = jnp.asarray([0.25, 1.0])
    state, velocity = paths.point(path, t), paths.velocity(path)
    exact = paths.exact_clean(SCHEDULE, stage, state, t, velocity, eps)
    np.testing.assert_allclose(exact, clean, atol=1e-5)
    got = paths.extrapolated_clean(SCHEDULE, stage, state, t, velocity)
    s, e = SCHEDULE.flow_range(stage)
    upsampled = jnp.zeros_like(clean) if coarser is None else noise.upsample(coarser)
    np.testing.assert_allclose(got, (s * (1 - e) * clean - e * (1 - s) * upsampled) / (s - e), atol=1e-5)  # (7)
    differs = float(jnp.abs(got - clean).max()) > 0.05
    assert differs == (stage == 1), "only the middle stage sharpens"


@pytest.mark.parametrize("stage", STAGES)
def test_renoising_the_clean_latents_is_their_own_path(stage):
    eps, clean, coarser = levels(7, stage)
    expected = paths.stage_path(SCHEDULE, stage, eps, clean, coarser)
    jax.tree.map(np.testing.assert_array_equal, paths.renoised_path(SCHEDULE, stage, eps, clean), expected)


def test_coarser_latents_belong_to_the_later_stages():
    eps, clean, coarser = levels(8, 1)
    for stage, given_coarser in ((0, coarser), (1, None)):
        with pytest.raises(UserError, match=f"stage {stage}"):
            paths.stage_path(SCHEDULE, stage, eps, clean, given_coarser)


jitted_state = jax.jit(training.training_state, static_argnums=(0, 1))


def recorded(task: training.Task, shape: tuple[int, ...], u: list[float], corruption: list[float]):
    """Given randomness: random numbers from numpy, in the shapes that the key gives."""
    shapes = jax.eval_shape(lambda key: training.draw_randomness(key, task, shape, 3), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    drawn = jax.tree.unflatten(tree, [normal(seed, spec.shape) for seed, spec in enumerate(leaves)])
    return drawn.replace(u=jnp.asarray(u, jnp.float32), corruption=jnp.asarray(corruption, jnp.float32))


@pytest.mark.parametrize(("stage", "unit", "per_unit"), [(0, 0, 1), (0, 3, 2), (1, 2, 2), (2, 3, 3)])
def test_autoregressive_states(stage, unit, per_unit):
    task = training.autoregressive_task(stage, unit, per_unit)
    latents = normal(9, (2, task.stop + 1, 8, 4, 2))
    drawn = recorded(task, latents.shape, [0.0, np.nextafter(np.float32(1), np.float32(0))], [0.2, 0.9])
    state = jitted_state(SCHEDULE, task, latents, drawn, 1 / 3)
    size = (8 >> (2 - stage), 4 >> (2 - stage))
    frames = 1 if unit == 0 else per_unit
    assert state.noisy.shape == state.target.shape == (2, frames, *size, 2)
    assert sum(clip.shape[1] for clip in state.history) == task.start
    np.testing.assert_allclose(state.sigma, [1, 0.001], rtol=1e-6)
    np.testing.assert_array_equal(state.timestep, SCHEDULE.timesteps[stage][[0, -1]])
    eps = noise.noise_pyramid(drawn.noise, 3)[stage]
    clean = noise.latent_pyramid(latents, 3)[stage][:, task.start : task.stop]
    got = paths.exact_clean(SCHEDULE, stage, state.noisy, state.sigma, state.target, eps)
    np.testing.assert_allclose(got, clean, atol=2e-5)
    # The frames after the unit have no say.
    blind = jitted_state(SCHEDULE, task, latents.at[:, task.stop :].set(1e6), drawn, 1 / 3)
    jax.tree.map(np.testing.assert_array_equal, blind, state)


def test_corruption_mixes_in_each_samples_share():
    task = training.autoregressive_task(2, 3)
    latents = normal(10, (2, 4, 8, 4, 2))
    drawn = recorded(task, latents.shape, [0.1, 0.7], [0.0, 0.6])
    state = jitted_state(SCHEDULE, task, latents, drawn, 0.5)
    clean = history.history_clips(noise.latent_pyramid(latents, 3), task.history)
    assert len(clean) == 3
    for got, clip, eta in zip(state.history, clean, drawn.history, strict=True):
        np.testing.assert_allclose(got[0], clip[0], atol=1e-6)
        np.testing.assert_allclose(got[1], 0.3 * eta[1] + 0.7 * clip[1], atol=1e-6)


def test_full_sequence_is_the_first_unit_for_an_image():
    for stage in STAGES:
        assert training.full_sequence_task(stage, 1) == training.autoregressive_task(stage, 0)
    with pytest.raises(UserError, match="needs 5 latent frames and there are 3"):
        drawn = training.Randomness(noise=normal(1), u=jnp.zeros(2), corruption=jnp.zeros(2))
        training.training_state(SCHEDULE, training.full_sequence_task(0, 5), normal(0), drawn)


def test_randomness_follows_the_key_and_its_parts_are_independent():
    # A single stage: noise and history have one shape, so a key that is used twice would show.
    task = training.autoregressive_task(0, 2)
    draw = lambda seed: training.draw_randomness(jax.random.key(seed), task, (64, 3, 2, 2, 1), 1)
    one, again, other = draw(1), draw(1), draw(2)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not any(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))
    assert not np.array_equal(one.u, one.corruption)
    assert all(0 <= float(x.min()) and float(x.max()) < 1 for x in (one.u, one.corruption))
    assert len(one.history) == 2
    flat = [np.ravel(x) for x in (one.noise, *one.history)]
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 0.3


def test_columns_interleave_as_the_text_rows():
    assert training.columns_to_stage((1, 2, 1)) == (0, 1, 1, 2)
    rows = jnp.arange(6.0)
    columns = [rows[k::3] for k in range(3)]
    np.testing.assert_array_equal(training.interleave(columns), rows)
    for ratios in ((), (0, 0), (1, -1)):
        with pytest.raises(UserError, match="sample_ratios"):
            training.columns_to_stage(ratios)


@given(st.integers(1, 9), st.data())
def test_a_group_of_workers_covers_every_length(longest, data):
    group = data.draw(st.sampled_from([g for g in range(1, longest + 1) if longest % g == 0]))
    start, available = data.draw(st.integers(0, 50)), data.draw(st.integers(1, longest))
    calls = [(n, q) for n in range(start, start + longest // group) for q in range(group)]
    units = [training.units_per_stage(n, 3, longest, longest, group, q) for n, q in calls]
    assert sorted(finest for _, _, finest in units) == list(range(1, longest + 1))
    assert all(low == mid == 1 + longest - finest for low, mid, finest in units)
    capped = [training.units_per_stage(n, 3, longest, available, group, q) for n, q in calls]
    assert capped == [tuple(min(count, available) for count in row) for row in units]


def test_a_group_larger_than_the_video_is_refused():
    with pytest.raises(UserError, match="sync_group is 8"):
        training.units_per_stage(0, 3, 7, 7, sync_group=8)


def test_the_dtype_of_the_latents_is_kept():
    latents = normal(11).astype(jnp.bfloat16)
    t = jnp.asarray([0.5, 0.25], jnp.bfloat16)
    path = paths.renoised_path(SCHEDULE, 1, latents, latents)
    state = paths.point(path, t)
    results = [
        *noise.latent_pyramid(latents, 3),
        *noise.noise_pyramid(latents, 3),
        noise.halve(latents[:, :, :5, :3]),
        noise.stage_jump(latents, noise.block_noise(noise.upsample(latents), 0.2), *SCHEDULE.renoise_weights(1)),
        euler_step(latents, latents, 1.0, 0.0),
        paths.extrapolated_clean(SCHEDULE, 1, state, t, paths.velocity(path)),
        paths.exact_clean(SCHEDULE, 1, state, t, paths.velocity(path), latents),
    ]
    assert {x.dtype for x in results} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(Exception, match="promotion"):
        paths.point(path, t.astype(jnp.float32))
