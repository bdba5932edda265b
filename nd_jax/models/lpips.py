"""LPIPS with the VGG16 trunk: how far apart two pictures look to features that were learned from photographs.

    x'  = (x - shift) / scale                                  ImageNet's colours, for pictures in [-1, 1]           (1)
    f_l = relu(conv(... x')),  l = 0 .. 4                      relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of VGG16  (2)
    n_l = f_l / (sqrt(sum_c f_l^2) + 1e-10)                    at every position                                     (3)
    d   = sum_l mean_hw sum_c w_lc (n_l(a) - n_l(b))^2         w_lc >= 0: heads fitted to people's judgements        (4)

Source: Zhang et al. 2018 (arXiv 1801.03924) in the form of version 0.1 of the `lpips` package with `net="vgg"`. There
are max pools between the five stages and none behind the last. Published heads hold no negative numbers; nothing here
clamps them.

The square root of equation 3 has no derivative where a position's features, or their squares in float32, are all 0.
It is taken as 0 there; the values are those of the formula.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

CONVS = (2, 2, 3, 3, 3)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
NORM_EPSILON = 1e-10
# Four pools halve the sides, and the last stage needs a pixel.
SMALLEST_SIDE = 2 ** (len(CONVS) - 1)

LOGICAL_AXES = ((r"convs_\d+_\d+/kernel$", (None, None, None, "embed")),)


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """Sizes of the trunk.

    Attributes:
      widths: features of the five stages; the published heads fit VGG16's.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)

    def __post_init__(self):
        if len(self.widths) != len(CONVS) or min(self.widths) < 1:
            raise ValueError(f"widths is {list(self.widths)}: give {len(CONVS)} positive numbers of features")


class LPIPS(nn.Module):
    """Equation 4. Parameters `convs_{stage}_{i}` (kernel, bias) and `heads_{stage}` (kernel [1, 1, features, 1]).

    Attributes:
      config: sizes.
      dtype: of the trunk's computation; equations 3 and 4 are float32 whatever it is.
      param_dtype: of initialised parameters.
    """

    config: LPIPSConfig = LPIPSConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        conv = lambda width: nn.Conv(width, (3, 3), dtype=self.dtype, param_dtype=self.param_dtype)
        head = lambda width: nn.Conv(
            features=1,
            kernel_size=(1, 1),
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.constant(1.0 / width),
        )
        widths = self.config.widths
        self.convs = [[conv(width) for _ in range(count)] for width, count in zip(widths, CONVS, strict=True)]
        self.heads = [head(width) for width in widths]

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Distances of pairs of pictures.

        Args:
          a, b: [N, H, W, 3] in [-1, 1], sides of 16 or more.

        Returns:
          float32 [N], 0 for equal pictures.

        Raises:
          ValueError: shapes that differ, are no pictures, or are too small.
        """
        if a.ndim != 4 or a.shape != b.shape or a.shape[-1] != len(SHIFT):
            raise ValueError(f"pictures are {list(a.shape)} and {list(b.shape)}: give two arrays [N, H, W, 3]")
        if min(a.shape[1:3]) < SMALLEST_SIDE:
            raise ValueError(
                f"pictures are {a.shape[1]} x {a.shape[2]} pixels, too small for the pools between VGG16's stages: "
                f"give sides of {SMALLEST_SIDE} or more"
            )
        # Two calls, so that a picture that is not differentiated costs no backward pass.
        pairs = zip(self.heads, self.features(a), self.features(b), strict=True)
        distance = jnp.zeros(a.shape[0], jnp.float32)
        for head, of_a, of_b in pairs:
            difference = jnp.square(_unit(of_a) - _unit(of_b))
            # The head is linear, so the mean over positions may come before it.
            distance = distance + head(difference.mean((1, 2), keepdims=True))[:, 0, 0, 0]
        return distance

    def features(self, x: jax.Array) -> list[jax.Array]:
        """Equations 1 and 2: pictures [N, H, W, 3] -> five arrays [N, H / 2^l, W / 2^l, widths[l]], rounded down."""
        wide = lambda values: jnp.asarray(values, jnp.float32)[None, None, None]
        x = ((x.astype(jnp.float32) - wide(SHIFT)) / wide(SCALE)).astype(self.dtype)
        outputs = []
        for stage in self.convs:
            if outputs:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for conv in stage:
                x = nn.relu(conv(x))
            outputs.append(x)
        return outputs


def _unit(features: jax.Array) -> jax.Array:
    """Equation 3 in float32."""
    features = features.astype(jnp.float32)
    square = jnp.square(features).sum(-1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return features / (norm + NORM_EPSILON)


def lpips_distance(
    params: dict, a_NHWC: jax.Array, b_NHWC: jax.Array, config: LPIPSConfig, dtype: Any = jnp.float32
) -> jax.Array:
    """LPIPS of pairs of pictures in [-1, 1], float32 [N]. See `LPIPS`; differentiable in the pictures everywhere.

    Args:
      params: as of `nd_jax.weights.lpips.load_lpips`.
      a_NHWC, b_NHWC: [N, H, W, 3]; frames of clips go into N.
      config: sizes.
      dtype: of the trunk's computation.

    Raises:
      ValueError: see `LPIPS`.
    """
    return LPIPS(config, dtype=dtype).apply({"params": params}, a_NHWC, b_NHWC)
