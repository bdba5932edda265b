"""The safety checker of Stable Diffusion: a CLIP vision tower whose picture is compared with fixed concepts.

    e      = W post_norm(blocks(pre_norm([class, patches] + positions))[class])                                 (1)
    cos_k  = e . c_k / (|e| |c_k|)                              17 concepts c_k, and 3 that need special care   (2)
    s_j    = round(cos_j - threshold_j + a, 3) > 0              special care, one after the other; a = 0 until
                                                                one of them is met, then 0.01                   (3)
    unsafe = any of the 17 with round(cos_k - threshold_k + a, 3) > 0                                           (4)

Agrees with `diffusers.pipelines.stable_diffusion.safety_checker.StableDiffusionSafetyChecker`, whose embeddings of
concepts are part of its weights and have no names. Shape letters: B pictures, D width, P projection width.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nd_jax.models import clip_text
from nd_jax.models.clip_text import ACTIVATIONS, clip_blocks
from nd_jax.models.image_layers import LayerNorm

CONCEPTS, SPECIAL_CARE = 17, 3
ADJUSTMENT = 0.01  # a of equation 3.
DECIMALS = 3
SMALLEST_NORM = 1e-12

LOGICAL_AXES = (*clip_text.LOGICAL_AXES, (r"visual_projection/kernel$", ("embed", "mlp")))


@dataclasses.dataclass(frozen=True)
class SafetyCheckerConfig:
    """Names of `transformers.CLIPVisionConfig`, and the width of the projection; the defaults are ViT-L/14's."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {sorted(ACTIVATIONS)}")

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class Scores(NamedTuple):
    """Equation 2 and the thresholds, float32: `concepts` [B, 17], `special_care` [B, 3], and one threshold each."""

    concepts: jax.Array
    special_care: jax.Array
    concept_thresholds: jax.Array
    special_care_thresholds: jax.Array


class SafetyChecker(nn.Module):
    """Equations 1 and 2. Block parameters are stacked on axis 0 (`blocks/...`)."""

    config: SafetyCheckerConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> Scores:
        """Args: pixels [B, S, S, 3], S the config's `image_size`, as `nd_jax.generate.safety.clip_input` makes them."""
        cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(LayerNorm, cfg.layer_norm_eps, self.param_dtype)
        parameter = lambda name, shape, init: self.param(name, init, shape, self.param_dtype)
        small = nn.initializers.normal(0.02)
        sides = dict(kernel_size=(cfg.patch_size,) * 2, strides=(cfg.patch_size,) * 2, padding="VALID")
        patches = nn.Conv(cfg.hidden_size, **sides, use_bias=False, name="patch_embedding", **dtypes)(
            pixels.astype(self.dtype)
        )
        token = parameter("class_embedding", (cfg.hidden_size,), small).astype(self.dtype)
        token = jnp.broadcast_to(token, (len(pixels), 1, cfg.hidden_size))
        x_BLD = jnp.concatenate([token, patches.reshape(len(pixels), -1, cfg.hidden_size)], axis=1)
        x_BLD = x_BLD + parameter("position_embedding", (cfg.tokens, cfg.hidden_size), small).astype(self.dtype)[None]
        x_BLD = norm(name="pre_norm")(x_BLD)
        (x_BLD, _), _ = clip_blocks(cfg, self.dtype, self.param_dtype, is_causal=False)((x_BLD, x_BLD), None)
        pooled_BD = norm(name="post_norm")(x_BLD[:, 0])
        embeds_BP = nn.Dense(cfg.projection_dim, use_bias=False, name="visual_projection", **dtypes)(pooled_BD)
        cosine = lambda name, count: _unit(embeds_BP) @ _unit(parameter(name, (count, cfg.projection_dim), small)).T
        threshold = lambda name, count: parameter(name, (count,), nn.initializers.ones).astype(jnp.float32)
        return Scores(
            cosine("concept_embeds", CONCEPTS),
            cosine("special_care_embeds", SPECIAL_CARE),
            threshold("concept_thresholds", CONCEPTS),
            threshold("special_care_thresholds", SPECIAL_CARE),
        )


def _unit(rows: jax.Array) -> jax.Array:
    rows = rows.astype(jnp.float32)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), SMALLEST_NORM)


def unsafe(scores: Scores) -> np.ndarray:
    """Equations 3 and 4, on the host: bool [B]."""
    concepts, special_care, concept_thresholds, special_care_thresholds = (np.asarray(x, np.float32) for x in scores)
    adjustment = np.zeros(len(concepts), np.float32)
    for cosine, threshold in zip(special_care.T, special_care_thresholds, strict=True):
        met = np.round(cosine - threshold + adjustment, DECIMALS) > 0
        adjustment = np.where(met, np.float32(ADJUSTMENT), adjustment)
    return (np.round(concepts - concept_thresholds + adjustment[:, None], DECIMALS) > 0).any(axis=-1)
