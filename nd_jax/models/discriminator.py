"""A small patch discriminator of single frames, for the adversarial term of the decoder distillation.

Source: the patch discriminator of image translation (arXiv 1611.07004): strided convolutions with leaky ReLUs whose
last one says of every patch how real it is. Its batch norms are left out, because they would tie the rows of a batch
to each other and so to the mesh.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes: `widths` of the convolutions, each of which halves rows and columns."""

    widths: tuple[int, ...] = (64, 128, 256)

    def __post_init__(self):
        if not self.widths:
            raise ValueError("a discriminator needs at least one width")


class Discriminator(nn.Module):
    """Frames [N, H, W, 3] in [-1, 1] -> logits [N, h, w], one a patch; above 0 is real."""

    config: DiscriminatorConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        x, dtypes = frames.astype(self.dtype), dict(dtype=self.dtype, param_dtype=self.param_dtype)
        for k, width in enumerate(self.config.widths):
            x = nn.leaky_relu(nn.Conv(width, (4, 4), (2, 2), name=f"conv_{k}", **dtypes)(x), SLOPE)
        return nn.Conv(1, (3, 3), name="conv_out", **dtypes)(x)[..., 0]
