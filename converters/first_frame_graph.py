"""Graphs `unet` and `image_decoder`: one denoising step of the first frame, and the image autoencoder's decoder.

Both are the networks of `nd_jax.models.unet` and `nd_jax.models.autoencoder_kl` with layers in the forms of
`converters.device_layers`. What equation 1 of the UNet makes of timestep, pooled text and sizes reaches the graph as

    conditioning = silu(temb)                                                                                 (1)

from the host (`unet_conditioning`): sines and cosines have 23 dB in FP16, and the sum is the same for every pixel.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from converters import device_layers
from converters.device_layers import count_leaves
from converters.graph import Graph, GraphOptions, TensorSpec, component_of
from nd_jax.generate import lcm
from nd_jax.generate.first_frame import STEPS, UNET_FOLDER, VAE_FOLDER
from nd_jax.models.autoencoder_kl import AutoencoderKL
from nd_jax.models.image_layers import ResidualBlock, Upsample
from nd_jax.models.unet import TIME_IDS, UNet, UNetConfig, down_stages
from nd_jax.weights import networks
from nd_jax.weights.folder import Component

CONDITIONING_PARAMS = ("time_embedding", "size_embedding", "guidance_projection")


# --- UNet -------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def unet_conditioning(
    config: UNetConfig,
    params: Mapping[str, Any],
    timestep: jax.Array,
    pooled: jax.Array,
    time_ids: jax.Array,
    guidance: jax.Array | None = None,
) -> jax.Array:
    """Equation 1 by the model that training uses: float32 [B, 4 c]. Arguments as in `UNet.__call__`.

    The rest of the network is traced on the smallest picture and thrown away by the compiler.
    """
    batch, side = len(timestep), 2 ** (len(config.block_out_channels) - 1)
    latents = jnp.zeros((batch, side, side, config.in_channels))
    context = jnp.zeros((batch, 1, config.cross_attention_dim))
    out = UNet(config).apply(
        {"params": params}, latents, timestep, context, pooled, time_ids, guidance, return_states=True
    )
    return nn.silu(out.states["time_embedding"] + out.states["size_embedding"])


def conditioned_unet(
    params: Mapping[str, Any], config: UNetConfig, latents: jax.Array, conditioning: jax.Array, context: jax.Array
) -> jax.Array:
    """The UNet with equation 1 given: prediction [B, h, w, C]; without the parameters that only (1) needs."""

    def residual_block(call, module, params, x, time):
        return call(x, conditioning)

    batch = latents.shape[0]
    nothing = jnp.zeros((batch, config.time_dim))
    given = {
        (UNet, "_conditioning"): lambda call, module, params, *inputs: (nothing, nothing),
        (ResidualBlock, "__call__"): residual_block,
    }
    guidance = None if config.time_cond_proj_dim is None else jnp.zeros((batch, config.time_cond_proj_dim))
    unused = (jnp.zeros((batch, config.pooled_dim)), jnp.zeros((batch, TIME_IDS)), guidance)
    with device_layers.replaced(given):
        return UNet(config).apply({"params": params}, latents, jnp.zeros(batch), context, *unused).prediction


def unet_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the UNet -> those of the graph: without (1), blocks unrolled, gates split."""
    return _per_block({name: part for name, part in params.items() if name not in CONDITIONING_PARAMS})


def _per_block(tree: Mapping[str, Any]) -> dict[str, Any]:
    ours = {}
    for name, part in tree.items():
        if name == "blocks":
            ours[name] = _per_block(device_layers.unroll(part))
        elif name == "mlp":
            ours[name] = device_layers.split_gate(part["up"]) | {"down": part["down"]}
        else:
            ours[name] = _per_block(part) if isinstance(part, Mapping) else np.asarray(part)
    return ours


