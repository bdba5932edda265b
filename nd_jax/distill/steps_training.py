"""Distillation 4 as methods: pyramidal DMD (`steps`), and the two baselines that share its states.

    "dmd"          student by (10) and fake model by (5) of `steps`, in turns
    "progressive"  |D_θ(y_t, h) - (y_t - y_t') / (t - t')|²,  y_t' where m guided steps of the teacher come to      (1)
                   from y_t; t' the time of the student's next step, 0 behind its last
    "finetune"     |D_θ(y_t, h) - v|², the data's velocity, at the student's own steps                              (2)

(1) asks one step of the student for what m steps of the teacher give (Salimans and Ho, arXiv 2202.00512, along a stage
of the pyramid); it needs no fake model, (2) no teacher either.

Every evaluation also looks for collapse: mean and standard deviation of the student's clean frames beside those of the
teacher's, and the largest weight. `std_ratio` out of its limits ends a run.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.distill import steps
from nd_jax.distill.base import Batch, Distillation, Mean, Role, Roles
from nd_jax.distill.steps import StepsObjective, StudentRows, Velocity
from nd_jax.distill.student_history import StudentHistory, student_rollout
from nd_jax.distill.teacher import TRANSFORMER, StageBatch, TeacherModels, apply_transformer, each_stage
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.text_conditioning import Conditioning, encode_text
from nd_jax.pyramid.schedule import PyramidSchedule, euler_step
from nd_jax.pyramid.units import StageUnits, stage_units
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT

METHODS = ("dmd", "progressive", "finetune")
STUDENT, FAKE, TEACHER, TEXT = "student", "fake", "teacher", "text"
ROLES = {"dmd": (STUDENT, FAKE, TEACHER, TEXT), "progressive": (STUDENT, TEACHER, TEXT), "finetune": (STUDENT, TEXT)}


@dataclasses.dataclass(frozen=True)
class StepsMethod:
    """Which method, and its numbers.

    Attributes:
      name: one of `METHODS`.
      fake_updates: updates of the fake model for each of the student ("dmd").
      teacher_substeps: m of equation 1 ("progressive").
      std_ratio_limits: a run ends where the standard deviation of the student's clean frames leaves this range, in
        shares of the teacher's.
    """

    name: str = "dmd"
    fake_updates: int = 2
    teacher_substeps: int = 4
    std_ratio_limits: tuple[float, float] = (0.2, 5.0)

    def __post_init__(self):
        if self.name not in METHODS:
            raise ValueError(f"steps.name {self.name!r} is not one of {', '.join(METHODS)}")
        if min(self.fake_updates, self.teacher_substeps) < 1:
            raise ValueError("fake_updates and teacher_substeps: use 1 or more")

    @property
    def schedule(self) -> tuple[str, ...]:
        """Role of every step, over and over."""
        return (FAKE,) * self.fake_updates + (STUDENT,) if self.name == "dmd" else (STUDENT,)


class DataRows(NamedTuple):
    """Rows that states are drawn from: latents [B, T, H, W, C], their text, and which the student made itself [B]."""

    latents: jax.Array
    text: Conditioning
    own: jax.Array


def guided_velocity(
    apply: Any,
    units: StageUnits,
    unit: jax.Array,
    batch: StageBatch,
    text: Conditioning,
    negative: Conditioning,
    g: Any,
) -> jax.Array:
    """D^g of `steps` (6), [B, M, p * p * C]: both branches as one batch of 2 B rows, the negative ones first.

    Args:
      apply: (rows, text) -> velocity tokens.
      units: tables of the stage.
      unit: [B].
      batch, text: of the rows.
      negative: of the empty prompt, one row.
      g: [B].
    """
    twice = lambda x: jnp.concatenate([x, x])
    both = jax.tree.map(lambda n, p: jnp.concatenate([jnp.broadcast_to(n, p.shape), p]), negative, text)
    rows = batch._replace(
        state=jax.tree.map(twice, batch.state),
        geometry=units.geometry(twice(unit), both.mask),
        image_mask=twice(batch.image_mask),
    )
    unguided, guided = jnp.split(apply(rows, both), 2)
    return unguided + g[:, None, None] * (guided - unguided)


def teacher_point(
    objective: StepsObjective,
    schedule: PyramidSchedule,
    units: StageUnits,
    teacher: Velocity,
    rows: StudentRows,
    substeps: int,
) -> tuple[jax.Array, jax.Array]:
    """(y_t', t - t') of equation 1, [B, 1, h, w, C] and [B]: Euler steps of the teacher over one of the student."""
    t = rows.batch.state.sigma
    table = schedule.inference_steps(units.stage, objective.steps[units.stage])
    t_next = jnp.asarray(table.sigmas[1:], jnp.float32)[rows.step]
    column = lambda x: x[:, None, None, None, None]
    # What the networks are told is linear in the time of a stage.
    first, last = (float(schedule.timesteps[units.stage, k]) for k in (0, -1))
    slope = (first - last) / float(schedule.sigmas[0] - schedule.sigmas[-1])

    def step(y: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
        now, then = (t + (t_next - t) * ((k + end) / substeps) for end in (0.0, 1.0))
        timestep = first + slope * (now - 1.0)
        velocity = teacher(steps.with_frame(rows.batch, units, y, now, timestep))
        return euler_step(y, velocity, column(now), column(then)), None

    y, _ = jax.lax.scan(step, rows.state, jnp.arange(substeps, dtype=jnp.float32))
    return jax.lax.stop_gradient(y), t - t_next


@dataclasses.dataclass(frozen=True, eq=False)
class StepNetworks:
    """The networks of a method, as functions of its roles' parameters.

    Attributes:
      models: sizes; `models.mmdit` is the teacher's.
      student: of the student and the fake model, which may have fewer blocks.
      guidance: of `steps` (6), for the first latent frame and for the others.
      negative: columns of `TEXT_COLUMNS` of the empty prompt, int32 [1, L] each.
      dtype: computation dtype.
    """

    models: TeacherModels
    student: MMDiTConfig
    guidance: tuple[float, float]
    negative: Mapping[str, np.ndarray]
    dtype: Any = jnp.float32

    def __post_init__(self):
        self.models.check()

    @functools.cached_property
    def tables(self) -> list[StageUnits]:
        """Of every stage, coarsest first."""
        video = self.models.video
        return [stage_units(self.models.mmdit, video, i, self.models.text_length) for i in range(video.stages)]

    def encode(self, given: Roles, columns: Mapping[str, Any]) -> Conditioning:
        """Text of a batch; no gradient passes."""
        return jax.lax.stop_gradient(encode_text(self.models.text, given[TEXT], columns, self.dtype))

    def conditional(
        self, given: Roles, role: str, units: StageUnits, text: Conditioning, held: bool = False
    ) -> Velocity:
        """Student or fake model, without guidance; `held` keeps gradients out of its parameters."""
        params = given[role][TRANSFORMER]
        params = jax.lax.stop_gradient(params) if held else params
        apply = lambda rows: apply_transformer(self.models, self.student, params, rows, text, self.dtype)
        return lambda rows: units.unpack(apply(rows).velocity)

    def guided(self, given: Roles, units: StageUnits, text: Conditioning, unit: jax.Array) -> Velocity:
        """The teacher with guidance, `steps` (6), for rows of units [B]; no gradient reaches it."""
        models, params = self.models, jax.lax.stop_gradient(given[TEACHER][TRANSFORMER])
        apply = lambda rows, text: apply_transformer(models, models.mmdit, params, rows, text, self.dtype).velocity
        first, later = self.guidance
        g = jnp.where(unit == 0, first, later).astype(jnp.float32)
        empty = self.encode(given, {name: jnp.asarray(column) for name, column in self.negative.items()})
        return lambda rows: units.unpack(guided_velocity(apply, units, unit, rows, text, empty, g))


def steps_training(
    networks: StepNetworks,
    objective: StepsObjective,
    method: StepsMethod,
    history: StudentHistory,
    schedule: PyramidSchedule,
    roles: dict[str, Role],
) -> Distillation:
    """The method as data.

    Args:
      networks: sizes, guidance and dtype.
      objective: states and losses.
      method: which of the three.
      history: when rows are the student's own.
      schedule: the pyramid.
      roles: those of `ROLES[method.name]`; student and fake model train.
    """
    tables = networks.tables
    if len(objective.steps) != len(tables):
        raise ValueError(f"steps {objective.steps}: give one number for each of {len(tables)} stages")
    encode, network, teacher = networks.encode, networks.conditional, networks.guided

    def data_rows(given: Roles, batch: Batch, key: jax.Array) -> DataRows:
        """The rows of a batch; some of them as the student makes them, where the config asks for that."""
        text, latents = encode(given, batch), batch["latents"]
        own = jnp.zeros(latents.shape[:1], bool)
        if not history.probability:
            return DataRows(latents, text, own)
        own_key, rollout_key = jax.random.split(jax.random.fold_in(key, len(tables)))
        own = jax.random.uniform(own_key, own.shape) < history.share(batch["step"])
        student = lambda units: network(given, STUDENT, units, text, held=True)
        made = lambda: student_rollout(objective, schedule, tables, student, latents, text.mask, rollout_key)
        latents = jax.lax.cond(
            jnp.any(own), lambda: jnp.where(own[:, None, None, None, None], made(), latents), lambda: latents
        )
        return DataRows(latents, text, own)

    def draw(units: StageUnits, drawn: DataRows, key: jax.Array) -> tuple[StudentRows, jax.Array]:
        rows_key, fresh_key = jax.random.split(key)
        rows = steps.draw_student_rows(objective, schedule, units, drawn.latents, drawn.text.mask, rows_key)
        return rows._replace(own=drawn.own), fresh_key

    def student_parts(given: Roles, units: StageUnits, text: Conditioning, rows: StudentRows, key: jax.Array):
        """Parts of the student's loss of every row, "loss" among them."""
        shared = (objective, schedule, units)
        student = network(given, STUDENT, units, text)
        if method.name == "dmd":
            others = (teacher(given, units, text, rows.unit), network(given, FAKE, units, text, held=True))
            return steps.student_terms(*shared, (student, *others), rows, key)
        target = units.unpack(rows.batch.state.target)
        if method.name == "progressive":
            far = teacher(given, units, text, rows.unit)
            end, length = teacher_point(*shared, far, rows, method.teacher_substeps)
            target = (rows.state - end) / length[:, None, None, None, None]
        return {"loss": steps.fake_error(student(rows.batch), target)}

    def student_loss(given: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        def terms(stage: int, drawn: DataRows, key: jax.Array) -> dict[str, jax.Array]:
            rows, fresh_key = draw(tables[stage], drawn, key)
            return student_parts(given, tables[stage], drawn.text, rows, fresh_key)

        return _by_stage(each_stage(objective.stage_ratios, data_rows(given, batch, key), key, terms))

    def fake_loss(given: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        def terms(stage: int, drawn: DataRows, key: jax.Array) -> dict[str, jax.Array]:
            units, text = tables[stage], drawn.text
            rows, fresh_key = draw(units, drawn, key)
            pair = network(given, STUDENT, units, text, held=True), network(given, FAKE, units, text)
            return {"loss": steps.fake_terms(objective, schedule, units, pair, rows, fresh_key)}

        return _by_stage(each_stage(objective.stage_ratios, data_rows(given, batch, key), key, terms))

    def evaluate(given: Roles, batch: Batch) -> dict[str, Mean]:
        # The same rows, noise and times for every evaluation: its curve then shows the weights alone.
        text, valid = encode(given, batch), batch["valid"].astype(jnp.float32)
        over_rows = lambda per_row: Mean(jnp.sum(per_row * valid), jnp.sum(valid))
        mean = lambda x: jnp.mean(x, axis=(1, 2, 3, 4))
        metrics = {}
        for stage, units in enumerate(tables):
            drawn = DataRows(batch["latents"], text, jnp.zeros(valid.shape, bool))
            rows, key = draw(units, drawn, jax.random.key(stage))
            clean = steps.student_clean(objective, schedule, units, network(given, STUDENT, units, text), rows)
            values = {
                "clean_error": mean(jnp.square(clean - rows.clean)),
                "student_mean": mean(clean),
                "student_square": mean(jnp.square(clean)),
                "teacher_mean": mean(rows.clean),
                "teacher_square": mean(jnp.square(rows.clean)),
            }
            if method.name == "dmd":
                parts = student_parts(given, units, text, rows, key)
                pair = network(given, STUDENT, units, text), network(given, FAKE, units, text)
                values |= {name: parts[name] for name in ("direction_norm", "cauchy") if name in parts}
                values["fake_error"] = steps.fake_terms(objective, schedule, units, pair, rows, key)
            metrics |= {f"{name}_stage{stage}": over_rows(value) for name, value in values.items()}
        largest = lambda tree: jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]))
        one = jnp.ones((), jnp.float32)
        for role in set(method.schedule):
            metrics[f"{role}_largest_weight"] = Mean(largest(given[role]).astype(jnp.float32), one)
        return metrics

    weights = PYRAMID_FLOW_MMDIT if networks.student.context_embedder else PYRAMID_MMDIT
    losses = {STUDENT: student_loss} | ({FAKE: fake_loss} if method.name == "dmd" else {})
    return Distillation(
        name="steps",
        roles=roles,
        losses=losses,
        schedule=method.schedule,
        evaluate=evaluate,
        summarize=lambda means: summarize(means, len(tables)),
        deploy=lambda given: {TRANSFORMER: (weights, networks.student, given[STUDENT][TRANSFORMER])},
        limits={f"std_ratio_stage{i}": method.std_ratio_limits for i in range(len(tables))},
    )


