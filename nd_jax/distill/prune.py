"""Distillation 3: recovery of a transformer from which blocks were taken.

    D_θ      = the teacher D without some blocks; the student's block k was the teacher's block m_k                (1)
    y, v, h  = a state of the teacher's own objective, its velocity and its history (`teacher`, equation 1)        (2)
    L_data   = |D_θ(y, h) - v|²,   L_flow = |D_θ(y, h) - D(y, h)|²              means over the velocity's values   (3)
    L_image  = mean_k |z_θ(k + 1) - z_D(n_k)|²                                  over image tokens and channels     (4)
    L_text   = mean_k (1 - cos(z_θ(k + 1), z_D(n_k)))                           over text tokens                   (5)
    n_k      = m_k + 1 ("simple"), or m_{k+1} ("next"; S for the last block)                                       (6)
    L        = w_data L_data + w_flow L_flow + w_image L_image + w_text L_text                                     (7)

z(j) is a stream in front of block j, and behind the last block for j = S. "simple" asks for what the same block put out
in the teacher, "next" for what the next block that is left was used to get, so that a block makes up for those that
were taken behind it. The last block has no text output, so (5) has a term less. Padded tokens have no part in (4), (5).

Stage 1 is w_data alone: a short adaptation without a teacher. Stage 2 goes on from it with all four.

Source: Neodragon (arXiv 2511.06055), section on block pruning. The paper gives no weights for (7); that features are
taken of all image tokens, history too, is our reading.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.distill.base import Batch, Distillation, Mean, Role, Roles
from nd_jax.distill.teacher import (
    TRANSFORMER,
    FlowObjective,
    StageBatch,
    TeacherModels,
    apply_transformer,
    draw_stage_batch,
    each_stage,
)
from nd_jax.distill.text_encoder import token_cosine
from nd_jax.models.mmdit import BlockStates
from nd_jax.models.text_conditioning import Conditioning, encode_text
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.pyramid.units import StageUnits, stage_units
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT

MAPPINGS = ("simple", "next")
STUDENT, TEACHER, TEXT = "student", "teacher", "text"


@dataclasses.dataclass(frozen=True)
class RecoveryLoss:
    """Equation 7, and the mapping of equation 6."""

    data_weight: float = 1.0
    flow_weight: float = 0.0
    image_weight: float = 0.0
    text_weight: float = 0.0
    mapping: str = "simple"

    def __post_init__(self):
        weights = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("_weight")}
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"loss.{name} is {value}: use 0 or more")
        if not any(weights.values()):
            raise ValueError("all weights of the loss are 0: nothing would be learned")
        if self.mapping not in MAPPINGS:
            raise ValueError(f"loss.mapping is {self.mapping!r}: use {' or '.join(map(repr, MAPPINGS))}")

    @property
    def needs_features(self) -> bool:
        return bool(self.image_weight or self.text_weight)

    @property
    def needs_teacher(self) -> bool:
        return bool(self.flow_weight) or self.needs_features


def mapped_states(kept: Sequence[int], mapping: str) -> tuple[int, ...]:
    """n_k of equation 6 for every block of the student.

    Args:
      kept: m_k, the teacher's blocks that are left, the last block of all among them.
      mapping: one of `MAPPINGS`.
    """
    if mapping == "simple":
        return tuple(k + 1 for k in kept)
    return (*kept[1:], kept[-1] + 1)


def feature_losses(
    student: BlockStates, teacher: BlockStates, image_mask: jax.Array, text_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Equations 4 and 5 of every row, float32 [B] each.

    Args:
      student: all K + 1 image and K text states.
      teacher: K image and K - 1 text states, those that the student's are to be like.
      image_mask: bool [B, N], False for padding.
      text_mask: [B, T], likewise.
    """
    mean = lambda x, mask: jnp.sum(x * mask, axis=(0, 2)) / (x.shape[0] * jnp.maximum(jnp.sum(mask[0], axis=1), 1.0))
    weight = lambda mask: mask.astype(jnp.float32)[None]
    ours, theirs = student.image[1:].astype(jnp.float32), teacher.image.astype(jnp.float32)
    image = mean(jnp.mean(jnp.square(ours - theirs), axis=-1), weight(image_mask))
    if not teacher.text.shape[0]:
        return image, jnp.zeros_like(image)
    text = mean(1.0 - jax.vmap(token_cosine)(student.text[1:], teacher.text), weight(text_mask))
    return image, text


