"""Keeps T5's residual stream inside FP16 by an exact rewrite of its weights.

The stream h of T5 passes 65504, FP16's largest number, and the HTP saturates there without a word. Every
reader of h is an RMS norm, which does not see a common factor s once its epsilon is scaled along:

    n(s h; s^2 eps) = scale * s h / sqrt(s^2 mean(h^2) + s^2 eps) = n(h; eps)                    (1)
    s h_k+1 = s h_k + (s W) f(n(s h_k; s^2 eps))                                                 (2)

so s goes into the embedding and into the kernels that write to h: attention `out` and mlp `down`. For s a power
of two the float32 weights only change their exponent.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.numerics import FP16_MAX
from nd_jax.errors import UserError

# The peak is measured on a few prompts; others may go further.
HEADROOM = 4.0


def choose(option: str, residual_peak: Callable[[], float]) -> tuple[float, float | None]:
    """The factor s and, when it was measured, the peak of |h|.

    Args:
      option: "auto" (largest power of two, at most 1, that keeps the peak below 65504 / 4), "none" (1), or a number.
      residual_peak: measures max |h|; called for "auto" only.

    Raises:
      UserError: not one of these, or a number that is not a positive power of two.
    """
    if option == "none":
        return 1.0, None
    if option == "auto":
        peak_value = residual_peak()
        if not math.isfinite(peak_value):
            raise UserError(f"the residual stream peaks at {peak_value}: the weights are broken, no scale can help")
        return min(1.0, 2.0 ** math.floor(math.log2(FP16_MAX / HEADROOM / max(peak_value, 1e-30)))), peak_value
    try:
        scale = float(option)
    except ValueError:
        scale = 0.0
    if not (0 < scale < math.inf and math.frexp(scale)[0] == 0.5):
        raise UserError(f"residual scale {option!r} is not auto, none or a power of two such as 0.0625")
    return scale, None


def peak(residuals: Callable[..., list[jax.Array]], params: Any, ids: np.ndarray, mask: np.ndarray) -> float:
    """Largest absolute value of the residual stream at block borders over the prompts, taken one at a time.

    Args:
      residuals: (params, ids [1, L], mask [1, L]) -> the stream before the first block and after each.
      params: of `residuals`.
      ids, mask: int32 [N, L].
    """
    largest = jax.jit(lambda *args: jnp.stack([jnp.max(jnp.abs(h)) for h in residuals(*args)]).max())
    return max(float(largest(params, ids[i : i + 1], mask[i : i + 1])) for i in range(len(ids)))


def fold(encoder: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Encoder parameters (blocks as `{"0": ..., ...}`) that carry s h instead of h; equation 2.

    The caller scales the norms' epsilon by s^2 in the config.
    """
    if scale == 1.0:
        return dict(encoder)
    factor = np.float32(scale)

    def scaled(module: Mapping[str, Any], name: str) -> dict[str, Any]:
        return {**module, name: np.asarray(module[name]) * factor}

    def block(params: Mapping[str, Any]) -> dict[str, Any]:
        attention, mlp = params["attention"], params["mlp"]
        return {
            **params,
            "attention": {**attention, "out": scaled(attention["out"], "kernel")},
            "mlp": {**mlp, "down": scaled(mlp["down"], "kernel")},
        }

    return {
        **encoder,
        "token_embedding": scaled(encoder["token_embedding"], "embedding"),
        "blocks": {i: block(params) for i, params in encoder["blocks"].items()},
    }
