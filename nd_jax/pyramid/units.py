"""Batches whose rows train unlike units: one compiled program serves all of them.

`training` describes one task as static numbers; here the unit is an array. For a stage i, all clean tokens of a sample
that any unit may see lie in one bank, and a table per unit says where its tokens are in it:

    bank(z)     = [0 | tokens of z_0 | tokens of z_1 | ... | tokens of z_i],  frame by frame               (1)
    clean(u)    = bank[index[u]],   the history of unit u in its layout's order, padding first             (2)
    h           = σ_c η + (1 - σ_c) clean(u),   η ~ N(0, I),  one strength per sample                      (3)
    y, v        = point and velocity of unit u's path at stage i                                           (4)

(2) to (4) give what `training.training_state` gives for the task (i, u), in tokens: no frame is in two clips of a
history, so noise per token and noise per clip are the same. Positions come out of a small bank of their own in the
same way, so that no table of the size of a batch's geometry is a constant of the program.

With coupling "independent" the two ends of a path have noise of their own. That is the wrong objective, kept for
comparison: each stage then learns a flow of its own whose end is not where the next stage starts.

One unit is one latent frame, as in the released models. Shapes: [B, T, H, W, C] latents, [B, N, D] tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError
from nd_jax.models.attention import OrderedMask
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.mmdit_block import TokenGeometry
from nd_jax.models.positions import position_window, rotary_table
from nd_jax.pyramid import paths
from nd_jax.pyramid.history import history_plan
from nd_jax.pyramid.layout import (
    ClipShape,
    VideoSize,
    clip_tokens,
    pad_layout,
    patchify,
    token_layout,
    unpatchify,
)
from nd_jax.pyramid.noise import latent_pyramid, noise_pyramid
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.pyramid.training import table_entries

COUPLINGS = ("shared", "independent")


@dataclasses.dataclass(frozen=True, eq=False)
class StageUnits:
    """Every unit of a video at one stage, padded to the longest; see `stage_units`.

    N counts history tokens with padding and the M tokens of the current frame, which come last.

    Attributes:
      stage: i.
      size: the stage's frame, in latents.
      patch_size: latent pixels along a patch's side.
      index: int32 [units, N - M], equation 2; 0 is padding.
      position_index: int32 [units, N], into `positions`; 0 is padding.
      positions: float32 [P, D], zeros first, then one frame of every stage's size.
      time_ids, last_seen: int32 [units, T + N], of text and images (`layout.TokenLayout`).
      image_groups: int32 [units, N], of the images (`layout.TokenLayout.groups`).
      rotary_cos, rotary_sin: float32 [latent frames, K / 2], by time id.
    """

    stage: int
    size: ClipShape
    patch_size: int
    index: np.ndarray
    position_index: np.ndarray
    positions: np.ndarray
    time_ids: np.ndarray
    last_seen: np.ndarray
    image_groups: np.ndarray
    rotary_cos: np.ndarray
    rotary_sin: np.ndarray

    @property
    def output_tokens(self) -> int:
        """M."""
        return clip_tokens(self.size, self.patch_size)

    def geometry(self, unit_B: jax.Array, text_mask_BT: jax.Array) -> TokenGeometry:
        """What the transformer takes for rows of these units."""
        image_time = jnp.asarray(self.time_ids[:, self.time_ids.shape[1] - self.position_index.shape[1] :])[unit_B]
        groups = jnp.concatenate(
            [(text_mask_BT > 0).astype(jnp.int32), jnp.asarray(self.image_groups)[unit_B]],
            axis=1,
        )
        return TokenGeometry(
            jnp.asarray(self.positions)[jnp.asarray(self.position_index)[unit_B]],
            jnp.asarray(self.rotary_cos)[image_time],
            jnp.asarray(self.rotary_sin)[image_time],
            OrderedMask(jnp.asarray(self.last_seen)[unit_B], groups),
        )

    def clean_history(self, pyramid: Sequence[jax.Array], unit_B: jax.Array) -> jax.Array:
        """Equation 2: the latents' pyramid, coarsest first -> [B, N - M, p * p * C]."""
        levels = [patchify(level, self.patch_size) for level in pyramid[: self.stage + 1]]
        bank = jnp.concatenate([jnp.zeros_like(levels[0][:, :1]), *levels], axis=1)
        return jnp.take_along_axis(bank, jnp.asarray(self.index)[unit_B][..., None], axis=1)

    def unpack(self, tokens_BMC: jax.Array) -> jax.Array:
        """Tokens of the current frame -> [B, 1, h, w, C]."""
        return unpatchify(tokens_BMC, self.size, self.patch_size)


