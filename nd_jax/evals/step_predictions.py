"""What student, teacher and fake model of a step distillation make of the same rows, to look at.

For rows of one stage (`nd_jax.distill.steps`): the teacher's frame z_i, the student's clean prediction z~ from its own
step, z~ noised again, and the clean frames that the guided teacher and the fake model expect behind that,

    E = z~_τ - σ(τ) / (s_i - e_i) v(z~_τ, τ)                                                              (1)

A sound run has all of them alike in kind; where the teacher's expectation is sharper or cleaner than the fake model's,
their difference is what the student is taught. A fake model whose pictures are not the student's has fallen behind.
"""

import dataclasses

import jax

from nd_jax.distill import steps
from nd_jax.distill.base import Batch, Roles
from nd_jax.distill.steps import StepsObjective
from nd_jax.distill.steps_training import FAKE, STUDENT, TEACHER, StepNetworks
from nd_jax.pyramid import paths
from nd_jax.pyramid.schedule import PyramidSchedule

# Columns of a picture, in order; the last two are there where the method has the role.
COLUMNS = ("teacher's frame", "student", "noised", "teacher", "fake model")
TARGET, PREDICTED, NOISED, EXPECTED, FAKE_EXPECTED = COLUMNS


def step_predictions(
    networks: StepNetworks,
    objective: StepsObjective,
    schedule: PyramidSchedule,
    given: Roles,
    batch: Batch,
    stage: int,
    tau: float = 0.5,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """(column -> normalised frames [B, 1, h, w, C], latent frame of every row [B]); the same rows for any checkpoint.

    Args:
      networks, objective, schedule: of the run.
      given: its roles' parameters.
      batch: latents [B, T, H, W, C] and text.
      stage: which.
      tau: of (1), a time on the path around z~.
    """
    units, text = networks.tables[stage], networks.encode(given, batch)
    rows_key, fresh_key = jax.random.split(jax.random.key(stage))
    rows = steps.draw_student_rows(objective, schedule, units, batch["latents"], text.mask, rows_key)
    clean = steps.student_clean(objective, schedule, units, networks.conditional(given, STUDENT, units, text), rows)
    at_tau = dataclasses.replace(objective, tau_grid=(tau,))
    fresh = steps.draw_renoised(at_tau, schedule, units, rows, clean, fresh_key, on_grid=True)
    noised = units.unpack(fresh.batch.state.tokens[:, -units.output_tokens :])
    expect = lambda velocity: paths.extrapolated_clean(schedule, stage, noised, fresh.batch.state.sigma, velocity)
    columns = {TARGET: rows.clean, PREDICTED: clean, NOISED: noised}
    if TEACHER in given:
        columns[EXPECTED] = expect(networks.guided(given, units, text, rows.unit)(fresh.batch))
    if FAKE in given:
        columns[FAKE_EXPECTED] = expect(networks.conditional(given, FAKE, units, text)(fresh.batch))
    return columns, rows.unit
