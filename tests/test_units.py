"""Batches of unlike units: equal, row by row, to the static training states and layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.pyramid import units as unit_batches
from nd_jax.pyramid.layout import VideoSize, pad_layout, patchify, token_layout
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.pyramid.training import Randomness, autoregressive_task, training_state

CONFIG = MMDiTConfig(
    sample_size=16,
    patch_size=2,
    in_channels=3,
    num_layers=1,
    attention_head_dim=4,
    num_attention_heads=2,
    pos_embed_max_size=8,
    context_embedder=False,
)
VIDEO = VideoSize(latent_frames=4, height=8, width=16)
TEXT = 3
SCHEDULE = PyramidSchedule()


@pytest.mark.parametrize("stage", range(3))
def test_rows_equal_their_own_task(stage):
    """Tokens, targets and geometry of a batch of all units are those of `training_state` and `token_layout`."""
    table = unit_batches.stage_units(CONFIG, VIDEO, stage, TEXT)
    unit = jnp.array([2, 0, 3, 1])
    latents = jax.random.normal(jax.random.key(0), (4, 4, 8, 16, 3))
    randomness = unit_batches.draw_unit_randomness(jax.random.key(1), table, latents.shape)
    state = unit_batches.unit_state(SCHEDULE, table, latents, unit, randomness)
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    geometry = table.geometry(unit, jnp.asarray(mask))
    current = table.output_tokens
    for row, number in enumerate([2, 0, 3, 1]):
        layout = pad_layout(
            token_layout(CONFIG, VIDEO.unit_clips(number, stage), TEXT), TEXT + table.position_index.shape[1]
        )
        history = _clips(randomness.history[row : row + 1, layout.padding :], layout)
        task = autoregressive_task(stage, number)
        expected = training_state(
            SCHEDULE,
            task,
            latents[row : row + 1],
            Randomness(
                randomness.noise[row : row + 1],
                randomness.u[row : row + 1],
                randomness.corruption[row : row + 1],
                history,
            ),
        )
        tokens = layout.pack([*expected.history, expected.noisy])
        real = slice(layout.padding, None)
        np.testing.assert_allclose(state.tokens[row, real], tokens[0, real], atol=1e-6)
        np.testing.assert_allclose(state.target[row], patchify(expected.target, 2)[0], atol=1e-6)
        np.testing.assert_array_equal(state.timestep[row], expected.timestep[0])
        reference = layout.geometry(mask[row : row + 1])
        np.testing.assert_array_equal(geometry.mask.dense()[row], reference.mask.dense()[0])
        for name in ("positions", "rotary_cos", "rotary_sin"):
            np.testing.assert_allclose(getattr(geometry, name)[row], getattr(reference, name)[0], atol=1e-6)
        np.testing.assert_allclose(table.unpack(state.target)[row], expected.target[0], atol=1e-6)
    assert state.target.shape[1] == current


def _clips(tokens, layout):
    """The history's part of noise tokens as clips in the layout's shapes."""
    clips, start = [], 0
    for clip in layout.clips[:-1]:
        count = clip.latent_frames * clip.height * clip.width // 4
        clips.append(unit_batches.unpatchify(tokens[:, start : start + count], clip, 2))
        start += count
    return tuple(clips)


def test_independent_coupling_changes_only_the_end():
    table = unit_batches.stage_units(CONFIG, VIDEO, 1, TEXT)
    latents = jnp.zeros((2, 4, 8, 16, 3))
    unit = jnp.zeros(2, jnp.int32)
    make = lambda coupling: unit_batches.unit_state(
        SCHEDULE,
        table,
        latents,
        unit,
        unit_batches.draw_unit_randomness(jax.random.key(2), table, latents.shape, coupling).replace(u=jnp.zeros(2)),
    )
    shared, independent = make("shared"), make("independent")
    # u = 0 is the start of the path, which both have in common; of clean zeros the target is noise alone.
    np.testing.assert_array_equal(shared.tokens, independent.tokens)
    start, end = SCHEDULE.flow_range(1)
    assert jnp.std(shared.target) == pytest.approx(start - end, rel=0.1)
    assert jnp.std(independent.target) == pytest.approx(np.hypot(start, end), rel=0.1)


def test_units_of_several_frames_are_refused():
    with pytest.raises(UserError, match="frames_per_unit 1"):
        unit_batches.stage_units(CONFIG, VideoSize(5, 8, 16, frames_per_unit=2), 0, TEXT)
