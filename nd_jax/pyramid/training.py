"""Training states: noisy latents, velocity targets, timesteps and corrupted history, from explicit randomness.

For a sample with uniform numbers u, c in [0, 1) and N training timesteps:

    k   = min(⌊N u⌋, N - 1),   t = t_k,   τ = τ^i_k                    index into the stage's tables   (1)
    y   = t y_start + (1 - t) y_end,   v = y_start - y_end             `paths` (1) to (4)              (2)
    σ_c = c r,   r = corruption ratio                                  one strength per sample         (3)
    h   = σ_c η + (1 - σ_c) h_clean,   η ~ N(0, I)                     every history clip, own noise   (4)
    m   = 1 + (q mod G) + (n mod ⌊M / G⌋) G                            units of the finest stage       (5)
    l   = max(1 + M - m, 1)                                            units of every other stage      (6)

Two kinds of task exist. Full sequence: all frames are noisy and there is no history. Autoregressive: one unit is noisy
and the clean frames before it are its history (`history`), corrupted by (4) so that sampling errors do not
accumulate. In (5) and (6), M is the largest number of units, n the step counter, q the worker's rank and G the size of
the group of workers that cover G neighbouring lengths; long finest stages go with short coarse ones, so that steps
cost the same. Source: `add_pyramid_noise`, `add_pyramid_noise_with_temporal_pyramid` and `sample_stage_length` of the
public Pyramid-Flow code.

Shapes: [B, T, H, W, C] = batch, latent frames, rows, columns, channels; clean latents are normalised and float32.
"""

import dataclasses
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp

from nd_jax.errors import UserError
from nd_jax.pyramid import paths
from nd_jax.pyramid.history import HistoryClip, history_clips, history_plan, unit_frames
from nd_jax.pyramid.noise import latent_pyramid, noise_pyramid
from nd_jax.pyramid.schedule import PyramidSchedule


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, as static numbers: frames `start` to `stop` (exclusive) at `stage`, behind `history`."""

    stage: int
    start: int
    stop: int
    history: tuple[HistoryClip, ...] = ()


@flax.struct.dataclass
class Randomness:
    """Everything random about the training states of one task.

    Attributes:
      noise: ε at the finest size, [B, stop - start, H, W, C].
      u: (1), [B] in [0, 1).
      corruption: c (3), [B] in [0, 1); without effect where there is no history.
      history: η (4), one array per clip of the task, in the clip's shape.
    """

    noise: jax.Array
    u: jax.Array
    corruption: jax.Array
    history: tuple[jax.Array, ...] = ()


@flax.struct.dataclass
class TrainingState:
    """Input and target of the denoiser.

    Attributes:
      history: corrupted clips (4), oldest first.
      noisy: y (2), [B, stop - start, h, w, C] at the stage's size.
      target: v (2), of the same shape.
      sigma: t (1), [B], stage-local.
      timestep: τ (1), [B], what the network is told.
    """

    history: tuple[jax.Array, ...]
    noisy: jax.Array
    target: jax.Array
    sigma: jax.Array
    timestep: jax.Array


def full_sequence_task(stage: int, frames: int) -> Task:
    """All `frames` latent frames at once, as for images (one frame) and for videos without autoregression."""
    return Task(stage, 0, frames)


def autoregressive_task(stage: int, unit: int, frames_per_unit: int = 1) -> Task:
    """Unit `unit` (0: the first frame) given the frames before it."""
    start, stop = unit_frames(unit, frames_per_unit)
    return Task(stage, start, stop, history_plan(start, stage, frames_per_unit))


def draw_randomness(key: jax.Array, task: Task, latents_shape: tuple[int, ...], stages: int) -> Randomness:
    """Randomness of a task from a key, float32.

    Args:
      key: consumed; the same key gives the same arrays.
      task: says which arrays.
      latents_shape: (B, T, H, W, C) of the clean latents at the finest size.
      stages: S of the pyramid.
    """
    batch, _, height, width, channels = latents_shape
    noise_key, u_key, corruption_key, history_key = jax.random.split(key, 4)
    reduced = [(height >> (stages - 1 - clip.stage), width >> (stages - 1 - clip.stage)) for clip in task.history]
    return Randomness(
        noise=jax.random.normal(noise_key, (batch, task.stop - task.start, height, width, channels), jnp.float32),
        u=jax.random.uniform(u_key, (batch,), jnp.float32),
        corruption=jax.random.uniform(corruption_key, (batch,), jnp.float32),
        history=tuple(
            jax.random.normal(
                jax.random.fold_in(history_key, k), (batch, clip.stop - clip.start, *size, channels), jnp.float32
            )
            for k, (clip, size) in enumerate(zip(task.history, reduced, strict=True))
        ),
    )


def training_state(
    schedule: PyramidSchedule, task: Task, latents: jax.Array, randomness: Randomness, corruption_ratio: float = 1 / 3
) -> TrainingState:
    """Training state of a task. Traceable; `schedule` and `task` are static.

    Args:
      schedule: the pyramid.
      task: what is trained.
      latents: clean, at the finest size, [B, T, H, W, C] with T >= task.stop.
      randomness: `draw_randomness(...)` or given arrays.
      corruption_ratio: r (3), the largest share of noise in the history.

    Raises:
      UserError: the latents have too few frames, or the task's stage does not exist.
    """
    schedule.flow_range(task.stage)
    if latents.shape[1] < task.stop:
        raise UserError(f"the task needs {task.stop} latent frames and there are {latents.shape[1]}: use longer videos")
    pyramid = latent_pyramid(latents, schedule.stages)
    current = [level[:, task.start : task.stop] for level in pyramid]
    path = paths.stage_path(
        schedule,
        task.stage,
        noise_pyramid(randomness.noise, schedule.stages)[task.stage],
        current[task.stage],
        current[task.stage - 1] if task.stage else None,
    )
    sigma, timestep = table_entries(schedule, task.stage, randomness.u)
    strength = randomness.corruption * corruption_ratio
    clips = zip(history_clips(pyramid, task.history), randomness.history, strict=True)
    return TrainingState(
        history=tuple(corrupt(clip, noise, strength) for clip, noise in clips),
        noisy=paths.point(path, sigma),
        target=paths.velocity(path),
        sigma=sigma,
        timestep=timestep,
    )


def table_entries(schedule: PyramidSchedule, stage: int, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(t, τ) (1), float32 [B] each, for u [B] in [0, 1)."""
    count = schedule.num_train_timesteps
    index = jnp.clip(jnp.floor(u * count).astype(jnp.int32), 0, count - 1)
    return jnp.asarray(schedule.sigmas, jnp.float32)[index], jnp.asarray(schedule.timesteps[stage])[index]


