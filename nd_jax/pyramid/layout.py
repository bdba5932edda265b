"""Where every token of a call to the video transformer comes from and which tokens it sees; on the host, in numpy.

A call sees the text and a list of clips, the history oldest and coarsest first, then the current clip. In tokens:

    [text (T) | padding (P) | clip 0 | clip 1 | ... | current clip],  image tokens frame by frame, row by row     (1)
    time id = latent frame counted over all clips, which is the absolute frame; text and padding 0                (2)
    group   = 1 for valid text and images, 0 for padded text, 2 for image padding                                 (3)
    query sees key  iff  time(query) >= time(key) and group(query) = group(key)                                   (4)

By (4) neither text nor history sees the current frame once there is history, and text sees only the first frame. No
real token sees padding, so padding changes no real token: a layout can be padded to an ENVELOPE, a length that many
(unit, stage) shapes share, and one compiled program serves them all. Padding stands in front of the history, so that
the current clip is always at the end.

Trainer, sampler and exporter all take their token order, positions and masks from here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError
from nd_jax.models.attention import OrderedMask
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.mmdit_block import TokenGeometry
from nd_jax.models.positions import position_window, rotary_table
from nd_jax.pyramid.history import HistoryClip, history_plan, unit_frames

PADDED_TEXT, REAL, PADDED_IMAGE = 0, 1, 2


class ClipShape(NamedTuple):
    """One latent clip, in latent frames and latent pixels."""

    latent_frames: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLayout:
    """Everything (1) to (3) say about one list of clips.

    Attributes:
      clips: history, then the current clip.
      text_length: T.
      padding: P, image tokens in front of the history that stand for nothing.
      patch_size: p, latent pixels along a patch's side.
      time_ids: int32 [T + N], equation 2; N counts the padding.
      positions: float32 [N, D], spatial positions; 0 for padding.
      rotary_cos, rotary_sin: float32 [N, K / 2], rotation by the time ids.
    """

    clips: tuple[ClipShape, ...]
    text_length: int
    padding: int
    patch_size: int
    time_ids: np.ndarray
    positions: np.ndarray
    rotary_cos: np.ndarray
    rotary_sin: np.ndarray

    @property
    def length(self) -> int:
        """T + N, the length of attention."""
        return len(self.time_ids)

    @property
    def image_length(self) -> int:
        """N, padding included."""
        return len(self.time_ids) - self.text_length

    @property
    def output_tokens(self) -> int:
        """M, tokens of the current clip: the last ones."""
        return clip_tokens(self.clips[-1], self.patch_size)

    @property
    def last_seen(self) -> np.ndarray:
        """int32 [T + N], place of the last token that (4) lets a token see, among those of its group."""
        # Time ids rise. Padding is at time 0 like the first frame, but in a group of its own.
        last = np.searchsorted(self.time_ids, self.time_ids, side="right").astype(np.int32) - 1
        last[self.text_length :][: self.padding] = self.text_length + self.padding - 1
        return last

    @property
    def current_unseen(self) -> bool:
        """Whether (4) hides the current clip from text and history, as it does once there is a history."""
        return len(self.clips) > 1

    def groups(self, text_mask: Any) -> Any:
        """Equation 3: text mask [B, T], 1 for valid -> int32 [B, T + N]. Takes numpy or JAX arrays and gives the same.

        Raises:
          ValueError: the mask has another text length.
        """
        if text_mask.shape[-1] != self.text_length:
            raise ValueError(f"text mask of {text_mask.shape[-1]} tokens in a layout for {self.text_length}")
        xp = jnp if isinstance(text_mask, jax.Array) else np
        image = np.full(self.image_length, REAL, np.int32)
        image[: self.padding] = PADDED_IMAGE
        image = xp.broadcast_to(xp.asarray(image)[None], (text_mask.shape[0], self.image_length))
        # PADDED_TEXT and REAL are the values of a text mask.
        return xp.concatenate([(text_mask > 0).astype(np.int32), image], axis=1)

    def geometry(self, text_mask: Any) -> TokenGeometry:
        """What the transformer takes: positions, rotation and `last_seen` with a batch axis of 1, groups of [B].

        For a numpy mask everything is numpy.
        """
        mask = OrderedMask(self.last_seen[None], self.groups(text_mask))
        return TokenGeometry(self.positions[None], self.rotary_cos[None], self.rotary_sin[None], mask)

    def pack(self, clips: Sequence[jax.Array]) -> jax.Array:
        """The image tokens of (1): clips [B, t, h, w, C] in this layout's order -> [B, N, p * p * C].

        Raises:
          ValueError: the clips are not those of the layout.
        """
        shapes = tuple(ClipShape(*clip.shape[1:4]) for clip in clips)
        if shapes != self.clips:
            raise ValueError(f"clips of {shapes} in a layout for {self.clips}")
        tokens = [patchify(clip, self.patch_size) for clip in clips]
        front = jnp.zeros((tokens[0].shape[0], self.padding, tokens[0].shape[2]), tokens[0].dtype)
        return jnp.concatenate([front, *tokens], axis=1)

    def unpack(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, M, p * p * C] of the current clip -> [B, t, h, w, C]."""
        return unpatchify(tokens, self.clips[-1], self.patch_size)


