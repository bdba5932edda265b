"""The sampler of the first frame: latent consistency models (Luo et al. 2023, arXiv:2310.04378) as pure functions.

With beta_k the squares of N equal steps from sqrt(beta_start) to sqrt(beta_end):

    abar(t)  = prod_{k <= t} (1 - beta_k)                                                               (1)
    x0       = (x - sqrt(1 - abar) e) / sqrt(abar)             e: predicted noise                        (2)
    s        = timestep_scaling * t,   c_skip = h^2 / (s^2 + h^2),   c_out = s / sqrt(s^2 + h^2),  h = 1/2  (3)
    denoised = c_skip x + c_out x0                                                                      (4)
    x'       = sqrt(abar(t')) denoised + sqrt(1 - abar(t')) z,   t' the next timestep, z fresh noise      (5)

The last step ends at (4). Sampling starts from standard normal noise. Agrees with `diffusers.LCMScheduler`. The
released first-frame pipeline uses `SSD_1B` with 4 steps: timesteps 999, 749, 499, 249.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError
from nd_jax.weights.network import strict_config_fields

SIGMA_DATA = 0.5  # h of equation 3

PREDICTIONS = ("epsilon", "sample", "v_prediction")

# What the public class can be told and this one always is.
FIXED = {
    "beta_schedule": ("scaled_linear",),
    "clip_sample": (False,),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
    "trained_betas": (None,),
}
# Settings that the public class takes from other schedulers and does not use, or only with those above.
UNUSED = (
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),
    *("set_alpha_to_one", "steps_offset", "timestep_spacing"),
)


@dataclasses.dataclass(frozen=True)
class LCMConfig:
    """Names and defaults of `diffusers.LCMScheduler`.

    Attributes:
      num_train_timesteps: N of equation 1.
      original_inference_steps: timesteps of the distillation; those of sampling are chosen among them.
      prediction_type: what the network predicts: the noise, the clean latents, or sqrt(abar) e - sqrt(1 - abar) x0.

    Raises:
      UserError: values that make no schedule.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    original_inference_steps: int = 50
    prediction_type: str = "epsilon"
    timestep_scaling: float = 10.0

    def __post_init__(self):
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise UserError(
                f"original_inference_steps is {self.original_inference_steps}: give 1 to num_train_timesteps, "
                f"{self.num_train_timesteps}"
            )
        if self.prediction_type not in PREDICTIONS:
            raise UserError(f"prediction_type is {self.prediction_type!r}: give one of {', '.join(PREDICTIONS)}")


SSD_1B = LCMConfig(original_inference_steps=4)


def read_lcm_config(json: Mapping[str, Any]) -> LCMConfig:
    """The config of a scheduler_config.json.

    Raises:
      UserError: a setting that is not known here, or a value that is not supported.
    """
    return LCMConfig(**strict_config_fields(LCMConfig, json, {}, FIXED, UNUSED))


def alphas_cumprod(config: LCMConfig) -> np.ndarray:
    """Equation 1 for every timestep: float32 [N], accumulated in float32 as the public code does."""
    roots = np.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), config.num_train_timesteps)
    return np.cumprod(1 - np.square(roots.astype(np.float32)), dtype=np.float32)


def lcm_timesteps(config: LCMConfig, steps: int) -> tuple[int, ...]:
    """Timesteps of a number of steps: spread evenly over those of the distillation, the noisiest first.

    Raises:
      UserError: more steps than the distillation had, or none.
    """
    original = config.original_inference_steps
    if not 1 <= steps <= original:
        raise UserError(f"{steps} steps: give 1 to {original} (original_inference_steps), or a list of timesteps")
    stride = config.num_train_timesteps // original
    places = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    return tuple(int(original - place) * stride - 1 for place in places)


def boundary_scalings(config: LCMConfig, timesteps: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Equation 3: (c_skip, c_out), float64 of the shape of `timesteps`."""
    scaled = np.asarray(timesteps, np.float64) * config.timestep_scaling
    total = np.square(scaled) + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / np.sqrt(total)


class LCMSchedule(NamedTuple):
    """The numbers of every step, [steps]; float32 but for the timesteps, which are int32.

    Attributes:
      timesteps: falling.
      signal, noise: sqrt(abar) and sqrt(1 - abar) at the timesteps.
      c_skip, c_out: equation 3.
      next_signal, next_noise: of equation 5; 1 and 0 for the last step, which makes it equation 4.
    """

    timesteps: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    c_skip: np.ndarray
    c_out: np.ndarray
    next_signal: np.ndarray
    next_noise: np.ndarray


def lcm_schedule(config: LCMConfig, timesteps: int | tuple[int, ...]) -> LCMSchedule:
    """The numbers of a number of steps, or of timesteps given one by one.

    Raises:
      UserError: see `lcm_timesteps`; timesteps that do not fall or do not exist.
    """
    if isinstance(timesteps, int):
        timesteps = lcm_timesteps(config, timesteps)
    falling = all(later < earlier for earlier, later in itertools.pairwise(timesteps))
    if not timesteps or not falling or timesteps[0] >= config.num_train_timesteps or timesteps[-1] < 0:
        raise UserError(f"timesteps {list(timesteps)}: give falling numbers of {config.num_train_timesteps - 1}..0")
    abar = alphas_cumprod(config)[list(timesteps)]
    after = np.append(abar[1:], np.float32(1))
    pairs = (
        np.sqrt(abar),
        np.sqrt(1 - abar),
        *boundary_scalings(config, timesteps),
        np.sqrt(after),
        np.sqrt(1 - after),
    )
    return LCMSchedule(np.asarray(timesteps, np.int32), *(array.astype(np.float32) for array in pairs))


def lcm_step(
    config: LCMConfig,
    schedule: LCMSchedule,
    step: int | jax.Array,
    sample: jax.Array,
    prediction: jax.Array,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Equations 2 to 5: (the sample of the next step, the denoised sample).

    Args:
      config: of the schedule.
      schedule: of `lcm_schedule`.
      step: its number from 0, which may be traced.
      sample: x, float32 of any shape.
      prediction: of the network at this step, the shape of `sample`.
      noise: z, standard normal. None is for the last step alone, where any z changes nothing.
    """
    signal, sigma, c_skip, c_out, next_signal, next_noise = (jnp.asarray(numbers)[step] for numbers in schedule[1:])
    clean = {
        "epsilon": lambda: (sample - sigma * prediction) / signal,  # equation 2
        "sample": lambda: prediction,
        "v_prediction": lambda: signal * sample - sigma * prediction,
    }[config.prediction_type]()
    denoised = c_skip * sample + c_out * clean
    return (denoised if noise is None else next_signal * denoised + next_noise * noise), denoised


def guidance_embedding(guidance_scale: jax.Array, channels: int) -> jax.Array:
    """What networks with `time_cond_proj_dim` are told of the guidance scale: float [B] -> float32 [B, channels].

    Sines first, of 1000 (scale - 1) and frequencies 10000^(-i / (half - 1)), unlike the sinusoid of timesteps; as in
    the public LCM pipelines. The first-frame UNet whose layout is known takes none. `channels` is even, at least 4.
    """
    half = channels // 2
    frequency = np.exp(-math.log(10000.0) * np.arange(half) / (half - 1)).astype(np.float32)
    angle = (guidance_scale.astype(jnp.float32) - 1)[:, None] * 1000 * frequency[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