def recovery_training(
    models: TeacherModels,
    kept: tuple[int, ...],
    objective: FlowObjective,
    loss: RecoveryLoss,
    schedule: PyramidSchedule,
    roles: dict[str, Role],
    dtype: Any = jnp.float32,
) -> Distillation:
    """The method as data.

    Args:
      models: sizes; `models.mmdit` is the teacher's.
      kept: blocks of the teacher that the student has.
      objective: how states are drawn.
      loss: equation 7.
      schedule: the pyramid.
      roles: "student" trains; "text" is frozen, and so is "teacher", which is there where the loss needs it.
      dtype: computation dtype.
    """
    models.check()
    student_config = dataclasses.replace(models.mmdit, num_layers=len(kept))
    tables = [stage_units(models.mmdit, models.video, i, models.text_length) for i in range(models.video.stages)]
    if len(objective.stage_ratios) != len(tables):
        raise ValueError(f"stage_ratios {objective.stage_ratios}: give one for each of {len(tables)} stages")
    wanted = mapped_states(kept, loss.mapping) if loss.needs_features else ()
    weights = {name: getattr(loss, f"{name}_weight") for name in ("data", "flow", "image", "text")}
    run = lambda config, params, *rows: apply_transformer(models, config, params, *rows)

    def terms(given: Roles, batch: StageBatch, text: Conditioning) -> dict[str, jax.Array]:
        """The parts of equation 7 of every row, [B] each."""
        out = run(student_config, given[STUDENT][TRANSFORMER], batch, text, dtype, loss.needs_features)
        error = lambda target: jnp.mean(jnp.square(out.velocity - target), axis=(1, 2))
        parts = {"data": error(batch.state.target)}
        if TEACHER in given:
            teacher = jax.lax.stop_gradient(given[TEACHER][TRANSFORMER])
            theirs = jax.lax.stop_gradient(run(models.mmdit, teacher, batch, text, dtype, wanted or False))
            parts["flow"] = error(theirs.velocity)
            if wanted:
                features = feature_losses(out.states, theirs.states, batch.image_mask, text.mask)
                parts["image"], parts["text"] = features
        return parts

    def stage_terms(given: Roles, text: Conditioning, latents: jax.Array, units: StageUnits, key: jax.Array):
        return terms(given, draw_stage_batch(objective, schedule, units, latents, text.mask, key), text)

    def encode(given: Roles, batch: Batch) -> Conditioning:
        return jax.lax.stop_gradient(encode_text(models.text, given[TEXT], batch, dtype))

    def recovery_loss(given: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        def of_stage(stage: int, rows: tuple[jax.Array, Conditioning], key: jax.Array) -> dict[str, jax.Array]:
            latents, text = rows
            return stage_terms(given, text, latents, tables[stage], key)

        by_stage = each_stage(objective.stage_ratios, (batch["latents"], encode(given, batch)), key, of_stage)
        over_rows = lambda per_row: Mean(jnp.sum(per_row), jnp.float32(per_row.shape[0]))
        names = list(next(iter(by_stage.values())))
        parts = {name: sum_of([over_rows(stage[name]) for stage in by_stage.values()]) for name in names}
        total = sum(weights[name] * parts[name].total for name in names)
        return Mean(total, parts["data"].weight), parts

    def evaluate(given: Roles, batch: Batch) -> dict[str, Mean]:
        # The same states for every evaluation, and those of the teacher's own training.
        text, valid = encode(given, batch), batch["valid"].astype(jnp.float32)
        over_rows = lambda per_row: Mean(jnp.sum(per_row * valid), jnp.sum(valid))
        metrics: dict[str, Mean] = {}
        for stage, units in enumerate(tables):
            parts = stage_terms(given, text, batch["latents"], units, jax.random.key(stage))
            metrics[f"velocity_error_stage{stage}"] = over_rows(parts.pop("data"))
            metrics |= {f"{name}_error_stage{stage}": over_rows(part) for name, part in parts.items()}
        return metrics

    network = PYRAMID_FLOW_MMDIT if student_config.context_embedder else PYRAMID_MMDIT
    return Distillation(
        name="prune",
        roles=roles,
        losses={STUDENT: recovery_loss},
        schedule=(STUDENT,),
        evaluate=evaluate,
        summarize=lambda means: summarize(means, len(tables)),
        deploy=lambda given: {TRANSFORMER: (network, student_config, given[STUDENT][TRANSFORMER])},
    )


def sum_of(means: Sequence[Mean]) -> Mean:
    """Sum of means as `Mean.__add__` has it."""
    total = means[0]
    for mean in means[1:]:
        total = total + mean
    return total


def summarize(means: dict[str, float], stages: int) -> dict[str, float]:
    """Every error as its mean over stages; of the velocity's, those of the stages as well."""
    names = sorted({name.rsplit("_stage", 1)[0] for name in means})
    averages = {name: sum(means[f"{name}_stage{i}"] for i in range(stages)) / stages for name in names}
    return averages | {name: value for name, value in means.items() if name.startswith("velocity_error")}
