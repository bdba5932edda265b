"""The video VAE over clips of any length: a chunk of frames at a time, in memory that does not grow with the clip.

Causality makes it exact: every convolution carries the frames that its next call looks back at (`vae_layers`), the
tiny decoder the frames of its memory blocks (`taehv`), so the numbers are those of one call on the whole clip.

A chunk is given in latent frames. The first one of n latent frames is 8 (n - 1) + 1 video frames, since the first
latent frame stands for one video frame; the others are 8n. `encode_chunks`, `decode_chunks` and `stream` yield as
they go; each compiles once per shape of chunk, so at most three times.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from nd_jax.errors import UserError
from nd_jax.models.taehv import States, initial_states
from nd_jax.models.vae_layers import CONTEXT
from nd_jax.models.video_vae import (
    AsymmetricCausalVideoVAE,
    CausalVideoVAE,
    Posterior,
    VideoVAEEncoder,
    latent_frames,
)


def encode_chunks(vae: VideoVAEEncoder, params: dict, video: jax.Array, chunk: int = 1) -> Iterator[Posterior]:
    """Posterior of `chunk` latent frames at a time.

    Args:
      vae: either VAE, or the encoder half.
      params: its parameters; those of the decoder are not looked at.
      video: [B, 8k + 1, H, W, 3] in [-1, 1].
      chunk: latent frames per call.

    Raises:
      UserError: another number of frames, or a chunk below 1.
    """
    factor, context = vae.config.time_factor, {}
    for start, stop in _spans(latent_frames(vae.config, video.shape[1]), chunk):
        frames = video[:, max(0, factor * (start - 1) + 1) : factor * (stop - 1) + 1]
        encoded, context = _call(vae, "encode_chunk", params, context, frames)
        yield encoded


def encode_chunked(vae: VideoVAEEncoder, params: dict, video: jax.Array, chunk: int = 1) -> Posterior:
    """`encode` of a whole clip by `encode_chunks`."""
    return Posterior(*(jnp.concatenate(m, axis=1) for m in zip(*encode_chunks(vae, params, video, chunk), strict=True)))


def decode_chunks(vae: CausalVideoVAE, params: dict, latents: jax.Array, chunk: int = 1) -> Iterator[jax.Array]:
    """Video of `chunk` latent frames at a time by the native decoder.

    Args:
      vae: Pyramid-Flow's.
      params: its parameters; those of the encoder are not looked at.
      latents: de-normalised, [B, T, h, w, C].
      chunk: latent frames per call.

    Raises:
      UserError: a chunk below 1, or no frames.
    """
    context = {}
    for start, stop in _spans(latents.shape[1], chunk):
        video, context = _call(vae, "decode", params, context, latents[:, start:stop])
        yield video


def decode_chunked(vae: CausalVideoVAE, params: dict, latents: jax.Array, chunk: int = 1) -> jax.Array:
    """`decode` of a whole clip by `decode_chunks`."""
    return jnp.concatenate(list(decode_chunks(vae, params, latents, chunk)), axis=1)


def stream(vae: AsymmetricCausalVideoVAE, params: dict, latents: jax.Array) -> Iterator[jax.Array]:
    """Video of one latent frame at a time by the tiny decoder: [B, 1, 8h, 8w, 3], then [B, 8, 8h, 8w, 3] each.

    Args:
      vae: Neodragon's.
      params: its parameters; those of the encoder are not looked at.
      latents: de-normalised, [B, T, h, w, C].
    """
    decoder = vae.config.decoder
    states = initial_states(decoder, latents.shape[0], *latents.shape[2:4], vae.dtype)
    for frame in range(latents.shape[1]):
        video, states = _stream(vae, params, latents[:, frame], states)
        yield video if frame else video[:, decoder.dropped_frames :]


def decode_streamed(vae: AsymmetricCausalVideoVAE, params: dict, latents: jax.Array) -> jax.Array:
    """`decode` of a whole clip by `stream`."""
    return jnp.concatenate(list(stream(vae, params, latents)), axis=1)


def _spans(frames: int, chunk: int) -> list[tuple[int, int]]:
    if chunk < 1:
        raise UserError(f"chunk is {chunk}: a chunk has at least 1 latent frame")
    if frames < 1:
        raise UserError("the clip has no latent frames: give at least 1")
    return [(start, min(frames, start + chunk)) for start in range(0, frames, chunk)]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _call(vae: VideoVAEEncoder, method: str, params: dict, context: dict, x: jax.Array) -> tuple:
    """(result, context of the next chunk); the context in front of a clip is empty."""
    return vae.apply({"params": params, **context}, x, method=method, mutable=[CONTEXT])


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _stream(vae: AsymmetricCausalVideoVAE, params: dict, latent: jax.Array, states: States) -> tuple:
    frames, states = vae.apply({"params": params}, latent, states, method="decode_frame")
    return jnp.stack(frames, axis=1), states
