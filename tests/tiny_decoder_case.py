"""A video VAE with a tiny decoder of a few thousand random weights, for the tests of the device route."""

import jax
import numpy as np

from nd_jax.models.video_vae import AsymmetricVideoVAEConfig
from nd_jax.weights.folder import Component
from nd_jax.weights.network import abstract_params
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE

CHANNELS, HEIGHT, WIDTH = 4, 3, 4


def decoder_component(**changes):
    """Kernels N(0, 1.4 / fan in), so that nothing dies or grows; the residual branches of memory blocks at half."""
    config = AsymmetricVideoVAEConfig(
        **{
            "encoder_out_channels": CHANNELS,
            "encoder_layers_per_block": (1,),
            "encoder_block_out_channels": (8,),
            "encoder_spatial_down_sample": (True,),
            "encoder_temporal_down_sample": (True,),
            "encoder_norm_num_groups": 4,
            "decoder_num_features": (8, 4, 4, 4),
            **changes,
        }
    )
    rng = np.random.default_rng(0)

    def leaf(path, spec):
        scale = 0.1 if path[-1].key == "bias" else 1.4 * np.prod(spec.shape[:-1]) ** -0.5
        scale *= 0.5 if path[-2].key == "convs_2" else 1
        return (scale * rng.standard_normal(spec.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(leaf, abstract_params(ASYMMETRIC_VIDEO_VAE, config))
    return Component(ASYMMETRIC_VIDEO_VAE, config, params)


def clip(frames=3, seed=1, height=HEIGHT, width=WIDTH):
    """De-normalised random latents, float32 [T, h, w, C]."""
    z = np.random.default_rng(seed).standard_normal((frames, height, width, CHANNELS))
    return (3 * z).astype(np.float32)
