"""A toy pyramid of points in the plane, with students that learn by pyramidal DMD from an exact teacher.

One latent frame of 1 x 1, 2 x 2 and 4 x 4 latent pixels, each a point in the plane; the data is a Gaussian mixture, the
teacher its exact velocity (`nd_jax.evals.gaussian_mixture`). At every stage student and fake model are small networks,
fitted to the teacher and then trained by the functions of `nd_jax.distill.steps`, behind coarser frames of the data.

Students are sampled stage by stage, or one after another in two ways that differ in how a stage starts:

    jump    x_i = α_i U(x_{i-1}) + β_i n,          x_{i-1} where the step of stage i - 1 ended      (inference)     (1)
    fresh   x_i = s_i ε + (1 - s_i) U(z~_{i-1}),   from the clean frame, ε new                      (no jump)       (2)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from nd_jax.distill import steps
from nd_jax.distill.steps import StepsObjective, Velocity
from nd_jax.distill.student_history import student_rollout
from nd_jax.distill.teacher import FlowObjective, StageBatch, draw_stage_batch, stage_batch
from nd_jax.evals.gaussian_mixture import (
    GaussianMixture,
    circle_mixture,
    exact_velocity,
    mixture_pyramid,
    sample_mixture,
)
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.pyramid import paths
from nd_jax.pyramid.layout import VideoSize, patchify
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.pyramid.training import table_entries
from nd_jax.pyramid.units import StageUnits, UnitState, stage_units

STAGES, SIZE, CHANNELS = 3, 4, 2
SAMPLES = 2048  # of every comparison
BATCH, RATE = 256, 2e-3
FAKE_UPDATES = 2  # for each of the student
# Tables of tokens need the sizes of a transformer; none of its widths matter here.
SIZES = MMDiTConfig(patch_size=1, in_channels=CHANNELS, num_layers=1, attention_head_dim=4, num_attention_heads=1)
TEXT = 1

Params = Any


class Toy(NamedTuple):
    """The pyramid and its data; static.

    Attributes:
      schedule, units: of the stages.
      mixtures: of the stages, coarsest first.
    """

    schedule: PyramidSchedule
    units: tuple[StageUnits, ...]
    mixtures: tuple[GaussianMixture, ...]


def toy_pyramid(mixture: GaussianMixture) -> Toy:
    """The pyramid of one latent frame of `SIZE` x `SIZE`."""
    video = VideoSize(latent_frames=1, height=SIZE, width=SIZE, stages=STAGES)
    units = tuple(stage_units(SIZES, video, stage, TEXT) for stage in range(STAGES))
    return Toy(PyramidSchedule(stages=STAGES), units, mixture_pyramid(mixture, STAGES))


def toy_data() -> GaussianMixture:
    """The finest stage's mixture. What a stage may see of z_i is blurred by e / (1 - e), 2 at the coarsest: it is wide
    enough for its components to be told apart."""
    return circle_mixture(SIZE, components=5, radius=6.0, pattern=2.0, sigma=2.0)


class PointNetwork(nn.Module):
    """A velocity from all values of a frame at once: (y [B, 1, h, w, C], t [B]) -> [B, 1, h, w, C].

    The time modulates every layer, as in the transformers, and a linear path: most of (5) of the mixture is one.
    """

    width: int = 64
    layers: int = 3

    @nn.compact
    def __call__(self, state: jax.Array, t: jax.Array) -> jax.Array:
        y = x = state.reshape(len(state), -1)
        times = jnp.stack([t, *(wave(np.pi * k * t) for k in (1, 2) for wave in (jnp.cos, jnp.sin))], axis=1)
        times = nn.silu(nn.Dense(self.width)(nn.silu(nn.Dense(self.width)(times))))
        size = y.shape[1]
        linear = nn.Dense(size)(nn.Dense(size)(y) * nn.Dense(size)(times))
        for _ in range(self.layers):
            shift, scale = jnp.split(nn.Dense(2 * self.width)(times), 2, axis=1)
            x = nn.silu(nn.Dense(self.width)(x) * (1 + scale) + shift)
        return (linear + nn.Dense(size)(x)).reshape(state.shape)


def exact(toy: Toy, stage: int) -> Velocity:
    """The teacher."""
    mixture = toy.mixtures[stage]
    return lambda rows: exact_velocity(toy.schedule, stage, mixture, frame(toy.units[stage], rows), rows.state.sigma)


def learned(toy: Toy, stage: int, params: Params) -> Velocity:
    """Student or fake model."""
    return lambda rows: PointNetwork().apply({"params": params}, frame(toy.units[stage], rows), rows.state.sigma)


def frame(units: StageUnits, rows: StageBatch) -> jax.Array:
    """y of rows, [B, 1, h, w, C]."""
    return units.unpack(rows.state.tokens[:, -units.output_tokens :])


# --- training ---------------------------------------------------------------------------------------------------------


def fit(toy: Toy, stage: int, updates: int, key: jax.Array) -> Params:
    """A network that says what the teacher says: parameters, from random ones."""
    units, teacher = toy.units[stage], exact(toy, stage)
    init_key, key = jax.random.split(key)
    shape = toy.mixtures[stage].means[:1].shape
    params = PointNetwork().init(init_key, jnp.zeros(shape), jnp.zeros(1))["params"]
    adam = optax.adam(optax.cosine_decay_schedule(RATE, updates))

    def loss(params: Params, key: jax.Array) -> jax.Array:
        latents, text_mask, key = _data(toy, key)
        rows = draw_stage_batch(FlowObjective(), toy.schedule, units, latents, text_mask, key)
        return jnp.mean(jnp.square(learned(toy, stage, params)(rows) - teacher(rows)))

    def update(state: tuple[Params, Any], key: jax.Array) -> tuple[tuple[Params, Any], None]:
        return _descend(adam, jax.grad(loss)(state[0], key), state), None

    (params, _), _ = jax.lax.scan(update, (params, adam.init(params)), jax.random.split(key, updates))
    return params


def distill(
    toy: Toy, stage: int, objective: StepsObjective, updates: int, initial: Params, key: jax.Array
) -> tuple[Params, Params]:
    """Student and fake model, both from `initial`, after `updates` of the student."""
    shared = (objective, toy.schedule, toy.units[stage])
    network, teacher = lambda params: learned(toy, stage, params), exact(toy, stage)
    adam = optax.adam(optax.cosine_decay_schedule(RATE, updates))
    adam_fake = optax.adam(optax.cosine_decay_schedule(RATE, FAKE_UPDATES * updates))

    def draw(key: jax.Array) -> tuple[steps.StudentRows, jax.Array]:
        latents, text_mask, key = _data(toy, key)
        rows_key, key = jax.random.split(key)
        return steps.draw_student_rows(*shared, latents, text_mask, rows_key), key

    def fake_loss(fake: Params, student: Params, key: jax.Array) -> jax.Array:
        return jnp.mean(steps.fake_terms(*shared, (network(student), network(fake)), *draw(key)))

    def student_loss(student: Params, fake: Params, key: jax.Array) -> jax.Array:
        networks = (network(student), teacher, network(fake))
        return jnp.mean(steps.student_terms(*shared, networks, *draw(key))["loss"])

    def update(states: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        student, fake = states
        keys = jax.random.split(key, FAKE_UPDATES + 1)
        follow = lambda fake, key: (_descend(adam_fake, jax.grad(fake_loss)(fake[0], student[0], key), fake), None)
        fake, _ = jax.lax.scan(follow, fake, keys[1:])
        return (_descend(adam, jax.grad(student_loss)(student[0], fake[0], keys[0]), student), fake), None

    start = (initial, adam.init(initial)), (initial, adam_fake.init(initial))
    (student, fake), _ = jax.lax.scan(update, start, jax.random.split(key, updates))
    return student[0], fake[0]


def _data(toy: Toy, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A batch of the finest latents, a mask for the text that there is none of, and another key."""
    latents_key, key = jax.random.split(key)
    return sample_mixture(toy.mixtures[-1], latents_key, BATCH), jnp.ones((BATCH, TEXT), jnp.int32), key