def token_layout(config: MMDiTConfig, clips: Sequence[tuple[int, int, int]], text_length: int) -> TokenLayout:
    """Layout of a list of clips without padding.

    Args:
      config: of the transformer; patch size, head width and table sizes matter.
      clips: (latent frames, height, width) of the history, oldest and coarsest first, then of the current clip.
      text_length: number of text tokens, padded ones included.

    Raises:
      UserError: a clip is empty or no multiple of the patch, or the current one is larger than the spatial table.
    """
    clips = tuple(ClipShape(*clip) for clip in clips)
    patch = config.patch_size
    for clip in clips:
        if min(clip) < 1 or clip.height % patch or clip.width % patch:
            raise UserError(
                f"a clip of {clip.latent_frames} x {clip.height} x {clip.width} latent frames, rows and columns cannot "
                f"be cut into patches of {patch} x {patch}: choose a size that every stage divides"
            )
    window = clips[-1][1:]
    # The distinct sizes are few, their frames many.
    frame_positions = {size: position_window(config, size, window) for size in {clip[1:] for clip in clips}}
    positions = [np.tile(frame_positions[clip[1:]], (clip.latent_frames, 1)) for clip in clips]
    per_frame = [clip.height * clip.width // patch**2 for clip in clips for _ in range(clip.latent_frames)]
    image_time = np.repeat(np.arange(len(per_frame), dtype=np.int32), per_frame)
    cos, sin = rotary_table(image_time, config.attention_head_dim)
    return TokenLayout(
        clips=clips,
        text_length=text_length,
        padding=0,
        patch_size=patch,
        time_ids=np.concatenate([np.zeros(text_length, np.int32), image_time]),
        positions=np.concatenate(positions),
        rotary_cos=cos,
        rotary_sin=sin,
    )


def pad_layout(layout: TokenLayout, length: int) -> TokenLayout:
    """The layout with padding in front of the history, `length` tokens long, text included.

    Raises:
      UserError: the layout is longer than that.
    """
    more = length - layout.length
    if more < 0:
        raise UserError(
            f"a layout of {layout.length} tokens does not fit an envelope of {length}: choose a larger envelope, a "
            "smaller frame or a shorter history"
        )
    text = layout.text_length
    front = lambda array, value: np.concatenate([np.full((more, *array.shape[1:]), value, array.dtype), array])
    return dataclasses.replace(
        layout,
        padding=layout.padding + more,
        time_ids=np.concatenate([layout.time_ids[:text], front(layout.time_ids[text:], 0)]),
        positions=front(layout.positions, 0),
        rotary_cos=front(layout.rotary_cos, 1),
        rotary_sin=front(layout.rotary_sin, 0),
    )


def stack_geometries(geometries: Sequence[TokenGeometry]) -> TokenGeometry:
    """Geometries of one length for a batch whose samples have unlike layouts: joined on axis 0."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *geometries)


def clip_tokens(clip: ClipShape, patch_size: int) -> int:
    """Number of patches of a clip."""
    return math.prod(clip) // patch_size**2


def patchify(clip: jax.Array, patch_size: int) -> jax.Array:
    """[B, t, h, w, C] -> [B, t h w / p^2, p * p * C], a patch flattened as (row, column, channel)."""
    b, t, h, w, c = clip.shape
    p = patch_size
    patches = clip.reshape(b, t, h // p, p, w // p, p, c).transpose(0, 1, 2, 4, 3, 5, 6)
    return patches.reshape(b, t * (h // p) * (w // p), p * p * c)


def unpatchify(tokens: jax.Array, clip: ClipShape, patch_size: int) -> jax.Array:
    """The inverse of `patchify` for a clip's shape."""
    (t, h, w), p = clip, patch_size
    patches = tokens.reshape(tokens.shape[0], t, h // p, w // p, p, p, -1).transpose(0, 1, 2, 4, 3, 5, 6)
    return patches.reshape(tokens.shape[0], t, h, w, patches.shape[-1])


# --- clips and envelopes of a video -----------------------------------------------------------------------------------


def clip_shapes(
    plan: Sequence[HistoryClip], frames: int, stage: int, height: int, width: int, stages: int = 3
) -> tuple[ClipShape, ...]:
    """Shapes of a history and of a current clip of `frames` latent frames at `stage`.

    Args:
      plan: `history.history_plan(...)`.
      frames: latent frames of the current clip.
      stage: 0 is the coarsest.
      height, width: of the finest stage, latent pixels.
      stages: number of stages; each halves the size of the next.
    """
    shape = lambda count, at: ClipShape(count, height >> (stages - 1 - at), width >> (stages - 1 - at))
    return (*(shape(clip.stop - clip.start, clip.stage) for clip in plan), shape(frames, stage))


@dataclasses.dataclass(frozen=True)
class VideoSize:
    """A video as the autoregressive pyramid sees it; the default is 49 frames of 320 x 512.

    Attributes:
      latent_frames: of the whole video.
      height, width: of the finest stage, latent pixels.
      stages: number of stages.
      frames_per_unit: latent frames generated at once; the first unit is one frame.
    """

    latent_frames: int = 7
    height: int = 40
    width: int = 64
    stages: int = 3
    frames_per_unit: int = 1

    def __post_init__(self):
        coarsest = 2 ** (self.stages - 1)
        if self.stages < 1 or self.height % coarsest or self.width % coarsest:
            raise UserError(
                f"latents of {self.height} x {self.width} cannot be halved {self.stages - 1} times: choose a video "
                f"whose height and width are multiples of {coarsest} latent pixels, or fewer stages"
            )
        if self.latent_frames < 1 or (self.latent_frames - 1) % self.frames_per_unit:
            raise UserError(
                f"{self.latent_frames} latent frames are no first frame and units of {self.frames_per_unit}: choose "
                f"1 + a multiple of {self.frames_per_unit}"
            )

    @property
    def units(self) -> int:
        """Number of units, the first frame included."""
        return 1 + (self.latent_frames - 1) // self.frames_per_unit

    def unit_clips(self, unit: int, stage: int) -> tuple[ClipShape, ...]:
        """History and current clip of a unit at a stage."""
        start, stop = unit_frames(unit, self.frames_per_unit)
        plan = history_plan(start, stage, self.frames_per_unit)
        return clip_shapes(plan, stop - start, stage, self.height, self.width, self.stages)


def video_layouts(config: MMDiTConfig, video: VideoSize, text_length: int) -> dict[tuple[int, int], TokenLayout]:
    """(unit, stage) -> layout, padded to that stage's envelope.

    The envelope of a stage is its longest layout; for the default video and 128 text tokens they are 408, 648 and 1728
    tokens. The first unit has no history and keeps its own, much shorter length (168, 288, 768).
    """
    layouts = {
        (unit, stage): token_layout(config, video.unit_clips(unit, stage), text_length)
        for unit in range(video.units)
        for stage in range(video.stages)
    }
    envelope = [max(layouts[unit, stage].length for unit in range(video.units)) for stage in range(video.stages)]
    return {key: layout if key[0] == 0 else pad_layout(layout, envelope[key[1]]) for key, layout in layouts.items()}