def stage_units(config: MMDiTConfig, video: VideoSize, stage: int, text_length: int) -> StageUnits:
    """Tables of a stage, on the host.

    Raises:
      UserError: units of more than one latent frame.
    """
    if video.frames_per_unit != 1:
        raise UserError(f"units of {video.frames_per_unit} latent frames cannot share a batch: use frames_per_unit 1")
    size = lambda at: (video.height >> (video.stages - 1 - at), video.width >> (video.stages - 1 - at))
    per_frame = [clip_tokens(ClipShape(1, *size(at)), config.patch_size) for at in range(video.stages)]
    layouts = [token_layout(config, video.unit_clips(u, stage), text_length) for u in range(video.units)]
    length = max(layout.length for layout in layouts)
    layouts = [pad_layout(layout, length) for layout in layouts]

    # Where a stage's tokens start: in the bank of clean tokens, and in the bank of positions.
    bank_start = 1 + np.cumsum([0, *(n * video.latent_frames for n in per_frame[:stage])])
    position_start = 1 + np.cumsum([0, *per_frame[:stage]])
    index, position_index = [], []
    for unit, layout in enumerate(layouts):
        clips = history_plan(unit, stage)
        frames = [(clip.stage, frame) for clip in clips for frame in range(clip.start, clip.stop)]
        tokens = [bank_start[at] + frame * per_frame[at] + np.arange(per_frame[at]) for at, frame in frames]
        places = [position_start[at] + np.arange(per_frame[at]) for at in (*(at for at, _ in frames), stage)]
        padding = np.zeros(layout.padding, np.int32)
        index.append(np.concatenate([padding, *tokens]))
        position_index.append(np.concatenate([padding, *places]))
    window = size(stage)
    positions = [position_window(config, size(at), window) for at in range(stage + 1)]
    no_text = np.zeros((1, text_length), np.int32)
    cos, sin = rotary_table(np.arange(video.latent_frames), config.attention_head_dim)
    return StageUnits(
        stage=stage,
        size=ClipShape(1, *window),
        patch_size=config.patch_size,
        index=np.stack(index).astype(np.int32),
        position_index=np.stack(position_index).astype(np.int32),
        positions=np.concatenate([np.zeros_like(positions[0][:1]), *positions]),
        time_ids=np.stack([layout.time_ids for layout in layouts]),
        last_seen=np.stack([layout.last_seen for layout in layouts]),
        image_groups=np.stack([layout.groups(no_text)[0, text_length:] for layout in layouts]),
        rotary_cos=cos,
        rotary_sin=sin,
    )


def frame_of_unit(latents: jax.Array, unit_B: jax.Array) -> jax.Array:
    """The frame of every row's unit, [B, 1, H, W, C], of latents [B, T, H, W, C]."""
    return jnp.take_along_axis(latents, unit_B[:, None, None, None, None], axis=1)


@flax.struct.dataclass
class UnitRandomness:
    """Everything random about a batch of (4) and (3).

    Attributes:
      noise: ε at the finest size, [B, 1, H, W, C].
      end_noise: of the path's end where the coupling is "independent", else None.
      u: [B] in [0, 1), which entry of the stage's table of times.
      corruption: [B] in [0, 1), share of the largest corruption.
      history: η, [B, N - M, p * p * C].
    """

    noise: jax.Array
    end_noise: jax.Array | None
    u: jax.Array
    corruption: jax.Array
    history: jax.Array


def draw_unit_randomness(
    key: jax.Array, units: StageUnits, latents_shape: tuple[int, ...], coupling: str = "shared"
) -> UnitRandomness:
    """Randomness of a batch from a key, float32; `latents_shape` is (B, T, H, W, C) of the clean latents."""
    batch, _, height, width, channels = latents_shape
    keys = jax.random.split(key, 5)
    noise = lambda k: jax.random.normal(k, (batch, 1, height, width, channels), jnp.float32)
    tokens = (batch, units.index.shape[1], units.patch_size**2 * channels)
    return UnitRandomness(
        noise=noise(keys[0]),
        end_noise=noise(keys[4]) if coupling == "independent" else None,
        u=jax.random.uniform(keys[1], (batch,), jnp.float32),
        corruption=jax.random.uniform(keys[2], (batch,), jnp.float32),
        history=jax.random.normal(keys[3], tokens, jnp.float32),
    )


class UnitState(NamedTuple):
    """Input and target of the denoiser for a batch.

    Attributes:
      tokens: [B, N, p * p * C], corrupted history and noisy current frame.
      target: v, [B, M, p * p * C].
      sigma: t, [B], stage-local.
      timestep: τ, [B], what the network is told.
    """

    tokens: jax.Array
    target: jax.Array
    sigma: jax.Array
    timestep: jax.Array


def unit_state(
    schedule: PyramidSchedule,
    units: StageUnits,
    latents: jax.Array,
    unit_B: jax.Array,
    randomness: UnitRandomness,
    corruption_ratio: float = 1 / 3,
    times: tuple[jax.Array, jax.Array] | None = None,
) -> UnitState:
    """Training state of every row (2) to (4). Traceable; `schedule` and `units` are static.

    Args:
      schedule: the pyramid.
      units: tables of the stage.
      latents: clean, at the finest size, [B, T, H, W, C], T that of the tables.
      unit_B: int [B], which latent frame is trained.
      randomness: `draw_unit_randomness(...)` or given arrays.
      corruption_ratio: the largest share of noise in the history.
      times: (t, τ) [B] each, in the place of the entry of the stage's table that `randomness.u` says.
    """
    stage = units.stage
    pyramid = latent_pyramid(latents, schedule.stages)
    current = [frame_of_unit(level, unit_B) for level in pyramid]
    coarser = current[stage - 1] if stage else None
    noise = noise_pyramid(randomness.noise, schedule.stages)[stage]
    path = paths.stage_path(schedule, stage, noise, current[stage], coarser)
    if randomness.end_noise is not None:
        end_noise = noise_pyramid(randomness.end_noise, schedule.stages)[stage]
        path = path.replace(end=paths.path_end(schedule, stage, end_noise, current[stage]))
    sigma, timestep = table_entries(schedule, stage, randomness.u) if times is None else times
    strength = (randomness.corruption * corruption_ratio)[:, None, None]
    history = strength * randomness.history + (1 - strength) * units.clean_history(pyramid, unit_B)
    noisy = patchify(paths.point(path, sigma), units.patch_size)
    return UnitState(
        tokens=jnp.concatenate([history, noisy], axis=1),
        target=patchify(paths.velocity(path), units.patch_size),
        sigma=sigma,
        timestep=timestep,
    )
