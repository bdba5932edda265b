"""Rows whose frames the student made itself: training on the history that it will see at inference.

A student that is trained behind the teacher's frames alone sees its own errors for the first time when it is used, and
they add up along a video. Here some rows of a batch are rollouts of the student instead, from new noise and without
guidance:

    x_0 = ε_0,  x_i = α_i U(x_{i-1}) + β_i n_i,  x <- x + (t_{k+1} - t_k) D_θ(x, h_i)       unit after unit        (1)
    p(k) = p clip((k - k_0) / K, 0, 1)                    probability that a row is one, at step k                 (2)

The whole row is replaced, so that history and frame belong together. No gradient passes the rollout.

This goes beyond the paper, which trains behind the teacher's frames; it is off by default. The idea is that of
self-forcing (Huang et al., arXiv 2506.08009). (1) is `nd_jax.generate.sampler`, all units in one program.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from nd_jax.distill.steps import StepsObjective, Velocity
from nd_jax.distill.teacher import stage_batch
from nd_jax.pyramid.layout import patchify
from nd_jax.pyramid.noise import draw_block_noise, latent_pyramid, stage_jump
from nd_jax.pyramid.schedule import PyramidSchedule, euler_step
from nd_jax.pyramid.units import StageUnits, UnitState


@dataclasses.dataclass(frozen=True)
class StudentHistory:
    """Equation 2.

    Attributes:
      probability: p, of a row to be the student's own once the ramp is over; 0 is never.
      start: k_0, step of training at which the ramp begins.
      ramp: K, its steps.
    """

    probability: float = 0.0
    start: int = 0
    ramp: int = 1000

    def __post_init__(self):
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"student_history.probability {self.probability} is not a probability: use 0 to 1")
        if self.start < 0 or self.ramp < 1:
            raise ValueError("student_history: use a start of 0 or more and a ramp of 1 or more steps")

    def share(self, step: jax.Array) -> jax.Array:
        """p(k), float32 []."""
        done = (step - self.start).astype(jnp.float32) / self.ramp
        return self.probability * jnp.clip(done, 0.0, 1.0)


def student_rollout(
    objective: StepsObjective,
    schedule: PyramidSchedule,
    tables: Sequence[StageUnits],
    student: Callable[[StageUnits], Velocity],
    latents: jax.Array,
    text_mask: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Equation 1: what the student makes of every row's text, [B, T, H, W, C].

    Args:
      objective: the student's steps; without `first_frame` the first latent frame is the given one.
      schedule: the pyramid.
      tables: of all stages, coarsest first.
      student: its network at a stage.
      latents: [B, T, H, W, C], give the sizes and that first frame.
      text_mask: [B, L].
      key: all noise.
    """
    batch, frames, _, _, channels = latents.shape
    networks = [student(units) for units in tables]

    def stage_end(x: jax.Array, made: jax.Array, unit: jax.Array, units: StageUnits, network: Velocity) -> jax.Array:
        history = units.clean_history(latent_pyramid(made, schedule.stages), unit)
        table = schedule.inference_steps(units.stage, objective.steps[units.stage])
        entries = tuple(jnp.asarray(c, jnp.float32) for c in (table.timesteps, table.sigmas[:-1], table.sigmas[1:]))

        def step(x: jax.Array, entry: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            timestep, sigma, sigma_next = entry
            noisy = patchify(x, units.patch_size)
            rows = lambda value: jnp.full((batch,), value)
            state = UnitState(jnp.concatenate([history, noisy], axis=1), noisy, rows(sigma), rows(timestep))
            velocity = network(stage_batch(units, unit, text_mask, state))
            return euler_step(x, velocity, sigma, sigma_next), None

        return jax.lax.scan(step, x, entries)[0]

    def one_unit(made: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
        unit = jnp.full((batch,), at)
        keys = jax.random.split(jax.random.fold_in(key, at), len(tables))
        for units, network, noise_key in zip(tables, networks, keys, strict=True):
            shape = (batch, 1, units.size.height, units.size.width, channels)
            if units.stage == 0:
                x = jax.random.normal(noise_key, shape, jnp.float32)
            else:
                alpha, beta = schedule.renoise_weights(units.stage)
                x = stage_jump(x, draw_block_noise(noise_key, shape, schedule.gamma), alpha, beta)
            x = stage_end(x, made, unit, units, network)
        return jax.lax.dynamic_update_slice_in_dim(made, x, at, axis=1), None

    start = 0 if objective.first_frame else 1
    # Frames that are not made yet are in no history.
    made, _ = jax.lax.scan(one_unit, latents, jnp.arange(start, frames))
    return jax.lax.stop_gradient(made)