def unet(components: Mapping[str, Component], options: GraphOptions) -> Graph:
    """`latents` [B, h, w, C], `conditioning` [B, 4 c], `context` [B, L, E] -> `prediction` [B, h, w, C], all float32.

    Args:
      components: "ssd_1b_unet".
      options: batch, size of the image's latents, and text tokens.

    Raises:
      UserError: a component of another class.
    """
    component = component_of(components, UNET_FOLDER, networks.UNET)
    config, batch = component.config, options.batch
    size = (batch, options.image_latent_height, options.image_latent_width)
    params = unet_params(component.params)
    without = {name: part for name, part in component.params.items() if name not in CONDITIONING_PARAMS}
    reference = jax.jit(lambda params, *inputs: (conditioned_unet(params, config, *inputs),))

    def apply(params, *inputs):
        with device_layers.forms():
            return (conditioned_unet(params, config, *inputs),)

    def sample(rng: np.random.Generator) -> dict[str, np.ndarray]:
        normal = lambda *shape: rng.standard_normal(shape, np.float32)
        timestep = rng.choice(lcm.lcm_timesteps(lcm.SSD_1B, STEPS), batch).astype(np.float32)
        time_ids = rng.integers(0, 1024, (batch, TIME_IDS)).astype(np.float32)
        guidance = None if config.time_cond_proj_dim is None else normal(batch, config.time_cond_proj_dim)
        given = unet_conditioning(
            config, component.params, timestep, normal(batch, config.pooled_dim), time_ids, guidance
        )
        return {
            "latents": normal(*size, config.in_channels),
            "conditioning": np.asarray(given),
            "context": normal(batch, options.context_length, config.cross_attention_dim),
        }

    attentions = count_leaves(params, r".*attention/query/kernel$")
    return Graph(
        name="unet",
        inputs=(
            TensorSpec("latents", (*size, config.in_channels), "float32"),
            TensorSpec("conditioning", (batch, config.time_dim), "float32"),
            TensorSpec("context", (batch, options.context_length, config.cross_attention_dim), "float32"),
        ),
        outputs=(TensorSpec("prediction", (*size, config.out_channels), "float32"),),
        params=params,
        apply=apply,
        reference=lambda *inputs: reference(without, *inputs),
        sample=sample,
        native_ops={
            "InstanceNormalization or LayerNormalization": count_leaves(params, r".*/scale$"),
            "Softmax": attentions,
            "Gelu": attentions // 2,
            "Resize": len(down_stages(config)) - 1,
        },
    )


# --- image autoencoder ------------------------------------------------------------------------------------------------


def decoder_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the image autoencoder -> those of the graph: the decoder, with folded upsampling."""
    decoder = {
        name: {"conv": device_layers.fold_upsampling(part["conv"])} if name.endswith("_sample") else part
        for name, part in params["decoder"].items()
    }
    return {"post_quant_conv": params["post_quant_conv"], "decoder": decoder}


def image_decoder(components: Mapping[str, Component], options: GraphOptions) -> Graph:
    """`latents` [B, h, w, C], de-normalised -> `image` [B, H, W, 3], about [-1, 1], not clamped; float32.

    Args:
      components: "ssd_1b_vae".
      options: batch and size of the image's latents.

    Raises:
      UserError: a component of another class.
    """
    vae = component_of(components, VAE_FOLDER, networks.AUTOENCODER_KL)
    config = vae.config
    latents = (options.batch, options.image_latent_height, options.image_latent_width, config.latent_channels)
    image = (options.batch, *(config.space_factor * side for side in latents[1:3]), config.out_channels)
    params = decoder_params(vae.params)
    ours = {name: vae.params[name] for name in ("post_quant_conv", "decoder")}
    decode = lambda params, z: (AutoencoderKL(config).apply({"params": params}, z, method="decode"),)
    reference = jax.jit(decode)

    def apply(params, z):
        with device_layers.forms({Upsample: device_layers.folded_upsampling}):
            return decode(params, z)

    def sample(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"latents": rng.standard_normal(latents, np.float32) / np.float32(config.scaling_factor)}

    return Graph(
        name="image_decoder",
        inputs=(TensorSpec("latents", latents, "float32"),),
        outputs=(TensorSpec("image", image, "float32"),),
        params=params,
        apply=apply,
        reference=lambda z: reference(ours, z),
        sample=sample,
        native_ops={
            "Conv": count_leaves(params, r".*(conv|shortcut)[^/]*/kernel$"),
            "InstanceNormalization or LayerNormalization": count_leaves(params, r".*/scale$"),
            "Softmax": 1,
            "DepthToSpace": len(config.block_out_channels) - 1,
        },
        notes={"scaling_factor": config.scaling_factor},
    )
