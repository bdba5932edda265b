"""Token layout: order, positions, masks and envelopes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.errors import UserError
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.positions import position_table, position_window
from nd_jax.pyramid.layout import (
    ClipShape,
    VideoSize,
    pad_layout,
    patchify,
    stack_geometries,
    token_layout,
    unpatchify,
    video_layouts,
)

TINY = MMDiTConfig(sample_size=16, attention_head_dim=4, num_attention_heads=2, pos_embed_max_size=12)
TEXT_MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
HISTORY = [(2, 4, 4), (1, 8, 8), (1, 16, 16), (2, 16, 16)]

clip_lists = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 8]), st.sampled_from([2, 6])), min_size=1, max_size=4
)


def test_envelopes_of_the_product_video():
    """18 (unit, stage) shapes behind the first frame share three lengths; the first frame has its own."""
    layouts = video_layouts(MMDiTConfig(), VideoSize(), 128)
    assert len(layouts) == 21
    assert [layouts[0, stage].length for stage in range(3)] == [168, 288, 768]
    assert {(unit, layouts[unit, 0].length) for unit in range(1, 7)} == {(unit, 408) for unit in range(1, 7)}
    assert {layouts[unit, 1].length for unit in range(1, 7)} == {648}
    assert {layouts[unit, 2].length for unit in range(1, 7)} == {1728}
    assert [layouts[6, stage].padding for stage in range(3)] == [0, 0, 0]
    assert layouts[3, 2].clips == ((1, 10, 16), (1, 20, 32), (1, 40, 64), (1, 40, 64))
    assert layouts[3, 1].output_tokens == 160


def test_units_of_two_frames():
    video = VideoSize(latent_frames=5, height=16, width=16, frames_per_unit=2)
    assert video.units == 3
    assert video.unit_clips(0, 1) == ((1, 8, 8),)
    assert video.unit_clips(2, 1) == ((1, 4, 4), (2, 8, 8), (2, 8, 8))


@given(clip_lists, st.integers(1, 5), st.integers(0, 7), st.data())
def test_the_mask_says_who_sees_whom(clips, text_length, padding, data):
    """Token by token, from frame numbers counted by hand."""
    layout = token_layout(TINY, clips, text_length)
    layout = pad_layout(layout, layout.length + padding)
    text_mask = np.array([data.draw(st.lists(st.integers(0, 1), min_size=text_length, max_size=text_length))])
    mask = layout.geometry(text_mask).mask.dense()
    assert mask.dtype == bool and mask.shape == (1, 1, layout.length, layout.length)

    tokens = [("text" if valid else "padded text", 0) for valid in text_mask[0]] + [("padding", 0)] * padding
    frame = 0
    for frames, height, width in clips:
        for _ in range(frames):
            tokens += [("image", frame)] * (height * width // 4)
            frame += 1
    real = ("text", "image")
    for i, (query, query_frame) in enumerate(tokens):
        for k, (key, key_frame) in enumerate(tokens):
            together = query == key or (query in real and key in real)
            assert mask[0, 0, i, k] == (together and query_frame >= key_frame)


def test_padding_is_unseen_and_stands_in_front_of_the_history():
    plain = token_layout(TINY, HISTORY, 4)
    padded = pad_layout(plain, plain.length + 5)
    real = np.r_[0:4, 9 : padded.length]
    one, other = plain.geometry(TEXT_MASK), padded.geometry(TEXT_MASK)
    mask = other.mask.dense()
    assert np.array_equal(mask[:, :, real][..., real], one.mask.dense())
    assert not mask[:, :, real, 4:9].any() and mask.any(axis=-1).all()
    for name in ("positions", "rotary_cos", "rotary_sin"):
        assert np.array_equal(getattr(other, name)[:, 5:], getattr(one, name))
    assert padded.output_tokens == plain.output_tokens == 128
    with pytest.raises(UserError, match=r"does not fit an envelope of 10: choose a larger envelope"):
        pad_layout(plain, 10)


def test_a_device_mask_equals_the_host_mask():
    import jax

    layout = token_layout(TINY, HISTORY, 4)
    host = layout.geometry(TEXT_MASK).mask.dense()
    device = jax.jit(lambda mask: layout.geometry(mask).mask.dense())(TEXT_MASK)
    assert isinstance(host, np.ndarray) and np.array_equal(device, host)
    with pytest.raises(ValueError, match="text mask of 3 tokens in a layout for 4"):
        layout.geometry(TEXT_MASK[:, :3])


def test_samples_of_unlike_units_share_a_batch():
    video = VideoSize(latent_frames=4, height=16, width=16)
    layouts = video_layouts(TINY, video, 4)
    stacked = stack_geometries([layouts[unit, 1].geometry(TEXT_MASK[:1]) for unit in (1, 3)])
    assert stacked.mask.dense().shape[0] == stacked.positions.shape[0] == 2
    assert np.array_equal(stacked.rotary_cos[1], layouts[3, 1].rotary_cos)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3]), st.integers(1, 3))
def test_patches_are_rows_of_rows_columns_channels(frames, rows, columns, patch, channels):
    shape = ClipShape(frames, rows * patch, columns * patch)
    clip = np.arange(2 * np.prod(shape) * channels).reshape(2, *shape, channels)
    tokens = patchify(clip, patch)
    assert np.array_equal(unpatchify(tokens, shape, patch), clip)
    last = clip[1, -1, -patch:, -patch:]
    assert np.array_equal(tokens[1, -1], last.reshape(-1)) and tokens.shape[1] == frames * rows * columns


def test_packing_keeps_the_order_of_the_layout():
    layout = token_layout(TINY, [(1, 2, 2), (1, 4, 4)], 3)
    layout = pad_layout(layout, layout.length + 2)
    clips = [np.full((1, *shape, 2), value, np.float32) for shape, value in zip(layout.clips, (1, 2), strict=True)]
    assert np.asarray(layout.pack(clips))[0, :, 0].tolist() == [0, 0, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="in a layout for"):
        layout.pack(clips[::-1])


def test_windows_are_cut_from_the_centre_and_resized():
    table = position_table(TINY).reshape(12, 12, 8)
    window = position_window(TINY, (8, 12), (8, 12)).reshape(4, 6, 8)
    assert np.array_equal(window, table[4:8, 3:9])
    # At half the size a place lies between two of the window's, at a quarter between the central two of four.
    half = position_window(TINY, (4, 6), (8, 12)).reshape(2, 3, 8)
    np.testing.assert_allclose(half, window.reshape(2, 2, 3, 2, 8).mean((1, 3)), rtol=0, atol=1e-6)
    quarter = position_window(TINY, (2, 4), (8, 16)).reshape(1, 2, 8)
    wide = position_window(TINY, (8, 16), (8, 16)).reshape(4, 8, 8)
    np.testing.assert_allclose(quarter[0, 1], wide[1:3, 5:7].mean((0, 1)), rtol=0, atol=1e-6)
    # History takes the window of the current clip, not its own.
    layout = token_layout(TINY, [(1, 4, 6), (1, 8, 12)], 0)
    assert np.array_equal(layout.positions[:6], half.reshape(6, 8))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: token_layout(TINY, [(1, 3, 4)], 0), "cannot be cut into patches of 2 x 2"),
        (lambda: token_layout(TINY, [(0, 4, 4)], 0), "cannot be cut"),
        (lambda: token_layout(TINY, [(1, 26, 4)], 0), "needs 13 positions along an axis and the model's table has 12"),
        (lambda: VideoSize(height=42), "cannot be halved 2 times"),
        (lambda: VideoSize(latent_frames=4, frames_per_unit=2), "choose 1 [+] a multiple of 2"),
    ],
)
def test_bad_sizes_are_named(make, says):
    with pytest.raises(UserError, match=says):
        make()
