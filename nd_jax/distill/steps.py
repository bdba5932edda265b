"""Distillation 4: few steps a stage, by distribution matching along the pyramid (pyramidal DMD).

There are three copies of the video transformer: the teacher D, frozen and guided; the student D_θ, which shall need n_i
steps at stage i and no guidance; and the fake model D_φ, which keeps learning the flow of what the student makes. A
sample is a latent frame z that the teacher made, a stage i, and the frames before it as history h. `pyramid.paths` has
s_i, e_i, U, Down and the stage path.

    y_t    = t y_start + (1 - t) y_end          a point of z's path, t one of the n_i steps of inference       (1)
    z~     = y_t - σ(t) / (s_i - e_i) D_θ(y_t, h)                       the student's clean frame              (2)
    y'     = path around z~ alone, with fresh noise:  U(Down(z~)) takes the place of the coarser stage         (3)
    z~_τ   = τ y'_start + (1 - τ) y'_end,    v' = y'_start - y'_end                                            (4)
    L_φ    = |D_φ(sg z~_τ, τ, h) - v'|²                                 τ uniform, no gradient to θ            (5)
    D^g    = D(no text) + g (D(text) - D(no text))                      one pass over both                     (6)
    w      = 1 / |D^g(z~_τ) - v'|_1                                     one number a sample                    (7)
    dL/dθ  = w (D^g(z~_τ) - D_φ(z~_τ)) · dz~/dθ                         τ on a grid, no other gradient         (8)
    L_c    = log(1 + |z~ - z_i|²)                                       Cauchy: near to the teacher's frame    (9)
    L_θ    = (8) + w_c L_c                                                                                     (10)

Why (8) matches distributions: on a straight path the velocity that a perfect network gives is the point minus the
expected clean frame, up to factors of τ. So D^g - D_φ points from where the teacher expects clean frames to where the
student's frames are, and a step against it moves z~ there where the teacher would have it. It vanishes when both
expect the same, which is when the student's samples have the teacher's distribution; D_φ has to keep up for that, thus
two updates of (5) for each of (10). (7) makes samples on which the teacher errs much count less.

(2) is the paper's form. At a stage with e_i > 0 and s_i < 1 (the middle one) the exact velocity makes it a sharpened
z_i (`paths`, equation 7); clean_form "exact" gives z_i itself, by the noise that is known in training.

Source: Neodragon (arXiv 2511.06055), section on step distillation; distribution matching: Yin et al., arXiv 2311.18828
and 2405.14867. The grid of τ, the norm in (7) over a sample's whole frame, and w_c are our reading.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.distill.teacher import StageBatch, stage_batch
from nd_jax.pyramid import paths
from nd_jax.pyramid.layout import patchify
from nd_jax.pyramid.noise import latent_pyramid, noise_pyramid
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.pyramid.training import table_entries
from nd_jax.pyramid.units import StageUnits, draw_unit_randomness, frame_of_unit, unit_state

CLEAN_FORMS = ("extrapolated", "exact")


@dataclasses.dataclass(frozen=True)
class StepsObjective:
    """What the student learns; hashable.

    Attributes:
      steps: n_i, the student's steps at every stage, coarsest first.
      stage_ratios: how many of every sum(stage_ratios) rows train each stage.
      first_frame: whether the first latent frame is trained too; False for students of mode "hybrid", who are given it.
      corruption_ratio: largest share of noise in the history; 0 is the teacher's frames as they are.
      clean_form: of equation 2, one of `CLEAN_FORMS`.
      tau_grid: τ of (8), each in (0, 1].
      dmd_weight: of (8) in (10).
      cauchy_weight: w_c.
    """

    steps: tuple[int, ...] = (1, 1, 1)
    stage_ratios: tuple[int, ...] = (1, 1, 1)
    first_frame: bool = True
    corruption_ratio: float = 0.0
    clean_form: str = "extrapolated"
    tau_grid: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    dmd_weight: float = 1.0
    cauchy_weight: float = 1.0

    def __post_init__(self):
        if len(self.steps) != len(self.stage_ratios) or min(self.steps) < 1:
            raise ValueError(
                f"steps {self.steps}: give one positive number for each of {len(self.stage_ratios)} stages"
            )
        if self.clean_form not in CLEAN_FORMS:
            raise ValueError(f"clean_form {self.clean_form!r} is not one of {', '.join(CLEAN_FORMS)}")
        if not self.tau_grid or not all(0.0 < tau <= 1.0 for tau in self.tau_grid):
            raise ValueError(f"tau_grid {self.tau_grid}: give times above 0 and up to 1")
        if not 0.0 <= self.corruption_ratio <= 1.0:
            raise ValueError(f"corruption_ratio {self.corruption_ratio} is not a share: use 0 to 1")
        if min(self.dmd_weight, self.cauchy_weight) < 0 or not self.dmd_weight + self.cauchy_weight:
            raise ValueError("dmd_weight and cauchy_weight: use 0 or more, and not 0 for both")


# --- the mathematics, on frames [B, T, H, W, C] -----------------------------------------------------------------------


def clean_prediction(
    schedule: PyramidSchedule,
    stage: int,
    form: str,
    state: jax.Array,
    t: jax.Array,
    velocity: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """z~ (2) of a state y_t [B, T, H, W, C] at t [B]; `noise` is the one in the state, used by form "exact" alone."""
    if form == "exact":
        return paths.exact_clean(schedule, stage, state, t, velocity, noise)
    return paths.extrapolated_clean(schedule, stage, state, t, velocity)


def renoise(
    schedule: PyramidSchedule, stage: int, clean: jax.Array, noise: jax.Array, tau: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(z~_τ, v') of (3) and (4), both of the shape of `clean` [B, T, H, W, C]; fresh noise of that shape, τ [B]."""
    path = paths.renoised_path(schedule, stage, noise, clean)
    return paths.point(path, tau), paths.velocity(path)


