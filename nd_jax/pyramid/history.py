"""Which clean frames a unit is conditioned on, and at which resolution.

Latent frames are generated in units of F frames. With P frames before the current unit, counted from 0, its condition
at stage i is a list of clips, oldest first:

    clip j behind the newest:  frames [P - (j+1) F, P - j F)  at stage i - j,  while j = 0 or i - j > 0   (1)
    all remaining older frames in one clip                    at stage 0                                 (2)

so stage 0 sees [everything older, the newest unit], both at the coarsest size, and a unit without history has no clips.
Clips of (1) are cut at frame 0. Source: `_prepare_past_condition_latents` of the public Neodragon code; Pyramid-Flow,
arXiv 2410.05954, section 3.3.

Computed on the host from numbers alone: the result is static, and the arrays are slices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from nd_jax.errors import UserError


class HistoryClip(NamedTuple):
    """Frames `start` to `stop` (exclusive) of the video at the resolution of `stage`."""

    start: int
    stop: int
    stage: int


def history_plan(past_frames: int, stage: int, frames_per_unit: int = 1) -> tuple[HistoryClip, ...]:
    """Clips (1), (2) of a unit with `past_frames` = P frames before it, oldest first.

    Raises:
      UserError: a number is out of range.
    """
    if past_frames < 0 or stage < 0 or frames_per_unit < 1:
        raise UserError(
            f"history of {past_frames} frames at stage {stage} in units of {frames_per_unit}: "
            "frames and stage start at 0, units at 1"
        )
    clips, stop, at = [], past_frames, stage
    while stop > 0 and (at > 0 or not clips):
        start = max(stop - frames_per_unit, 0)
        clips.append(HistoryClip(start, stop, at))
        stop, at = start, at - 1
    if stop > 0:
        clips.append(HistoryClip(0, stop, 0))
    return tuple(reversed(clips))


def unit_frames(unit: int, frames_per_unit: int = 1) -> tuple[int, int]:
    """First frame of a unit and the one after its last; unit 0 is the first frame alone, whatever F is.

    Raises:
      UserError: a number is out of range.
    """
    if unit < 0 or frames_per_unit < 1:
        raise UserError(f"unit {unit} of {frames_per_unit} frames: count units from 0, with one frame or more each")
    return (0 if unit == 0 else 1 + (unit - 1) * frames_per_unit), 1 + unit * frames_per_unit


def history_clips(pyramid: Sequence[jax.Array], plan: Sequence[HistoryClip]) -> tuple[jax.Array, ...]:
    """The clips of a plan as arrays.

    Args:
      pyramid: clean latents of every stage, coarsest first, each [B, T, h, w, C] (`noise.latent_pyramid`).
      plan: `history_plan(...)`.

    Returns:
      [B, stop - start, h, w, C] for every clip, oldest first.

    Raises:
      UserError: the plan needs a stage or a frame that the pyramid does not have.
    """
    for clip in plan:
        if clip.stage >= len(pyramid) or clip.stop > pyramid[clip.stage].shape[1]:
            frames = pyramid[-1].shape[1]
            raise UserError(f"{clip} is not in latents of {len(pyramid)} stages and {frames} frames: give more of them")
    return tuple(pyramid[clip.stage][:, clip.start : clip.stop] for clip in plan)
