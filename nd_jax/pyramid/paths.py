"""The flow path of a stage, and the clean latents that a velocity implies.

z_i are the clean latents at stage i, ε_i its noise, U(.) nearest upsampling, Down(.) halving (`noise`), s_i and e_i the
start and end sigma (`schedule`), t in [0, 1] the stage-local sigma.

    y_start = s_i ε_i + (1 - s_i) U(z_{i-1})                      stage 0: y_start = ε_0, s_0 = 1    (1)
    y_end   = e_i ε_i + (1 - e_i) z_i                             last stage: y_end = z_i, e = 0     (2)
    y(t)    = t y_start + (1 - t) y_end                                                              (3)
    v       = y_start - y_end = dy/dt                             target velocity                    (4)
    σ(t)    = t s_i + (1 - t) e_i                                 share of noise in y(t)             (5)
    z~      = y - σ(t) / (s_i - e_i) v                            to where the noise share is 0      (6)
            = [s_i (1 - e_i) z_i - e_i (1 - s_i) U(z_{i-1})] / (s_i - e_i)  on the exact path        (7)
    z_i     = (y - t v - e_i ε_i) / (1 - e_i)                     from the end of the stage          (8)

(1) and (2) use the same ε_i: the path is straight from one stage's start to its end. (6) is the clean prediction of
pyramidal DMD (Neodragon, arXiv 2511.06055, section on step distillation). By (7) it equals z_i only at stages with
s_i = 1 or e_i = 0, thus at the first and the last; between, it is a sharpened z_i. (8) is z_i everywhere, but needs
ε_i, which is known in training only. (1) to (4): Pyramid-Flow, arXiv 2410.05954, section 3.2.

Shapes: [B, T, H, W, C], channel-last; t [B]; one float dtype.
"""

import flax
import jax

from nd_jax.errors import UserError
from nd_jax.pyramid.noise import halve, upsample
from nd_jax.pyramid.schedule import PyramidSchedule


@flax.struct.dataclass
class StagePath:
    """A straight path, t = 1 at `start` and t = 0 at `end`, both [B, T, H, W, C]."""

    start: jax.Array
    end: jax.Array


def per_sample(values: jax.Array, like: jax.Array) -> jax.Array:
    """[B] -> [B, 1, ..., 1] of the rank of `like`."""
    return values.reshape(values.shape[0], *(1,) * (like.ndim - 1))


def path_start(schedule: PyramidSchedule, stage: int, noise: jax.Array, coarser: jax.Array | None) -> jax.Array:
    """y_start (1).

    Args:
      schedule, stage: give s_i.
      noise: ε_i, [B, T, H, W, C].
      coarser: z_{i-1}, [B, T, H / 2, W / 2, C]; None at stage 0, which has none.

    Raises:
      UserError: `coarser` is there at stage 0, or missing at another, or not half as large as the noise.
    """
    start, _ = schedule.flow_range(stage)
    if (coarser is None) != (stage == 0):
        raise UserError(f"stage {stage}: stage 0 starts from noise alone, every other one from coarser latents too")
    if coarser is None:
        return noise
    upsampled = upsample(coarser)
    if upsampled.shape != noise.shape:
        raise UserError(
            f"stage {stage} has latents of {noise.shape} and coarser ones of {coarser.shape}: "
            f"use frames whose latent sides are multiples of {2 ** (schedule.stages - 1)}"
        )
    return start * noise + (1 - start) * upsampled


def path_end(schedule: PyramidSchedule, stage: int, noise: jax.Array, clean: jax.Array) -> jax.Array:
    """y_end (2) from ε_i and z_i, both [B, T, H, W, C]."""
    _, end = schedule.flow_range(stage)
    return end * noise + (1 - end) * clean


def stage_path(
    schedule: PyramidSchedule, stage: int, noise: jax.Array, clean: jax.Array, coarser: jax.Array | None
) -> StagePath:
    """The path (1), (2) of a stage; arguments as in `path_start` and `path_end`."""
    return StagePath(path_start(schedule, stage, noise, coarser), path_end(schedule, stage, noise, clean))


def renoised_path(schedule: PyramidSchedule, stage: int, noise: jax.Array, clean: jax.Array) -> StagePath:
    """A fresh path (1), (2) around a clean prediction alone, with U(Down(z~)) in the place of U(z_{i-1}).

    Args:
      schedule, stage: as before.
      noise: fresh ε_i, [B, T, H, W, C].
      clean: z~, [B, T, H, W, C].
    """
    return stage_path(schedule, stage, noise, clean, halve(clean) if stage else None)


def point(path: StagePath, t: jax.Array) -> jax.Array:
    """y(t) (3), [B, T, H, W, C], at t [B]."""
    t = per_sample(t, path.start)
    return t * path.start + (1 - t) * path.end


def velocity(path: StagePath) -> jax.Array:
    """v (4), [B, T, H, W, C]: the target of the network everywhere on the path."""
    return path.start - path.end


def noise_share(schedule: PyramidSchedule, stage: int, t: jax.Array) -> jax.Array:
    """σ(t) (5), [B]."""
    start, end = schedule.flow_range(stage)
    return t * start + (1 - t) * end


def extrapolated_clean(
    schedule: PyramidSchedule, stage: int, state: jax.Array, t: jax.Array, velocity: jax.Array
) -> jax.Array:
    """Clean prediction in the paper's form (6): what (7) says where the velocity is exact.

    Args:
      schedule, stage: give s_i and e_i.
      state: y(t), [B, T, H, W, C].
      t: [B].
      velocity: a network's, of the state's shape.
    """
    start, end = schedule.flow_range(stage)
    return state - per_sample(noise_share(schedule, stage, t) / (start - end), state) * velocity


def exact_clean(
    schedule: PyramidSchedule, stage: int, state: jax.Array, t: jax.Array, velocity: jax.Array, noise: jax.Array
) -> jax.Array:
    """Clean prediction in the exact form (8): z_i where the velocity is exact.

    Args:
      schedule, stage: give e_i.
      state: y(t), [B, T, H, W, C].
      t: [B].
      velocity: a network's, of the state's shape.
      noise: ε_i that the state was made with.
    """
    _, end = schedule.flow_range(stage)
    return (state - per_sample(t, state) * velocity - end * noise) / (1 - end)
