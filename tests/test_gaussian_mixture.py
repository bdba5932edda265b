"""Gaussian mixtures on a pyramid: the exact velocity, the energy distance, and DMD towards a known distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import steps_closed_form, steps_toy
from nd_jax.distill.steps import StepsObjective
from nd_jax.errors import UserError
from nd_jax.evals.gaussian_mixture import (
    circle_mixture,
    energy_distance,
    exact_velocity,
    mixture_pyramid,
    sample_mixture,
)
from nd_jax.pyramid import paths
from nd_jax.pyramid.noise import halve, upsample
from nd_jax.pyramid.schedule import PyramidSchedule

SCHEDULE = PyramidSchedule()
WEIGHTS = (0.5, 0.3, 0.2)
MIXTURE = circle_mixture(4, components=3, radius=1.5, pattern=0.5, sigma=0.4, seed=1).replace(
    log_weights=jnp.log(jnp.array(WEIGHTS))
)
LEVELS = mixture_pyramid(MIXTURE, 3)


def test_every_stage_has_the_mixtures_moments_and_a_pattern_of_its_own():
    np.testing.assert_allclose(jnp.linalg.norm(LEVELS[0].means, axis=-1), 1.5, rtol=1e-5)
    for finer in LEVELS[1:]:
        detail = finer.means - upsample(halve(finer.means))
        np.testing.assert_allclose(jnp.abs(detail), 0.5, rtol=1e-5)
    latents = sample_mixture(MIXTURE, jax.random.key(0), 20_000)
    for level in reversed(LEVELS):
        means = np.asarray(level.means)
        mean = np.einsum("k,k...->...", WEIGHTS, means)
        spread = np.einsum("k,k...->...", WEIGHTS, np.square(means - mean)) + float(level.sigma) ** 2
        np.testing.assert_allclose(jnp.mean(latents, axis=0), mean, atol=0.05)
        np.testing.assert_allclose(jnp.var(latents, axis=0), spread, rtol=0.05)
        latents = halve(latents) if latents.shape[2] > 1 else latents


@pytest.mark.parametrize(("stage", "t"), [(0, 1.0), (0, 0.2), (1, 1.0), (1, 0.3), (2, 1.0), (2, 0.8)])
def test_exact_velocity_is_what_paths_through_a_point_have_on_average(stage, t):
    """Importance weighting: z of the data, each with the noise that leads its path through y."""
    mixture, count = LEVELS[stage], 50_000
    z = sample_mixture(mixture, jax.random.key(1), count)
    there = lambda noise, z: paths.renoised_path(SCHEDULE, stage, noise, z)
    point = lambda noise, z: paths.point(there(noise, z), jnp.full(len(z), t))
    states = point(jax.random.normal(jax.random.key(2), z[:3].shape), z[:3])

    @jax.jit
    def estimate(state):
        noise = (state[None] - point(jnp.zeros_like(z), z)) / paths.noise_share(SCHEDULE, stage, t)
        share = jax.nn.softmax(-0.5 * jnp.sum(jnp.square(noise), axis=(1, 2, 3, 4)))
        velocity = paths.velocity(there(noise, z))
        mean = jnp.einsum("n,n...->...", share, velocity)
        return mean, jnp.sqrt(jnp.einsum("n,n...->...", jnp.square(share), jnp.square(velocity - mean[None])))

    means, errors = (np.stack(x) for x in zip(*map(estimate, states), strict=True))
    got = exact_velocity(SCHEDULE, stage, mixture, states, jnp.full(3, t))
    assert errors.max() < 0.05
    np.testing.assert_array_less(np.abs(got - means), 5 * errors + 1e-4)


def test_exact_velocity_at_both_limits():
    one, zero = jnp.ones(5), jnp.zeros(5)
    noise = jax.random.normal(jax.random.key(0), (5, *LEVELS[0].means.shape[1:]))
    # Noise alone: all that one can say of z is its mean.
    mean, end = np.einsum("k,k...->...", WEIGHTS, LEVELS[0].means), SCHEDULE.flow_range(0)[1]
    np.testing.assert_allclose(
        exact_velocity(SCHEDULE, 0, LEVELS[0], noise, one), (1 - end) * (noise - mean[None]), atol=1e-5
    )
    # The clean frame itself: only the noise is unknown, its mean is 0.
    z, start = sample_mixture(MIXTURE, jax.random.key(1), 5), SCHEDULE.flow_range(2)[0]
    np.testing.assert_allclose(
        exact_velocity(SCHEDULE, 2, MIXTURE, z, zero), (1 - start) * upsample(halve(z)) - z, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [8, 64])
def test_energy_distance_is_its_sum_over_pairs(chunk):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((37, 2, 3)), 0.5 + 2 * rng.standard_normal((53, 2, 3))
    far = lambda a, b: [np.linalg.norm(p - q) for i, p in enumerate(a) for j, q in enumerate(b) if a is not b or i != j]
    expected = 2 * np.mean(far(x, y)) - np.mean(far(x, x)) - np.mean(far(y, y))
    assert expected > 0.3
    assert energy_distance(x, y, chunk) == pytest.approx(expected, rel=1e-4)


def test_one_step_by_dmd_comes_near_to_the_target():
    """The coarsest stage, where the teacher's one step is the mean of all components."""
    toy, objective = steps_toy.toy_pyramid(steps_toy.toy_data()), StepsObjective(cauchy_weight=0.0)
    key = jax.random.key(0)
    before = jax.jit(lambda key: steps_toy.fit(toy, 0, 200, key))(key)
    after, _ = jax.jit(lambda initial, key: steps_toy.distill(toy, 0, objective, 300, initial, key))(before, key)
    target = steps_toy.target_samples(toy, 0, jax.random.key(1)).clean

    @jax.jit
    def sample(params):
        network = steps_toy.learned(toy, 0, params)
        return steps_toy.one_step_samples(toy, 0, objective, network, jax.random.key(2)).clean

    distances = [energy_distance(sample(params), target) for params in (before, after)]
    assert distances[0] > 2.0
    assert distances[1] < 0.1 * distances[0]