def corrupt(clip: jax.Array, noise: jax.Array, strength: jax.Array) -> jax.Array:
    """h (4) from a clean clip, noise of its shape [B, T, h, w, C], and σ_c [B]."""
    share = paths.per_sample(strength, clip)
    return share * noise + (1 - share) * clip


def columns_to_stage(sample_ratios: Sequence[int]) -> tuple[int, ...]:
    """Stage of every column of a packed batch: (1, 2, 1) -> (0, 1, 1, 2). Column k holds the samples k::columns.

    Raises:
      UserError: a ratio is negative, or all are 0.
    """
    if min(sample_ratios, default=-1) < 0 or not any(sample_ratios):
        raise UserError(f"sample_ratios {tuple(sample_ratios)}: give one count per stage, at least one positive")
    return tuple(stage for stage, count in enumerate(sample_ratios) for _ in range(count))


def interleave(columns: Sequence[jax.Array]) -> jax.Array:
    """[b] per column -> [b * columns]: row b * columns + k is sample b of column k, as the text rows are ordered."""
    return jnp.stack(columns, axis=1).reshape(-1)


def most_units(latent_frames: int, frames_per_unit: int = 1) -> int:
    """M (5): the first frame is a unit of its own, then every `frames_per_unit` that fit."""
    return 1 + (latent_frames - 1) // frames_per_unit


def units_per_stage(
    counter: int, stages: int, max_units: int, available_units: int, sync_group: int = 1, rank: int = 0
) -> tuple[int, ...]:
    """Number of units of every stage, coarsest first, (5) and (6), at most `available_units`.

    The task of a stage is the last of its units.

    Args:
      counter: n, the step's number.
      stages: S.
      max_units: M, of the longest videos in training.
      available_units: of the videos at hand.
      sync_group: G, at most M.
      rank: q, the worker's number.

    Raises:
      UserError: the group is empty or larger than M.
    """
    if not 1 <= sync_group <= max_units:
        raise UserError(f"sync_group is {sync_group}: give 1 to {max_units}, the largest number of units")
    finest = 1 + rank % sync_group + counter % (max_units // sync_group) * sync_group
    units = (max(1 + max_units - finest, 1),) * (stages - 1) + (finest,)
    return tuple(min(count, available_units) for count in units)
