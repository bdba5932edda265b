"""What a stage graph of the video transformer takes from the host, by the layouts that training uses.

One graph serves all units of its stage, the first one too: their tokens are padded to the stage's longest layout, and
what tells the units apart are inputs. In the notation of `nd_jax.models.mmdit_block`:

    logits = q k^T / sqrt(K) + m,   m = 0 where the query may see the key, DEVICE_MASKED_LOGIT elsewhere      (1)
    (a, b) -> (a cos - b sin, a sin + b cos),   a and b: the halves of a head, its channels in another order  (2)
    c = silu(temb)                                                                                            (3)

(2) takes the tables of the layout as they are. Everything but (3) depends on the size of the video and the text's
length alone, so a runner can keep it per unit and stage.

Shape letters: B batch, N image tokens with padding, T text tokens, L = T + N, D model width, K head width.
"""

import functools

import jax
import numpy as np

from nd_jax.models.mmdit import MMDiTConfig, PyramidMMDiT
from nd_jax.pyramid.layout import TokenLayout, VideoSize, pad_layout, token_layout

# The mask goes through FP16 and through 16-bit encodings, where -100 costs nothing and -1e4 costs half of the digits.
# Queries and keys are normalised per head, so that logits stay far below: exp(-100 + 60) is 4e-18.
DEVICE_MASKED_LOGIT = -100.0


def stage_layouts(config: MMDiTConfig, video: VideoSize, stage: int, text_length: int) -> tuple[TokenLayout, ...]:
    """The layout of every unit at a stage, all padded to the longest.

    Raises:
      UserError: a size that the model's spatial table or its patches do not take.
    """
    layouts = [token_layout(config, video.unit_clips(unit, stage), text_length) for unit in range(video.units)]
    envelope = max(layout.length for layout in layouts)
    return tuple(pad_layout(layout, envelope) for layout in layouts)


def geometry_inputs(layout: TokenLayout, text_mask: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs that say where the tokens are, float32.

    Args:
      layout: of a unit.
      text_mask: [B, T], 1 for valid text.

    Returns:
      `positions` [1, N, D], `rotary_cos` and `rotary_sin` [1, N, K / 2], `mask` [B, 1, L, L], equation 1.
    """
    geometry = layout.geometry(np.asarray(text_mask))
    return {
        "positions": geometry.positions,
        "rotary_cos": geometry.rotary_cos,
        "rotary_sin": geometry.rotary_sin,
        "mask": np.where(geometry.mask.dense(), np.float32(0), np.float32(DEVICE_MASKED_LOGIT)),
    }


def conditioning_input(config: MMDiTConfig, params: dict, timestep: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """Equation 3, in float32.

    Args:
      config: of the transformer.
      params: of it; those of the two embedders are enough.
      timestep: float [B], the stage's own, 0..1000.
      pooled: [B, pooled_projection_dim].

    Returns:
      float32 [B, D].
    """
    embedders = {name: params[name] for name in ("timestep_embedder", "pooled_embedder")}
    return np.asarray(_conditioning(config, embedders, np.asarray(timestep, np.float32), np.asarray(pooled)))


@functools.partial(jax.jit, static_argnums=0)
def _conditioning(config: MMDiTConfig, params: dict, timestep: jax.Array, pooled: jax.Array) -> jax.Array:
    return PyramidMMDiT(config).apply({"params": params}, timestep, pooled, method="block_conditioning")