def _descend(adam: optax.GradientTransformation, grads: Params, state: tuple[Params, Any]) -> tuple[Params, Any]:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step count with floats
        updates, moments = adam.update(grads, state[1])
    return optax.apply_updates(state[0], updates), moments


# --- samples ----------------------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """Frames of one stage, [N, 1, h, w, C]: clean ones, the ends of their paths, and the noise in these."""

    clean: jax.Array
    end: jax.Array
    noise: jax.Array


def target_samples(toy: Toy, stage: int, key: jax.Array) -> Samples:
    """z_i, y_end and ε of the data."""
    clean_key, noise_key = jax.random.split(key)
    clean = sample_mixture(toy.mixtures[stage], clean_key, SAMPLES)
    noise = jax.random.normal(noise_key, clean.shape, jnp.float32)
    return Samples(clean, paths.path_end(toy.schedule, stage, noise, clean), noise)


def one_step_samples(toy: Toy, stage: int, objective: StepsObjective, network: Velocity, key: jax.Array) -> Samples:
    """z~ and y - v of one step from where the stage starts behind the data's coarser frames."""
    shared = (objective, toy.schedule, toy.units[stage])
    latents_key, rows_key = jax.random.split(key)
    latents = sample_mixture(toy.mixtures[-1], latents_key, SAMPLES)
    rows = steps.draw_student_rows(*shared, latents, jnp.ones((SAMPLES, TEXT), jnp.int32), rows_key)
    return Samples(steps.student_clean(*shared, network, rows), rows.state - network(rows.batch), rows.noise)


def chain_jump(toy: Toy, networks: Sequence[Velocity], key: jax.Array, steps_per_stage: int = 1) -> jax.Array:
    """The finest frames by (1), as inference makes them, [SAMPLES, 1, h, w, C]."""
    objective = StepsObjective(steps=(steps_per_stage,) * STAGES)
    latents, text_mask = jnp.zeros((SAMPLES, 1, SIZE, SIZE, CHANNELS)), jnp.ones((SAMPLES, TEXT), jnp.int32)
    network = lambda units: networks[units.stage]
    return student_rollout(objective, toy.schedule, toy.units, network, latents, text_mask, key)


def chain_fresh(toy: Toy, networks: Sequence[Velocity], key: jax.Array, form: str = "extrapolated") -> jax.Array:
    """The finest frames by (2), one step a stage, [SAMPLES, 1, h, w, C].

    `form` is that of the networks' clean frames; "exact" takes the noise of a stage's start, which (2) knows.
    """
    clean = None
    for stage, units in enumerate(toy.units):
        noise = jax.random.normal(jax.random.fold_in(key, stage), (SAMPLES, *toy.mixtures[stage].means.shape[1:]))
        start = paths.path_start(toy.schedule, stage, noise, clean)
        t, timestep = table_entries(toy.schedule, stage, jnp.zeros(SAMPLES))
        state = UnitState(patchify(start, units.patch_size), patchify(noise, units.patch_size), t, timestep)
        rows = stage_batch(units, jnp.zeros(SAMPLES, jnp.int32), jnp.ones((SAMPLES, TEXT), jnp.int32), state)
        clean = steps.clean_prediction(toy.schedule, stage, form, start, t, networks[stage](rows), noise)
    return clean
