"""The causal video VAE: chunks, bands and streams give the numbers of one call, and no frame sees a later one."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nd_jax.errors import UserError
from nd_jax.models import taehv, video_chunks, video_vae
from nd_jax.models.vae_layers import CausalConv, Compute, Normalisation, residual_block
from nd_jax.models.video_vae import (
    AsymmetricCausalVideoVAE,
    AsymmetricVideoVAEConfig,
    CausalVideoVAE,
    CausalVideoVAEConfig,
    Posterior,
    denormalize_latents,
    latent_frames,
    latent_size,
    normalize_latents,
)
from nd_jax.weights.networks import ASYMMETRIC_VIDEO_VAE, CAUSAL_VIDEO_VAE, VIDEO_VAE_ENCODER, flat_shapes
from nd_jax.weights.table import flatten, unflatten

TOLERANCE = 2e-5  # Of the largest number: that of the golden cases of these networks.

# The released factors in three levels; the fourth, which samples nothing, is in the golden cases.
THRICE = (True, True, True)
ENCODER = dict(
    encoder_out_channels=4,
    encoder_layers_per_block=(1, 1, 1),
    encoder_block_out_channels=(4, 4, 8),
    encoder_spatial_down_sample=THRICE,
    encoder_temporal_down_sample=THRICE,
    encoder_norm_num_groups=2,
)
NATIVE = CausalVideoVAEConfig(
    **ENCODER,
    decoder_in_channels=4,
    decoder_layers_per_block=(1, 1, 1),
    decoder_block_out_channels=(4, 4, 8),
    decoder_spatial_up_sample=THRICE,
    decoder_temporal_up_sample=THRICE,
    decoder_norm_num_groups=2,
)
TINY = AsymmetricVideoVAEConfig(**ENCODER, decoder_num_features=(8, 6, 4, 4))


def drawn(shapes):
    """Random parameters of the given paths; biases and norm scales too, so that every one of them matters."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        x = rng.standard_normal(shape, np.float32)
        if path.endswith("kernel"):
            return x / math.sqrt(math.prod(shape[:-1]))
        return 1 + 0.1 * x if path.endswith("scale") else 0.1 * x

    return unflatten({path: draw(path, shape) for path, shape in shapes.items()})


NATIVE_PARAMS = drawn(flat_shapes(CAUSAL_VIDEO_VAE, NATIVE))
TINY_PARAMS = drawn(flat_shapes(ASYMMETRIC_VIDEO_VAE, TINY))


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def call(vae, params, method, *args):
    return jax.jit(lambda p, args: vae.apply({"params": p}, *args, method=method))(params, args)


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert float(jnp.abs(got - expected).max() / jnp.abs(expected).max()) <= TOLERANCE


VIDEO = normal(1, 25, 18, 11, 3)  # Neither side is a multiple of 8.
LATENTS = normal(2, 4, 3, 2, 4)


@pytest.fixture(scope="module")
def encoded():
    return call(CausalVideoVAE(NATIVE), NATIVE_PARAMS, "encode", VIDEO)


@pytest.fixture(scope="module")
def decoded():
    return call(CausalVideoVAE(NATIVE), NATIVE_PARAMS, "decode", LATENTS)


@pytest.fixture(scope="module")
def tiny_decoded():
    return call(AsymmetricCausalVideoVAE(TINY), TINY_PARAMS, "decode", LATENTS)


# --- shapes and errors ------------------------------------------------------------------------------------------------


def test_odd_sizes_are_rounded_up(encoded, decoded, tiny_decoded):
    assert encoded.mean.shape == encoded.logvar.shape == (1, 4, *latent_size(NATIVE, 18, 11), 4) == (1, 4, 3, 2, 4)
    assert decoded.shape == tiny_decoded.shape == (2, 25, 24, 16, 3)