def matching_direction(teacher: jax.Array, fake: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(w (D^g - D_φ), w) of (7) and (8), [B, T, H, W, C] and [B]. No gradient goes through either.

    Args:
      teacher, fake: velocities at z~_τ, [B, T, H, W, C].
      target: v'.
    """
    teacher, fake, target = (jax.lax.stop_gradient(x) for x in (teacher, fake, target))
    weight = 1.0 / jnp.maximum(jnp.sum(jnp.abs(teacher - target), axis=(1, 2, 3, 4)), 1e-8)
    return paths.per_sample(weight, teacher) * (teacher - fake), weight


def with_gradient(direction: jax.Array, clean: jax.Array) -> jax.Array:
    """A number per sample [B] whose gradient is (8): the norm of the direction, and its product with dz~/dθ."""
    direction = jax.lax.stop_gradient(direction)
    product = _sum(direction * clean)
    # The product's value says nothing, the norm is what one wants to see; their gradients are the other way round.
    return jnp.sqrt(_sum(jnp.square(direction))) + (product - jax.lax.stop_gradient(product))


def fake_error(fake: jax.Array, target: jax.Array) -> jax.Array:
    """L_φ (5) of every sample [B], a mean over its values."""
    return jnp.mean(jnp.square(fake - jax.lax.stop_gradient(target)), axis=(1, 2, 3, 4))


def cauchy(clean: jax.Array, target: jax.Array) -> jax.Array:
    """L_c (9) of every sample [B]."""
    return jnp.log1p(_sum(jnp.square(clean - target)))


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=(1, 2, 3, 4))


# --- states -----------------------------------------------------------------------------------------------------------


class StudentRows(NamedTuple):
    """Rows of one stage at the student's own steps (1).

    Attributes:
      batch: y_t and history, as tokens.
      unit: [B], which latent frame.
      state: y_t as frames, [B, 1, h, w, C].
      clean: z_i.
      noise: ε_i in y_t.
      step: [B], which of the student's steps.
      own: bool [B], rows whose frames the student made; no teacher's frame is there to be near to, so (9) leaves them
        out.
    """

    batch: StageBatch
    unit: jax.Array
    state: jax.Array
    clean: jax.Array
    noise: jax.Array
    step: jax.Array
    own: jax.Array


def draw_student_rows(
    objective: StepsObjective,
    schedule: PyramidSchedule,
    units: StageUnits,
    latents: jax.Array,
    text_mask: jax.Array,
    key: jax.Array,
) -> StudentRows:
    """Equation 1 for every row: a latent frame and one of the student's steps, both drawn uniformly.

    Args:
      objective, schedule, units: static.
      latents: clean and normalised, [B, T, H, W, C].
      text_mask: [B, L].
      key: which latent frame and step, noise and corruption.
    """
    unit_key, step_key, state_key = jax.random.split(key, 3)
    rows, frames = latents.shape[:2]
    unit = jax.random.randint(unit_key, (rows,), 0 if objective.first_frame else 1, frames)
    count = objective.steps[units.stage]
    step = jax.random.randint(step_key, (rows,), 0, count)
    table = schedule.inference_steps(units.stage, count)
    times = tuple(jnp.asarray(column, jnp.float32)[step] for column in (table.sigmas[:-1], table.timesteps))
    randomness = draw_unit_randomness(state_key, units, latents.shape)
    state = unit_state(schedule, units, latents, unit, randomness, objective.corruption_ratio, times)
    return StudentRows(
        batch=stage_batch(units, unit, text_mask, state),
        unit=unit,
        state=units.unpack(state.tokens[:, -units.output_tokens :]),
        clean=frame_of_unit(latent_pyramid(latents, schedule.stages)[units.stage], unit),
        noise=noise_pyramid(randomness.noise, schedule.stages)[units.stage],
        step=step,
        own=jnp.zeros((rows,), bool),
    )


def with_frame(batch: StageBatch, units: StageUnits, frame: jax.Array, t: jax.Array, timestep: jax.Array) -> StageBatch:
    """The rows with another current frame [B, 1, h, w, C] at another time, behind the same history."""
    tokens = jnp.concatenate([batch.state.tokens[:, : -units.output_tokens], patchify(frame, units.patch_size)], axis=1)
    return batch._replace(state=batch.state._replace(tokens=tokens, sigma=t, timestep=timestep))


class Renoised(NamedTuple):
    """A student's frames on paths of their own, (3) and (4).

    Attributes:
      batch: z~_τ behind the rows' history, for the teacher and the fake model.
      target: v', [B, 1, h, w, C].
    """

    batch: StageBatch
    target: jax.Array


def draw_renoised(
    objective: StepsObjective,
    schedule: PyramidSchedule,
    units: StageUnits,
    rows: StudentRows,
    clean: jax.Array,
    key: jax.Array,
    on_grid: bool,
) -> Renoised:
    """Equations 3 and 4 of z~ [B, 1, h, w, C], which no gradient passes; τ of the grid (8), or uniform (5)."""
    noise_key, tau_key = jax.random.split(key)
    clean = jax.lax.stop_gradient(clean)
    rows_shape = clean.shape[:1]
    if on_grid:
        # The networks know a stage's times as the N entries of its table.
        count = schedule.num_train_timesteps
        grid = np.clip(np.round((1.0 - np.asarray(objective.tau_grid)) * count), 0, count - 1).astype(np.int32)
        index = jnp.asarray(grid)[jax.random.randint(tau_key, rows_shape, 0, len(grid))]
        tau = jnp.asarray(schedule.sigmas, jnp.float32)[index]
        timestep = jnp.asarray(schedule.timesteps[units.stage])[index]
    else:
        tau, timestep = table_entries(schedule, units.stage, jax.random.uniform(tau_key, rows_shape, jnp.float32))
    noise = jax.random.normal(noise_key, clean.shape, jnp.float32)
    point, target = renoise(schedule, units.stage, clean, noise, tau)
    return Renoised(with_frame(rows.batch, units, point, tau, timestep), target)


# Rows of one stage -> velocities as frames [B, 1, h, w, C].
Velocity = Callable[[StageBatch], jax.Array]


def student_clean(
    objective: StepsObjective, schedule: PyramidSchedule, units: StageUnits, student: Velocity, rows: StudentRows
) -> jax.Array:
    """z~ (2) of every row, [B, 1, h, w, C]."""
    form, t = objective.clean_form, rows.batch.state.sigma
    return clean_prediction(schedule, units.stage, form, rows.state, t, student(rows.batch), rows.noise)


def student_terms(
    objective: StepsObjective,
    schedule: PyramidSchedule,
    units: StageUnits,
    networks: tuple[Velocity, Velocity, Velocity],
    rows: StudentRows,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """The parts of (10) of every row, [B] each: `loss`, and `direction_norm`, `teacher_weight`, `cauchy` to look at.

    Args:
      objective, schedule, units: static.
      networks: student, teacher (6) and fake.
      rows: of the stage.
      key: fresh noise and τ.
    """
    student, teacher, fake = networks
    clean = student_clean(objective, schedule, units, student, rows)
    near = jnp.where(rows.own, 0.0, cauchy(clean, rows.clean))
    parts = {"loss": objective.cauchy_weight * near, "cauchy": near}
    if objective.dmd_weight:
        fresh = draw_renoised(objective, schedule, units, rows, clean, key, on_grid=True)
        direction, weight = matching_direction(teacher(fresh.batch), fake(fresh.batch), fresh.target)
        norm = with_gradient(direction, clean)
        parts |= {"direction_norm": norm, "teacher_weight": weight}
        parts["loss"] = parts["loss"] + objective.dmd_weight * norm
    return parts


def fake_terms(
    objective: StepsObjective,
    schedule: PyramidSchedule,
    units: StageUnits,
    networks: tuple[Velocity, Velocity],
    rows: StudentRows,
    key: jax.Array,
) -> jax.Array:
    """L_φ (5) of every row, [B], on what the student makes now; `networks` are student and fake."""
    student, fake = networks
    clean = student_clean(objective, schedule, units, student, rows)
    fresh = draw_renoised(objective, schedule, units, rows, clean, key, on_grid=False)
    return fake_error(fake(fresh.batch), fresh.target)