def _by_stage(stages: Mapping[int, Mapping[str, jax.Array]]) -> tuple[Mean, dict[str, Mean]]:
    """The loss over all rows, and every part as its mean at each stage."""
    over_rows = lambda per_row: Mean(jnp.sum(per_row), jnp.float32(per_row.shape[0]))
    total = Mean(jnp.zeros(()), jnp.zeros(()))
    metrics = {}
    for stage, parts in stages.items():
        total = total + over_rows(parts["loss"])
        metrics |= {f"{name}_stage{stage}": over_rows(part) for name, part in parts.items()}
    return total, metrics


def summarize(means: Mapping[str, float], stages: int) -> dict[str, float]:
    """Moments as `std_ratio` (1 is right) and `mean_shift`, in the teacher's deviations (0 is right)."""
    std = lambda who, i: max(means[f"{who}_square_stage{i}"] - means[f"{who}_mean_stage{i}"] ** 2, 0.0) ** 0.5
    moments = ("student_mean", "student_square", "teacher_mean", "teacher_square")
    kept = {name: value for name, value in means.items() if not name.startswith(moments)}
    for i in range(stages):
        scale = max(std("teacher", i), 1e-8)
        kept[f"std_ratio_stage{i}"] = std("student", i) / scale
        kept[f"mean_shift_stage{i}"] = (means[f"student_mean_stage{i}"] - means[f"teacher_mean_stage{i}"]) / scale
    kept["clean_error"] = sum(means[f"clean_error_stage{i}"] for i in range(stages)) / stages
    return kept