@pytest.mark.parametrize("frames", [0, 2, 8, 10, 16])
def test_a_clip_of_another_length_is_an_error(frames):
    clip = jnp.zeros((1, frames, 8, 8, 3))
    vae = CausalVideoVAE(NATIVE)
    for encode in (
        lambda: vae.apply({"params": NATIVE_PARAMS}, clip, method="encode"),
        lambda: list(video_chunks.encode_chunks(vae, NATIVE_PARAMS, clip)),
    ):
        with pytest.raises(UserError, match=rf"{frames} video frames .* 8k \+ 1; give \d+ or \d+") as error:
            encode()
        assert "\n" not in str(error.value)


@given(st.integers(1, 200))
def test_latent_frames(frames):
    if frames % 8 == 1:
        assert latent_frames(NATIVE, frames) == (frames + 7) // 8
    else:
        with pytest.raises(UserError):
            latent_frames(NATIVE, frames)


@pytest.mark.parametrize("chunk", [0, -1])
def test_an_impossible_chunk_is_an_error(chunk):
    with pytest.raises(UserError, match=f"chunk is {chunk}"):
        video_chunks.decode_chunked(CausalVideoVAE(NATIVE), NATIVE_PARAMS, LATENTS, chunk)
    with pytest.raises(UserError, match="no latent frames"):
        video_chunks.decode_chunked(CausalVideoVAE(NATIVE), NATIVE_PARAMS, LATENTS[:, :0])


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CausalVideoVAEConfig, {"encoder_layers_per_block": (2, 2)}, "encoder_layers_per_block has 2 entries"),
        (CausalVideoVAEConfig, {"decoder_norm_num_groups": 3}, "decoder_norm_num_groups 3 does not divide"),
        (CausalVideoVAEConfig, {"decoder_in_channels": 4}, "they must be equal"),
        (AsymmetricVideoVAEConfig, {"decoder_num_features": (8, 8)}, "needs 4 entries"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


@pytest.mark.parametrize(
    ("network", "change"),
    [
        (ASYMMETRIC_VIDEO_VAE, {"encoder_act_fn": "relu"}),
        (CAUSAL_VIDEO_VAE, {"interpolate": True}),
        (CAUSAL_VIDEO_VAE, {"decoder_up_block_types": ["UpDecoderBlock2D"]}),
    ],
)
def test_other_networks_under_the_same_name_are_refused(network, change):
    with pytest.raises(UserError, match="are supported"):
        network.read_config(change)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunked_encoding_equals_one_call(encoded, chunk):
    chunked = video_chunks.encode_chunked(CausalVideoVAE(NATIVE), NATIVE_PARAMS, VIDEO, chunk)
    assert_close(chunked.mean, encoded.mean)
    assert_close(chunked.logvar, encoded.logvar)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunked_decoding_equals_one_call(decoded, chunk):
    assert_close(video_chunks.decode_chunked(CausalVideoVAE(NATIVE), NATIVE_PARAMS, LATENTS, chunk), decoded)


def test_chunks_come_one_at_a_time():
    vae = CausalVideoVAE(NATIVE)
    assert [p.mean.shape[1] for p in video_chunks.encode_chunks(vae, NATIVE_PARAMS, VIDEO, 3)] == [3, 1]
    assert [v.shape[1] for v in video_chunks.decode_chunks(vae, NATIVE_PARAMS, LATENTS, 3)] == [17, 8]


def test_the_encoder_sees_no_later_frame(encoded):
    for frame in (1, 16):
        changed = call(CausalVideoVAE(NATIVE), NATIVE_PARAMS, "encode", VIDEO.at[:, frame].add(1.0))
        first = -(-frame // 8)  # The latent frame that holds it.
        np.testing.assert_array_equal(changed.mean[:, :first], encoded.mean[:, :first])
        assert (changed.mean[:, first] != encoded.mean[:, first]).any()


@pytest.mark.parametrize("config", [NATIVE, TINY], ids=["native", "tiny"])
def test_the_decoders_see_no_later_frame(config, decoded, tiny_decoded):
    native = config is NATIVE
    vae, params = (CausalVideoVAE(NATIVE), NATIVE_PARAMS) if native else (AsymmetricCausalVideoVAE(TINY), TINY_PARAMS)
    before = decoded if native else tiny_decoded
    for frame in (1, 3):
        changed = call(vae, params, "decode", LATENTS.at[:, frame].add(1.0))
        first = 8 * (frame - 1) + 1
        np.testing.assert_array_equal(changed[:, :first], before[:, :first])
        assert (changed[:, first] != before[:, first]).any()


def test_one_frame_is_the_first_of_a_clip(encoded, decoded, tiny_decoded):
    native, tiny = CausalVideoVAE(NATIVE), AsymmetricCausalVideoVAE(TINY)
    assert_close(call(native, NATIVE_PARAMS, "encode", VIDEO[:, :1]).mean, encoded.mean[:, :1])
    assert_close(call(native, NATIVE_PARAMS, "decode", LATENTS[:, :1]), decoded[:, :1])
    assert_close(call(tiny, TINY_PARAMS, "decode", LATENTS[:, :1]), tiny_decoded[:, :1])


# --- the tiny decoder, frame by frame ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forms():
    """Both forms of a decoder of other factors, 4x in time and in space, and its states in front of a clip."""
    config = taehv.TAEHVConfig(2, (4, 3, 2, 2), (False, True, True), (True, False, True))
    decoder = taehv.TAEHVDecoder(config)
    abstract = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((2, 3, 3, 2, 2)))["params"]
    params = {"params": drawn({path: leaf.shape for path, leaf in flatten(abstract).items()})}
    parallel = jax.jit(lambda latents: decoder.apply(params, latents)[0])
    stream = jax.jit(lambda latent, states: decoder.apply(params, latent, states, method="stream"))
    return parallel, stream, taehv.initial_states(config, 2, 3, 2)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 30.0))
