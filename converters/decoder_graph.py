"""Graph `decoder_stream`: one latent frame and 9 carried states in, 8 video frames and the next states out.

The latent is what `AsymmetricCausalVideoVAE.decode` takes: de-normalised (equation 3 of `nd_jax.models.video_vae`,
whose pair of constants is another one for the first latent frame, so that it stays on the host), in front of
`post_quant_conv`, which is part of the graph. Frames are arrays of their own from end to end; time is never an axis.

Every enlargement of `nd_jax.models.taehv` (nearest 2x, 1x1 growth, 3x3 convolution) becomes one 3x3 convolution per
frame and DepthToSpace by equations 1 and 2 of `converters.subpixel`. The last one goes behind the output convolution
by equations 3 and 4, where its pictures have 3 channels.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from converters import subpixel
from converters.graph import Graph, GraphOptions, TensorSpec, component_of
from nd_jax.models.taehv import GROUPS, MEMORY_BLOCKS, MemoryBlock, TAEHVConfig, initial_states
from nd_jax.models.video_vae import AsymmetricCausalVideoVAE, AsymmetricVideoVAEConfig
from nd_jax.weights.folder import Component
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE

FRAMES = ("early", "late")


def device_params(params: Mapping[str, Any], config: TAEHVConfig) -> dict[str, Any]:
    """Parameters of `post_quant_conv` and `decoder` -> those of `stream_on_device`, enlargements folded."""
    decoder, quant = params["decoder"], params["post_quant_conv"]
    ours = {name: decoder[name] for name in decoder if not name.startswith(("grow_", "conv_0", "conv_1", "conv_2"))}
    for group in range(GROUPS):
        growth, kernel = np.asarray(decoder[f"grow_{group}"]["kernel"]), np.asarray(decoder[f"conv_{group}"]["kernel"])
        parts = np.split(growth, 2, axis=-1) if config.time_upscale[group] else [growth]
        folded = [subpixel.behind_pointwise(kernel, part) for part in parts]
        if config.space_upscale[group]:
            folded = [subpixel.behind_nearest(kernel) for kernel in folded]
        ours[f"enlarge_{group}"] = {name: {"kernel": k} for name, k in zip(FRAMES, folded, strict=False)}
    if config.space_upscale[-1]:
        out = decoder["conv_out"]
        kernel = subpixel.behind_depth_to_space(np.asarray(out["kernel"]))
        ours["conv_out"] = {"kernel": kernel, "bias": np.tile(np.asarray(out["bias"]), 4)}
    # The time axis of a kernel of size one.
    return {"post_quant_conv": {**quant, "kernel": np.asarray(quant["kernel"])[0]}, "decoder": ours}


def stream_on_device(
    params: Mapping[str, Any], config: TAEHVConfig, latent: jax.Array, states: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """`AsymmetricCausalVideoVAE.decode_frame` on `device_params`."""
    decoder, following = params["decoder"], []
    with jax.named_scope("post_quant_conv"):
        x = 3.0 * jnp.tanh(_conv(params["post_quant_conv"], latent) / 3.0)  # Equation 1 of taehv.py.
    with jax.named_scope("decoder/conv_in"):
        frames = [nn.relu(_conv(decoder["conv_in"], x))]
    for group in range(GROUPS):
        for index in range(group * MEMORY_BLOCKS, (group + 1) * MEMORY_BLOCKS):
            pasts = [states[index], *frames[:-1]]
            following.append(frames[-1])
            with jax.named_scope(f"decoder/memory_{index}"):
                block = MemoryBlock(config.num_features[group])
                frames = [
                    block.apply({"params": decoder[f"memory_{index}"]}, x, past)
                    for x, past in zip(frames, pasts, strict=True)
                ]
        with jax.named_scope(f"decoder/enlarge_{group}"):
            kernels = decoder[f"enlarge_{group}"]
            frames = [_conv(kernels[name], x) for x in frames for name in FRAMES if name in kernels]
            if config.space_upscale[group] and group < GROUPS - 1:
                frames = [depth_to_space(x) for x in frames]
    with jax.named_scope("decoder/conv_out"):
        frames = [_conv(decoder["conv_out"], nn.relu(x)) for x in frames]
        if config.space_upscale[-1]:
            frames = [depth_to_space(x) for x in frames]
    return tuple(frames), tuple(following)


def depth_to_space(x: jax.Array) -> jax.Array:
    """[B, H, W, 4 C] -> [B, 2 H, 2 W, C]; channels are (row, column, C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def _conv(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    kernel = params["kernel"]
    return nn.Conv(kernel.shape[-1], kernel.shape[:2], use_bias="bias" in params).apply({"params": params}, x)


def state_names() -> list[str]:
    """The carried states among the inputs, in order of use."""
    return [f"state_{i}" for i in range(GROUPS * MEMORY_BLOCKS)]


def decode_frame(
    vae: Component, latent: jax.Array, states: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """One de-normalised latent frame [B, h, w, C] by the model that training uses: (8 frames, 9 next states)."""
    params = {name: vae.params[name] for name in ("post_quant_conv", "decoder")}
    return _decode_frame(vae.config, params, latent, states)


@functools.partial(jax.jit, static_argnums=0)
def _decode_frame(config, params, latent, states):
    return AsymmetricCausalVideoVAE(config).apply({"params": params}, latent, states, method="decode_frame")


def decoder_stream(components: Mapping[str, Component], options: GraphOptions) -> Graph:
    """`latent`, `state_0..8` -> `frame_0..7`, `next_state_0..8`, all float32 [B, rows, columns, channels].

    Args:
      components: "causal_video_vae" with Neodragon's class.
      options: batch and size of the latent.

    Raises:
      UserError: a component of another class.
    """
    vae = component_of(components, "causal_video_vae", ASYMMETRIC_VIDEO_VAE)
    config = vae.config.decoder
    size = (options.batch, options.latent_height, options.latent_width)
    states = tuple(
        TensorSpec(name, x.shape, "float32")
        for name, x in zip(state_names(), jax.eval_shape(lambda: initial_states(config, *size)), strict=True)
    )
    pixels = (size[0], *(config.space_factor * n for n in size[1:]), config.out_channels)

    def reference(latent, *states):
        frames, following = decode_frame(vae, latent, states)
        return (*frames, *following)

    def apply(params, latent, *states):
        frames, following = stream_on_device(params, config, latent, states)
        return (*frames, *following)

    def sample(rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The states that two random latents leave behind, and a third."""
        carried = initial_states(config, *size)
        for latent in _random_latents(rng, vae.config, 2, size):
            carried = decode_frame(vae, latent, carried)[1]
        (latent,) = _random_latents(rng, vae.config, 1, size)
        return {"latent": latent, **{spec.name: np.asarray(x) for spec, x in zip(states, carried, strict=True)}}

    names = [f"next_{spec.name}" for spec in states]
    return Graph(
        name="decoder_stream",
        inputs=(TensorSpec("latent", (*size, config.latent_channels), "float32"), *states),
        outputs=(
            *(TensorSpec(f"frame_{i}", pixels, "float32") for i in range(config.time_factor)),
            *(TensorSpec(name, spec.shape, "float32") for name, spec in zip(names, states, strict=True)),
        ),
        params=device_params(vae.params, config),
        apply=apply,
        reference=reference,
        sample=sample,
        # Inputs and outputs are channel-last, as the HTP keeps them; ONNX's convolutions are not.
        native_ops={
            "Clip": 1,
            "DepthToSpace": _enlarged_frames(config),
            "Transpose": 1 + 2 * len(states) + config.time_factor,
        },
        carried={name: spec.name for name, spec in zip(names, states, strict=True)},
        notes={
            "latent_shift": list(vae.config.latent_shift),
            "latent_scale": list(vae.config.latent_scale),
            "dropped_frames": config.dropped_frames,
        },
    )


def _random_latents(
    rng: np.random.Generator, config: AsymmetricVideoVAEConfig, count: int, size: tuple[int, int, int]
) -> list[np.ndarray]:
    """De-normalised N(0, 1) latents [B, h, w, C] of the frames behind the first."""
    shift, scale = config.latent_shift[1], config.latent_scale[1]
    shape = (count, *size, config.encoder_out_channels)
    return list((rng.standard_normal(shape) / scale + shift).astype(np.float32))


def _enlarged_frames(config: TAEHVConfig) -> int:
    """Number of DepthToSpace: every frame that leaves a group which enlarges."""
    frames, count = 1, 0
    for in_time, in_space in zip(config.time_upscale, config.space_upscale, strict=True):
        frames *= 2 if in_time else 1
        count += frames if in_space else 0
    return count
