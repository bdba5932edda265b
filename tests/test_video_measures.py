"""PSNR, SSIM and flicker against independent computations, and the loss that is made of SSIM and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nd_jax.distill.perceptual import flicker, gradient_ssim_loss, measure_clips, psnr_db, ssim
from nd_jax.distill.video_vae import gradient_distance

seeds = st.integers(0, 10_000)


def clips(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def plain_ssim(a, b, value_range):
    """One window after the other, in float64, of clips [B, F, H, W, C] in [0, value_range]."""
    distance = np.arange(11) - 5
    window = np.exp(-(distance[:, None] ** 2 + distance[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    tiles = [np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (11, 11), (2, 3)) for x in (a, b)]
    mean_a, mean_b = ((window * x).sum((-2, -1)) for x in tiles)
    centred_a, centred_b = tiles[0] - mean_a[..., None, None], tiles[1] - mean_b[..., None, None]
    over = lambda x: (window * x).sum((-2, -1))
    c1, c2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * over(centred_a * centred_b) + c2)
    value /= (mean_a**2 + mean_b**2 + c1) * (over(centred_a**2) + over(centred_b**2) + c2)
    return value.mean((1, 2, 3, 4))


def waves():
    """Two pictures in [0, 1], [1, 1, 24, 17, 3], whose measures were computed with scikit-image 0.26."""
    row, column, colour = np.meshgrid(np.arange(24), np.arange(17), np.arange(3), indexing="ij")
    a = 0.5 + 0.5 * np.sin(0.7 * row + 0.4 * column * (colour + 1))
    b = np.clip(0.8 * a + 0.1 + 0.15 * np.cos(1.3 * row * column + colour), 0, 1)
    return a[None, None], b[None, None]


def test_measures_are_those_of_scikit_image():
    """structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1,
    channel_axis=2) and peak_signal_noise_ratio(a, b, data_range=1)."""
    a, b = waves()
    for value_range in (1.0, 2.0, 255.0):
        ours_a, ours_b = (jnp.asarray((x - 0.5) * value_range, jnp.float32) for x in (a, b))
        np.testing.assert_allclose(ssim(ours_a, ours_b, value_range), [0.9189377529604462], rtol=1e-5)
        np.testing.assert_allclose(psnr_db(ours_a, ours_b, value_range), [17.858558303996784], rtol=1e-5)
    np.testing.assert_allclose(plain_ssim(a, b, 1.0), [0.9189377529604462], rtol=1e-9)


@given(seeds, st.floats(0.0, 1.0))
def test_ssim_is_equation_2(seed, mix):
    a = clips(seed, 2, 2, 13, 16, 3)
    b = ((1 - mix) * a + mix * clips(seed + 1, 2, 2, 13, 16, 3)).astype(np.float32)
    ours = ssim(jnp.asarray(a), jnp.asarray(b), 2.0)
    np.testing.assert_allclose(ours, plain_ssim(a + 1.0, b + 1.0, 2.0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours, ssim(jnp.asarray(b), jnp.asarray(a), 2.0), rtol=0, atol=1e-6)
    assert float(ours.max()) <= 1 + 1e-6
    np.testing.assert_allclose(ssim(jnp.asarray(a), jnp.asarray(a), 2.0), 1.0, rtol=0, atol=1e-6)


def test_flat_clips_have_the_luminance_term_alone():
    """Catches a luminance that is taken of values around 0, where dark and bright grey would look opposite."""
    a, b = jnp.full((1, 1, 11, 11, 3), -0.5), jnp.full((1, 1, 11, 11, 3), 0.5)
    low, high, c1 = 0.5, 1.5, 0.02**2
    np.testing.assert_allclose(ssim(a, b, 2.0), (2 * low * high + c1) / (low**2 + high**2 + c1), rtol=1e-4)


@given(seeds, st.floats(0.01, 0.5))
def test_psnr_is_equation_1(seed, size):
    a = clips(seed, 3, 2, 4, 5, 3)
    b = a + np.float32(size) * clips(seed + 1, 3, 2, 4, 5, 3)
    expected = 10 * np.log10(4.0 / np.square(a.astype(np.float64) - b).mean((1, 2, 3, 4)))
    np.testing.assert_allclose(psnr_db(jnp.asarray(a), jnp.asarray(b), 2.0), expected, rtol=1e-5)


def test_psnr_of_a_constant_error_and_of_equal_clips():
    a = jnp.zeros((1, 1, 2, 2, 3))
    np.testing.assert_allclose(psnr_db(a, a + 0.2, 2.0), 20.0, rtol=1e-6)
    np.testing.assert_allclose(psnr_db(a, a, 2.0), 300.0, rtol=1e-6)


@given(seeds)
def test_flicker_is_equation_3(seed):
    a, b = clips(seed, 2, 2, 4, 4, 5, 3)
    change = lambda x: np.abs(x[:, 1:].astype(np.float64) - x[:, :-1]).mean((1, 2, 3, 4))
    ours = flicker(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(ours, change(a) - change(b), rtol=0, atol=1e-6)
    np.testing.assert_allclose(flicker(jnp.asarray(b), jnp.asarray(a)), -ours, rtol=0, atol=1e-6)


def test_flicker_sees_unsteadiness_and_no_constant_error():
    still = jnp.broadcast_to(jnp.asarray(clips(0, 1, 1, 4, 4, 3)), (1, 6, 4, 4, 3))
    blinking = still + 0.1 * (jnp.arange(6.0) % 2)[None, :, None, None, None]
    np.testing.assert_allclose(flicker(blinking, still), 0.1, rtol=1e-5)
    np.testing.assert_allclose(flicker(still + 0.1, still), 0.0, atol=1e-6)
    # A reconstruction that loses motion flickers less than its original.
    np.testing.assert_allclose(flicker(still, blinking), -0.1, rtol=1e-5)


@given(seeds, st.integers(1, 2))
@settings(max_examples=5)
def test_loss_is_equation_4(seed, scales):
    a, b = clips(seed, 2, 2, 2, 22, 24, 3)
    expected = np.asarray(gradient_distance(jnp.asarray(a), jnp.asarray(b), scales), np.float64)
    for scale in range(scales):
        size = 2**scale
        coarse = lambda x, size=size: x.reshape(2, 2, 22 // size, size, 24 // size, size, 3).mean((3, 5))
        expected += (1 - plain_ssim(coarse(a) + 1.0, coarse(b) + 1.0, 2.0)) / scales
    np.testing.assert_allclose(gradient_ssim_loss(jnp.asarray(a), jnp.asarray(b), scales), expected, rtol=2e-5)


def test_loss_leads_from_noise_to_the_original():
    """Finite gradients where clips are equal and flat, and plain descent on pixels comes close to the original."""
    video = jnp.asarray(np.kron(clips(0, 1, 2, 6, 6, 3), np.ones((1, 1, 4, 4, 1), np.float32)))
    loss = lambda x: gradient_ssim_loss(x, video, 2).sum()
    grad = jax.jit(jax.grad(loss))
    assert np.isfinite(grad(video)).all() and np.isfinite(grad(jnp.zeros_like(video))).all()
    np.testing.assert_allclose(loss(video), 0.0, atol=1e-5)
    x = jnp.asarray(clips(1, *video.shape))
    before = float(ssim(x, video, 2.0)[0])
    for _ in range(100):
        step = grad(x)
        x = x - 0.02 * step / jnp.abs(step).max()
    assert before < 0.3
    assert float(ssim(x, video, 2.0)[0]) > before + 0.3


def test_bfloat16_clips_are_measured_in_float32():
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in clips(3, 2, 1, 2, 12, 12, 3))
    exact = [x.astype(jnp.float32) for x in (a, b)]
    for measure in (lambda a, b: ssim(a, b, 2.0), lambda a, b: psnr_db(a, b, 2.0), flicker):
        assert measure(a, b).dtype == jnp.float32
        np.testing.assert_array_equal(measure(a, b), measure(*exact))


def test_measure_clips_shows_what_a_screen_would():
    video = jnp.asarray(clips(4, 2, 3, 12, 12, 3))
    measures = measure_clips(3.0 * video, video, 2.0)
    assert set(measures) == {"psnr_db", "ssim", "flicker"}
    np.testing.assert_allclose(measures["psnr_db"], psnr_db(jnp.clip(3.0 * video, -1, 1), video, 2.0))
    assert set(measure_clips(video[:, :1], video[:, :1], 2.0)) == {"psnr_db", "ssim"}


@pytest.mark.parametrize(
    ("measure", "a", "b", "message"),
    [
        (lambda a, b: ssim(a, b, 2.0), (1, 1, 10, 16, 3), (1, 1, 10, 16, 3), "10 x 16 pixels.*11 or more"),
        (lambda a, b: ssim(a, b, 2.0), (1, 1, 16, 16, 3), (1, 1, 16, 16, 1), r"\[1, 1, 16, 16, 3\] and"),
        (lambda a, b: psnr_db(a, b, 2.0), (1, 16, 16, 3), (1, 16, 16, 3), "give two arrays"),
        (flicker, (1, 1, 4, 4, 3), (1, 1, 4, 4, 3), "single frame"),
        (lambda a, b: gradient_ssim_loss(a, b, 2), (1, 1, 20, 24, 3), (1, 1, 20, 24, 3), "20 x 24 .* 2 scales"),
        (lambda a, b: gradient_ssim_loss(a, b, 2), (1, 1, 25, 24, 3), (1, 1, 25, 24, 3), "multiples of"),
        (lambda a, b: gradient_ssim_loss(a, b, 0), (1, 1, 24, 24, 3), (1, 1, 24, 24, 3), "0 scales"),
    ],
)
def test_clips_that_do_not_fit_are_named(measure, a, b, message):
    with pytest.raises(ValueError, match=message):
        measure(jnp.zeros(a), jnp.zeros(b))