def test_streaming_equals_parallel(forms, seed, scale):
    parallel, stream, states = forms
    latents = jnp.float32(scale) * normal(2, 3, 3, 2, 2, seed=seed)
    assert len(states) == 9
    shapes, frames = [state.shape for state in states], []
    for latent in latents.swapaxes(0, 1):
        out, states = stream(latent, states)
        assert len(out) == 4
        assert [state.shape for state in states] == shapes
        frames += out
    video = parallel(latents)
    assert video.shape == (2, 4 * 2 + 1, 12, 8, 3)
    assert_close(jnp.stack(frames[3:], axis=1), video)


def test_streaming_the_whole_vae_equals_decoding(tiny_decoded):
    vae = AsymmetricCausalVideoVAE(TINY)
    assert [v.shape[1] for v in video_chunks.stream(vae, TINY_PARAMS, LATENTS)] == [1, 8, 8, 8]
    assert_close(video_chunks.decode_streamed(vae, TINY_PARAMS, LATENTS), tiny_decoded)


# --- space, memory, training ------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.integers(1, 7), st.integers(2, 9), st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.booleans())
def test_bands_of_rows_give_the_convolution_of_whole_frames(height, bands, size, step, normed):
    x = normal(1, 3, height, 2, 2)
    norm = Normalisation(normal(1, 3, 1, 1, 2, seed=2), normal(1, 3, 1, 1, 2, seed=3), normal(1, 1, 1, 1, 2, seed=4))
    conv = lambda bands: jax.jit(CausalConv(3, size, (1, step, step), Compute(bands=bands)).apply)
    params = {"params": {"kernel": normal(size, size, size, 2, 3), "bias": normal(3)}}
    whole, banded = (conv(count)(params, x, norm if normed else None) for count in (1, bands))
    assert_close(banded, whole)


def test_bands_give_the_numbers_of_the_plain_call(encoded, decoded):
    vae = CausalVideoVAE(NATIVE, bands=2)
    assert_close(video_chunks.encode_chunked(vae, NATIVE_PARAMS, VIDEO, 4).mean, encoded.mean)
    assert_close(call(vae, NATIVE_PARAMS, "decode", LATENTS), decoded)


