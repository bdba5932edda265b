"""Golden cases of the causal video VAE. Their videos and latents are (B, C, T, H, W); ours are channel-last.

A case holds one half of the VAE, the encoder or a decoder, and as many clips as it likes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.models.video_vae import AsymmetricCausalVideoVAE, CausalVideoVAE
from nd_jax.weights.network import Network
from nd_jax.weights.vae import (
    ASYMMETRIC_VIDEO_VAE,
    CAUSAL_VIDEO_VAE,
    VIDEO_VAE_ENCODER,
    native_decoder_table,
    tiny_decoder_table,
)
from tests.golden_kinds import Arrays, Kind, Outputs


class NativeDecoderHalf(CausalVideoVAE):
    """Initialises the decoder's parameters alone."""

    def __call__(self, latents: jax.Array) -> jax.Array:
        return self.decode(latents)


class TinyDecoderHalf(AsymmetricCausalVideoVAE):
    """Initialises the decoder's parameters alone."""

    def __call__(self, latents: jax.Array) -> jax.Array:
        return self.decode(latents)


def _latents(config: Any) -> tuple:
    return (jax.ShapeDtypeStruct((1, 1, 1, 1, config.encoder_out_channels), jnp.float32),)


NATIVE = dataclasses.replace(CAUSAL_VIDEO_VAE, module=NativeDecoderHalf, inputs=_latents, table=native_decoder_table)
TINY = dataclasses.replace(ASYMMETRIC_VIDEO_VAE, module=TinyDecoderHalf, inputs=_latents, table=tiny_decoder_table)


def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)


def _channels_last(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def _encoded(config: Any, params: dict, inputs: Arrays) -> Outputs:
    encode, out = jax.jit(VIDEO_VAE_ENCODER.module(config).apply), {}
    for name, clip in inputs.items():
        posterior = encode({"params": params}, _channels_last(clip))
        out |= {f"{name}.{key}": _channels_first(value) for key, value in posterior._asdict().items()}
    return out


def _decoded(network: Network, config: Any, params: dict, inputs: Arrays) -> tuple[Outputs, tuple[jax.Array, ...]]:
    """`latents` becomes `video`, NAME becomes NAME_frame; and the block outputs of `latents`."""
    decode, out, blocks = jax.jit(network.module(config).apply, static_argnames="method"), {}, ()
    for name, clip in inputs.items():
        video, states = decode({"params": params}, _channels_last(clip), method="decode_blocks")
        out["video" if name == "latents" else f"{name}_frame"] = _channels_first(video)
        blocks = states if name == "latents" else blocks
    return out, blocks


def _native(config: Any, params: dict, inputs: Arrays) -> Outputs:
    out, blocks = _decoded(NATIVE, config, params, inputs)
    names = ("conv_in", "mid_block", *(f"up_block{k}" for k in range(len(blocks))))
    return out | {name: _channels_first(block) for name, block in zip(names, blocks, strict=False)}


def _tiny(config: Any, params: dict, inputs: Arrays) -> Outputs:
    out, blocks = _decoded(TINY, config, params, inputs)
    if blocks:
        out["post_quant"] = _channels_first(blocks[0])
    # Frames are folded into the batch, time fastest.
    folded = (_channels_first(block.reshape(-1, *block.shape[2:])) for block in blocks[1:])
    return out | {f"block{k:02}": block for k, block in enumerate(folded)}


KINDS = (
    Kind("neodragon.asymmetric_causal_video_vae.AsymmetricCausalVideoVAE.encode", VIDEO_VAE_ENCODER, _encoded),
    Kind("neodragon.asymmetric_causal_video_vae.AsymmetricCausalVideoVAE.decode", TINY, _tiny),
    Kind("video_vae.modeling_causal_vae.CausalVideoVAE.decode", NATIVE, _native),
)