def test_chain_with_fresh_noise_starts_every_stage_from_the_clean_frame():
    """Networks that say 0 make every frame's start its clean frame, and every value's variance is known."""
    toy = steps_toy.toy_pyramid(steps_toy.toy_data())
    networks = [lambda rows, units=units: jnp.zeros_like(steps_toy.frame(units, rows)) for units in toy.units]
    variance = 1.0
    for stage in (1, 2):
        start = toy.schedule.flow_range(stage)[0]
        variance = start**2 + (1 - start) ** 2 * variance
    frames = jax.jit(lambda key: steps_toy.chain_fresh(toy, networks, key))(jax.random.key(0))
    assert frames.shape == (steps_toy.SAMPLES, 1, steps_toy.SIZE, steps_toy.SIZE, steps_toy.CHANNELS)
    assert float(jnp.var(frames)) == pytest.approx(variance, rel=0.03)


def test_comparison_of_what_is_known():
    """Ends that have lost a tenth of their detail, and clean frames that depend on the noise."""
    key = jax.random.key(0)
    clean, noise = (jax.random.normal(k, (2, 500, 1, 2, 2, 2)) for k in jax.random.split(key))
    mean = jax.vmap(lambda x: upsample(halve(x)))(clean)
    target = steps_toy.Samples(clean, clean, noise)
    found = steps_closed_form.compare(steps_toy.Samples(noise, mean + 0.9 * (clean - mean), noise), target)
    truth = steps_closed_form.compare(target, target)
    assert found["end"]["mean"] > truth["end"]["mean"]
    ratio = found["detail_end_rms"]["mean"] / truth["detail_end_rms"]["mean"]
    assert ratio == pytest.approx(0.9, rel=1e-5)
    assert found["detail_noise_correlation"]["mean"] == pytest.approx(1, rel=1e-5)
    assert abs(truth["detail_noise_correlation"]["mean"]) < 0.1
    assert len(found["clean"]["values"]) == 2


def test_the_command_refuses_no_updates(tmp_path):
    with pytest.raises(UserError, match="--updates 0"):
        steps_closed_form.main(["--output", str(tmp_path), "--updates", "0"])