def test_recomputation_changes_no_gradient():
    x, gradients = normal(1, 2, 3, 3, 2), {}
    for remat in (False, True):
        compute = Compute(remat=remat)
        block = residual_block(compute)(4, 2, compute)
        abstract = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
        params = drawn({path: leaf.shape for path, leaf in flatten(abstract).items()})
        loss = lambda params, block=block: jnp.square(block.apply({"params": params}, x)).mean()
        assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(params))) is remat
        gradients[remat] = flatten(jax.jit(jax.grad(loss))(params))
    for path, expected in gradients[False].items():
        np.testing.assert_allclose(gradients[True][path], expected, rtol=1e-4, atol=1e-6, err_msg=path)


def test_bfloat16_is_close(decoded):
    video = call(CausalVideoVAE(NATIVE, dtype=jnp.bfloat16), NATIVE_PARAMS, "decode", LATENTS[:, :1])
    assert video.dtype == jnp.bfloat16
    difference = jnp.abs(video.astype(jnp.float32) - decoded[:, :1])
    assert float(difference.max() / jnp.abs(decoded[:, :1]).max()) < 0.05


# --- posterior and normalisation --------------------------------------------------------------------------------------


def test_posterior_samples_have_its_moments():
    shape = (1, 1, 1, 1, 200_000)
    posterior = Posterior(jnp.full(shape, 0.5), jnp.full(shape, np.log(4.0), jnp.float32))
    sample = posterior.sample_with_key(jax.random.key(0))
    assert abs(float(sample.mean()) - 0.5) < 0.02 and abs(float(sample.std()) - 2.0) < 0.02
    np.testing.assert_array_equal(posterior.sample(jnp.zeros(shape)), posterior.mean)


def test_kl_divergence_against_its_integral():
    """Equation 5 against a Riemann sum of q log(q / p)."""
    mean, std = 0.7, 0.6
    x = np.linspace(-12, 12, 200_001)
    density = lambda m, s: np.exp(-0.5 * ((x - m) / s) ** 2) / (s * np.sqrt(2 * np.pi))
    q, p = density(mean, std), density(0, 1)
    support = q > 1e-300
    integral = (q[support] * np.log(q[support] / p[support])).sum() * (x[1] - x[0])
    moments = (jnp.full((1, 2, 1, 1, 3), value, jnp.float32) for value in (mean, 2 * np.log(std)))
    np.testing.assert_allclose(Posterior(*moments).kl(), [6 * integral], rtol=1e-5)


def test_logvar_is_clamped():
    moments = jnp.asarray([[[[[1.0, 2.0, -100.0, 100.0]]]]])
    posterior = video_vae.posterior(moments)
    np.testing.assert_array_equal(posterior.mean[0, 0, 0, 0], [1.0, 2.0])
    np.testing.assert_array_equal(posterior.logvar[0, 0, 0, 0], [-30.0, 20.0])


@pytest.mark.parametrize(("config", "later_scale"), [(TINY, 0.3031), (NATIVE, 1 / 3.0986)])
def test_latent_normalisation(config, later_scale):
    z = normal(2, 3, 2, 2, 4)
    latents = normalize_latents(config, z)
    np.testing.assert_allclose(latents[:, 0], (z[:, 0] - 0.1490) * 0.5430, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(latents[:, 1:], (z[:, 1:] + 0.2343) * later_scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(normalize_latents(config, z[:, 1:], first_frame=1), latents[:, 1:])
    np.testing.assert_allclose(denormalize_latents(config, latents), z, rtol=1e-5, atol=1e-6)


def test_normalisation_is_part_of_the_folder():
    ours = CausalVideoVAEConfig(latent_shift=(1.0, 2.0), latent_scale=(3.0, 4.0))
    written = json.loads(json.dumps(CAUSAL_VIDEO_VAE.write_config(ours)))
    assert CAUSAL_VIDEO_VAE.read_config(written) == ours
    assert VIDEO_VAE_ENCODER.read_config(written).latent_scale == (3.0, 4.0)
    # A released folder names none: its class decides.
    scales = [
        VIDEO_VAE_ENCODER.read_config({"_class_name": name}).latent_scale for name in VIDEO_VAE_ENCODER.class_names
    ]
    assert scales == [(1 / 1.8415, 1 / 3.0986), (0.5430, 0.3031)]
