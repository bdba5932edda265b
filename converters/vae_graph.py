"""Graph `vae_encoder`: one frame -> the posterior of its latent frame, by the video VAE's encoder.

Equation 1 of `nd_jax.models.vae_layers` has zeros in front of a clip, so that on the first frame, t = 0, of the K time
slices of a kernel only the last one meets anything else, whatever the stride in time:

    y[0] = W[K - 1] x[0] + b                                                                                  (1)

What is left is a network of 2D convolutions whose layers are those of `nd_jax.models.image_layers`, on the same
parameters. The last one gives mean and log variance by kernels of their own, which are halves of `quant_conv`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from converters import device_layers
from converters.device_layers import conv, count_leaves
from converters.graph import Graph, GraphOptions, TensorSpec
from nd_jax.errors import UserError
from nd_jax.generate.model_folder import VAE
from nd_jax.models.autoencoder_kl import ImageMidBlock
from nd_jax.models.image_layers import GroupNorm, ResidualBlock
from nd_jax.models.vae_layers import NORM_EPSILON
from nd_jax.models.video_vae import LOGVAR_RANGE, VideoEncoderConfig, VideoVAEEncoder
from nd_jax.weights.folder import Component


def device_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of either video VAE -> those of `encode_on_device`: equation 1, and `quant_conv` in two halves."""
    last = lambda leaf: np.ascontiguousarray(leaf[-1]) if np.ndim(leaf) == 5 else np.asarray(leaf)
    ours = {name: jax.tree.map(last, params[name]) for name in ("encoder", "quant_conv")}
    halves = {name: np.split(leaf, 2, axis=-1) for name, leaf in ours["quant_conv"].items()}
    parts = enumerate(("mean", "logvar"))
    return ours | {"quant_conv": {part: {name: halves[name][k] for name in halves} for k, part in parts}}


def encode_on_device(
    params: Mapping[str, Any], config: VideoEncoderConfig, image: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`VideoVAEEncoder.encode` of one frame [B, H, W, 3] on `device_params`: mean and logvar [B, h, w, C]."""
    encoder, groups = params["encoder"], config.encoder_norm_num_groups

    def layer(name: str, x: jax.Array, module: nn.Module | None = None, strides: tuple[int, int] = (1, 1)) -> jax.Array:
        with jax.named_scope(f"encoder/{name}"):
            return module.apply({"params": encoder[name]}, x) if module else conv(encoder[name], x, strides)

    with device_layers.forms():
        x = layer("conv_in", image)
        for i, width in enumerate(config.encoder_block_out_channels):
            for j in range(config.encoder_layers_per_block[i]):
                x = layer(f"down_{i}_block_{j}", x, ResidualBlock(width, groups, NORM_EPSILON))
            if config.encoder_spatial_down_sample[i]:
                x = layer(f"down_{i}_space", x, strides=(2, 2))
            if config.encoder_temporal_down_sample[i]:
                x = layer(f"down_{i}_time", x)
        x = layer("mid", x, ImageMidBlock(groups))
        x = layer("conv_out", nn.silu(layer("norm_out", x, GroupNorm(groups, NORM_EPSILON))))
    with jax.named_scope("quant_conv"):
        mean, logvar = (conv(params["quant_conv"][name], x) for name in ("mean", "logvar"))
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def vae_encoder(components: Mapping[str, Component], options: GraphOptions) -> Graph:
    """`image` [B, H, W, 3] in [-1, 1] -> `mean`, `logvar` [B, h, w, C], all float32.

    Args:
      components: "causal_video_vae" of either class.
      options: batch and size of the latent.

    Raises:
      UserError: a component of another class.
    """
    vae = components[VAE]
    config = vae.config
    if not isinstance(config, VideoEncoderConfig):
        raise UserError(f"{VAE} holds a {vae.network.name}; this graph needs a video VAE")
    latent = (options.batch, options.latent_height, options.latent_width)
    pixels = (options.batch, *(config.space_factor * side for side in latent[1:]), config.encoder_in_channels)
    params = device_params(vae.params)
    ours = {name: vae.params[name] for name in ("encoder", "quant_conv")}

    @jax.jit
    def reference_with(params, image):
        posterior = VideoVAEEncoder(config).apply({"params": params}, image[:, None])
        return posterior.mean[:, 0], posterior.logvar[:, 0]

    return Graph(
        name="vae_encoder",
        inputs=(TensorSpec("image", pixels, "float32"),),
        outputs=tuple(
            TensorSpec(name, (*latent, config.encoder_out_channels), "float32") for name in ("mean", "logvar")
        ),
        params=params,
        apply=lambda params, image: encode_on_device(params, config, image),
        reference=lambda image: reference_with(ours, image),
        sample=lambda rng: {"image": rng.uniform(-1, 1, pixels).astype(np.float32)},
        native_ops={
            "Conv": count_leaves(params, r".*(conv|down|shortcut|mean|logvar)[^/]*/kernel$"),
            "InstanceNormalization or LayerNormalization": count_leaves(params, r".*norm[^/]*/scale$"),
            "Softmax": 1,
            "Clip": 1,
        },
        notes={"latent_shift": list(config.latent_shift), "latent_scale": list(config.latent_scale)},
    )
