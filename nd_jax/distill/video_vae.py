"""Training of the causal video VAE, which the denoiser's latents come from.

    q(z|x) = N(mean, exp(logvar)),   z = mean + exp(logvar / 2) * noise,   y = D(z)                              (1)
    L1 = mean |y - x|,   L2 = mean (y - x)^2                             over all values of a clip               (2)
    Lg = 1/S sum_s mean |d_s y - d_s x|,   d_s: differences of neighbours in rows and columns,
         of the frames averaged over 2^s x 2^s pixels, s = 0 .. S - 1                                            (3)
    K  = KL(q(z|x) || N(0, 1)) in nats, divided by the number of latent values                                   (4)
    L  = w_1 L1 + w_2 L2 + w_g Lg + beta K,   a mean over clips                                                  (5)

Videos are in [-1, 1]. Source: the reconstruction and KL terms of latent diffusion's autoencoder (arXiv 2112.10752),
which Pyramid-Flow's VAE is trained with too. Their perceptual and adversarial terms need a network that is trained on
other data and a discriminator; equation 3 stands in for what they do to edges.

Public trainings weigh sums over a clip: their `kl_weight` 1e-6 is beta = 1e-6 * latent values / video values here.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from nd_jax.distill.base import Batch, Distillation, Mean, Params, Role, Roles
from nd_jax.models.video_vae import CausalVideoVAE, CausalVideoVAEConfig
from nd_jax.weights.vae import CAUSAL_VIDEO_VAE

ROLE = "vae"
COMPONENT = "causal_video_vae"
# Kernels that end the residual branches of `vae_layers`.
BRANCH_ENDS = ("conv2/kernel", "attention/out/kernel")
# Peak to peak, of the signal-to-noise ratio.
VIDEO_RANGE = 2.0


@dataclasses.dataclass(frozen=True)
class VideoVAELoss:
    """Weights of equation 5, and S of equation 3."""

    l1_weight: float = 1.0
    mse_weight: float = 0.0
    gradient_weight: float = 0.0
    gradient_scales: int = 3
    kl_weight: float = 1e-6

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"loss.{field.name} is {getattr(self, field.name)}: use 0 or more")
        if not self.l1_weight + self.mse_weight > 0:
            raise ValueError("loss.l1_weight and loss.mse_weight are both 0: nothing would be reconstructed")
        if self.gradient_scales < 1:
            raise ValueError(f"loss.gradient_scales is {self.gradient_scales}: use 1 or more")


def gradient_distance(a_BFHWC: jax.Array, b_BFHWC: jax.Array, scales: int) -> jax.Array:
    """Equation 3 for every clip, [B]; the frames' sides divide by 2^(scales - 1)."""
    error = a_BFHWC - b_BFHWC  # Averages and differences are linear.
    total = jnp.zeros(error.shape[0], error.dtype)
    for scale in range(scales):
        if scale:
            batch, frames, height, width, channels = error.shape
            halves = error.reshape(batch, frames, height // 2, 2, width // 2, 2, channels)
            error = halves.mean((3, 5))
        rows, columns = jnp.abs(jnp.diff(error, axis=2)), jnp.abs(jnp.diff(error, axis=3))
        count = rows[0].size + columns[0].size
        total = total + (rows.sum((1, 2, 3, 4)) + columns.sum((1, 2, 3, 4))) / count
    return total / scales


def autoencoder_loss(
    reconstruction: jax.Array, video: jax.Array, kl_B: jax.Array, latent_values: int, config: VideoVAELoss
) -> tuple[Mean, dict[str, Mean]]:
    """Equation 5 and its parts, as sums over clips with the number of clips as weight.

    Args:
      reconstruction, video: [B, F, H, W, 3] in [-1, 1].
      kl_B: nats of every clip, summed over its latents.
      latent_values: of a clip.
      config: weights.
    """
    reconstruction, video = reconstruction.astype(jnp.float32), video.astype(jnp.float32)
    error = reconstruction - video
    count = jnp.float32(len(video))
    over_clips = lambda per_clip: Mean(jnp.sum(per_clip), count)
    parts = {
        "l1": over_clips(jnp.abs(error).mean((1, 2, 3, 4))),
        "mse": over_clips(jnp.square(error).mean((1, 2, 3, 4))),
        "kl": over_clips(kl_B / latent_values),
    }
    weights = {"l1": config.l1_weight, "mse": config.mse_weight, "kl": config.kl_weight}
    if config.gradient_weight:
        parts["gradient"] = over_clips(gradient_distance(reconstruction, video, config.gradient_scales))
        weights["gradient"] = config.gradient_weight
    total = sum(weights[name] * parts[name].total for name in parts)
    return Mean(total, count), parts


def evaluate_autoencoder(
    reconstruction: jax.Array, video: jax.Array, mean: jax.Array, logvar: jax.Array, valid_B: jax.Array
) -> dict[str, Mean]:
    """Held-out metrics over the clips where `valid_B`; `summarize` turns moments into ratios and deviations.

    Args:
      reconstruction: from the posterior's mean; video: both [B, F, H, W, 3] in [-1, 1].
      mean, logvar: of the posterior, [B, T, h, w, C].
      valid_B: bool.
    """
    valid = valid_B.astype(jnp.float32)
    over_clips = lambda per_clip: Mean(jnp.sum(per_clip * valid), jnp.sum(valid))
    axes = (1, 2, 3, 4)
    error = jnp.clip(reconstruction.astype(jnp.float32), -1.0, 1.0) - video.astype(jnp.float32)
    variance = jnp.exp(logvar)
    return {
        "l1": over_clips(jnp.abs(error).mean(axes)),
        "mse": over_clips(jnp.square(error).mean(axes)),
        "kl": over_clips(0.5 * (jnp.square(mean) + variance - 1.0 - logvar).mean(axes)),
        "latent_mean": over_clips(mean.mean(axes)),
        # Second moment of samples, not of means: what the denoiser is trained on.
        "latent_square": over_clips((jnp.square(mean) + variance).mean(axes)),
    }


def summarize(means: dict[str, float]) -> dict[str, float]:
    """PSNR in dB over all held-out values in place of `mse`, the latents' deviation in place of their square."""
    rest = {name: value for name, value in means.items() if name not in ("mse", "latent_square")}
    return rest | {
        "psnr_db": 10.0 * math.log10(VIDEO_RANGE**2 / max(means["mse"], 1e-30)),
        "latent_std": math.sqrt(max(means["latent_square"] - means["latent_mean"] ** 2, 0.0)),
    }


def video_vae_training(
    config: CausalVideoVAEConfig, loss: VideoVAELoss, vae: Role, dtype: Any = jnp.float32, remat: bool = False
) -> Distillation:
    """The method as data. Batches hold `video` float32 [B, 8k + 1, H, W, 3] in [-1, 1].

    Args:
      config: sizes.
      loss: equation 5.
      vae: parameters of `CausalVideoVAE`; all of them train.
      dtype: computation dtype.
      remat: recompute residual blocks in the backward pass.
    """
    model = CausalVideoVAE(config, dtype=dtype, remat=remat)

    def vae_loss(roles: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        params = {"params": roles[ROLE]}
        posterior = model.apply(params, batch["video"], method="encode")
        reconstruction = model.apply(params, posterior.sample_with_key(key), method="decode")  # equation 1
        latent_values = posterior.mean[0].size
        return autoencoder_loss(reconstruction, batch["video"], posterior.kl(), latent_values, loss)

    def evaluate(roles: Roles, batch: Batch) -> dict[str, Mean]:
        params = {"params": roles[ROLE]}
        posterior = model.apply(params, batch["video"], method="encode")
        reconstruction = model.apply(params, posterior.mean, method="decode")
        return evaluate_autoencoder(reconstruction, batch["video"], *posterior, batch["valid"])

    return Distillation(
        name="video_vae",
        roles={ROLE: dataclasses.replace(vae, trainable=("^",))},
        losses={ROLE: vae_loss},
        schedule=(ROLE,),
        evaluate=evaluate,
        summarize=summarize,
        deploy=lambda roles: {COMPONENT: (CAUSAL_VIDEO_VAE, config, roles[ROLE])},
    )


def init_vae(key: jax.Array, config: CausalVideoVAEConfig, initial_logvar: float = 0.0) -> Params:
    """Random parameters in float32 (traceable).

    Residual branches start closed and kernels see no frame but the present one, so that at first both halves are short
    chains of 2D convolutions, in which a video's colours are not small beside what the norms make of random kernels.

    Args:
      key: of the kernels.
      config: sizes.
      initial_logvar: what is added to every latent's log variance, which is near 0 otherwise. Noise that is as large as
        the untrained means hides them from the decoder, and a strong KL term then has nothing to work against.
    """
    video = jnp.zeros((1, config.time_factor + 1, config.space_factor, config.space_factor, config.encoder_in_channels))
    flat = traverse_util.flatten_dict(CausalVideoVAE(config).init(key, video)["params"], sep="/")
    for path, x in flat.items():
        if path.endswith(BRANCH_ENDS):
            flat[path] = jnp.zeros_like(x)
        elif x.ndim == 5:  # A convolution's kernel, whose last time step is the present.
            flat[path] = x.at[:-1].set(0)
    flat["quant_conv/bias"] = flat["quant_conv/bias"].at[config.encoder_out_channels :].add(initial_logvar)
    return traverse_util.unflatten_dict(flat, sep="/")


def inflate(params: Params) -> Params:
    """A VAE that was trained on clips of one frame, as a start for longer ones.

    The first frame of a clip is the later one of the pair that a temporal upsampling makes, so single frames train the
    channels of that one alone; here the earlier one gets the same.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, x in flat.items():
        if re.search(r"decoder/up_\d+_time/conv/", path):
            later = x.reshape(*x.shape[:-1], -1, 2)[..., 1:]  # Channels in the order (c, time).
            flat[path] = jnp.broadcast_to(later, (*later.shape[:-1], 2)).reshape(x.shape)
    return traverse_util.unflatten_dict(flat, sep="/")
