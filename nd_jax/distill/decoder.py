"""Distillation 2: a tiny decoder behind the frozen encoder of the video VAE.

    z = E(x) sampled,  y = F(z)                        F: `post_quant_conv` and the tiny decoder                   (1)
    L = w_2 mean (y - x)^2 + w_p P(y, x) + w_a A(y)    a mean over clips                                           (2)
    P = LPIPS, a mean over frames (arXiv 1801.03924), or, where its weights are not at hand,
        the multi-scale gradient and SSIM distance of `nd_jax.distill.perceptual`                                  (3)
    A = - mean d(y),   L_d = mean relu(1 - d(x)) + mean relu(1 + d(y))       hinge losses, off by default          (4)

Source: Neodragon (arXiv 2511.06055), section on the asymmetric decoder: w_2 = w_p = 1, no KL term, no adversary, the
encoder as it is. Only F trains, so that every latent that a denoiser has learned keeps its meaning.

A clip begins where F begins: its first latent frame stands for one video frame and F remembers nothing there. Cut-outs
of videos are encoded anew, each with a first frame of its own; cut-outs of cached latents are the beginning of the
clip that was encoded, anywhere in the picture.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from nd_jax.distill import perceptual
from nd_jax.distill.base import Batch, Distillation, Mean, Params, Role, Roles
from nd_jax.models.discriminator import Discriminator, DiscriminatorConfig
from nd_jax.models.lpips import LPIPSConfig, lpips_distance
from nd_jax.models.video_vae import (
    AsymmetricCausalVideoVAE,
    AsymmetricVideoVAEConfig,
    CausalVideoVAE,
    CausalVideoVAEConfig,
    Posterior,
)
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE

ROLE, DISCRIMINATOR, NATIVE, LPIPS = "vae", "discriminator", "native", "lpips"
COMPONENT = "causal_video_vae"
# F, and nothing of E.
TRAINABLE = (r"^decoder/", r"^post_quant_conv/")
PERCEPTUAL = ("lpips", "gradient_ssim", "none")
# Of videos in [-1, 1].
VIDEO_RANGE = 2.0


@dataclasses.dataclass(frozen=True)
class DecoderLoss:
    """Equation 2.

    Attributes:
      mse_weight: w_2.
      perceptual_weight: w_p.
      perceptual: P: "lpips", "gradient_ssim" or "none".
      scales: of "gradient_ssim".
      adversarial_weight: w_a; a discriminator trains along where it is above 0.
    """

    mse_weight: float = 1.0
    perceptual_weight: float = 1.0
    perceptual: str = "lpips"
    scales: int = 3
    adversarial_weight: float = 0.0

    def __post_init__(self):
        for name in ("mse_weight", "perceptual_weight", "adversarial_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}: use 0 or more")
        if self.perceptual not in PERCEPTUAL:
            raise ValueError(f"loss.perceptual is {self.perceptual!r}: use {' or '.join(map(repr, PERCEPTUAL))}")
        if not self.mse_weight and (not self.perceptual_weight or self.perceptual == "none"):
            raise ValueError("loss.mse_weight is 0 and there is no perceptual term: nothing would be reconstructed")


@dataclasses.dataclass(frozen=True)
class DecoderModels:
    """Sizes of the networks; None where there is none.

    Attributes:
      vae: the encoder, and the student's decoder.
      native: the VAE whose decoder the student is measured against.
      lpips: of equation 3.
      discriminator: of equation 4.
    """

    vae: AsymmetricVideoVAEConfig
    native: CausalVideoVAEConfig | None = None
    lpips: LPIPSConfig | None = None
    discriminator: DiscriminatorConfig | None = None


def decoder_training(
    models: DecoderModels, loss: DecoderLoss, roles: dict[str, Role], dtype: Any = jnp.float32
) -> Distillation:
    """The method as data.

    Batches hold `video` float32 [B, 8k + 1, H, W, 3] in [-1, 1] and, where latents are cached, the posterior of these
    frames, `mean` and `std` float32 [B, k + 1, h, w, C]; otherwise the encoder runs in the step.

    Args:
      models: sizes.
      loss: equation 2.
      roles: "vae", whose encoder stays; "native" and "lpips", frozen, where `models` has them; "discriminator", which
        trains, where it does.
      dtype: computation dtype.
    """
    vae = AsymmetricCausalVideoVAE(models.vae, dtype=dtype)

    def encode(given: Roles, batch: Batch) -> Posterior:
        if "mean" in batch:
            return Posterior(batch["mean"], 2.0 * jnp.log(batch["std"]))
        encoder = jax.lax.stop_gradient({name: given[ROLE][name] for name in ("encoder", "quant_conv")})
        return vae.apply({"params": encoder}, batch["video"], method="encode")

    def decode(given: Roles, latents: jax.Array) -> jax.Array:
        return vae.apply({"params": given[ROLE]}, latents, method="decode").astype(jnp.float32)

    def perceived(given: Roles, y: jax.Array, x: jax.Array) -> jax.Array:  # equation 3, [B]
        if loss.perceptual == "gradient_ssim":
            return perceptual.gradient_ssim_loss(y, x, loss.scales)
        return lpips_of_clips(jax.lax.stop_gradient(given[LPIPS]), y, x, models.lpips, dtype)

    def vae_loss(given: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        x = batch["video"]
        y = decode(given, jax.lax.stop_gradient(encode(given, batch).sample_with_key(key)))
        parts, weights = {"mse": jnp.square(y - x).mean((1, 2, 3, 4))}, {"mse": loss.mse_weight}
        if loss.perceptual != "none" and loss.perceptual_weight:
            parts[loss.perceptual], weights[loss.perceptual] = perceived(given, y, x), loss.perceptual_weight
        if loss.adversarial_weight:
            judged = jax.lax.stop_gradient(given[DISCRIMINATOR])
            parts["adversarial"], weights["adversarial"] = -judge(judged, y), loss.adversarial_weight
        means = {name: _over_clips(part) for name, part in parts.items()}
        total = sum(weights[name] * means[name].total for name in means)
        return Mean(total, jnp.float32(len(x))), means

    def judge(params: Params, video: jax.Array) -> jax.Array:
        """Mean logit of every clip, [B]."""
        return _logits(models.discriminator, params, video, dtype).mean(1)

    def discriminator_loss(given: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        x, params = batch["video"], given[DISCRIMINATOR]
        y = jax.lax.stop_gradient(decode(given, encode(given, batch).sample_with_key(key)))
        real, fake = (_logits(models.discriminator, params, clip, dtype) for clip in (x, y))
        hinge = jax.nn.relu(1 - real).mean(1) + jax.nn.relu(1 + fake).mean(1)  # equation 4
        means = {"real": _over_clips(real.mean(1)), "fake": _over_clips(fake.mean(1))}
        return _over_clips(hinge), means

    def evaluate(given: Roles, batch: Batch) -> dict[str, Mean]:
        x, valid = batch["video"], batch["valid"].astype(jnp.float32)
        latents = encode(given, batch).mean
        over_clips = lambda per_clip: Mean(jnp.sum(per_clip * valid), jnp.sum(valid))
        y = jnp.clip(decode(given, latents), -1.0, 1.0)
        metrics = perceptual.measure_clips(y, x, VIDEO_RANGE)
        if models.lpips is not None:
            metrics["lpips"] = lpips_of_clips(given[LPIPS], y, x, models.lpips, dtype)
        if models.native is not None:
            native = CausalVideoVAE(models.native, dtype=dtype)
            theirs = native.apply({"params": given[NATIVE]}, latents, method="decode").astype(jnp.float32)
            metrics |= {f"native_{k}": v for k, v in perceptual.measure_clips(theirs, x, VIDEO_RANGE).items()}
        return {name: over_clips(per_clip) for name, per_clip in metrics.items()}

    losses = {ROLE: vae_loss} | ({DISCRIMINATOR: discriminator_loss} if loss.adversarial_weight else {})
    return Distillation(
        name="decoder",
        roles=roles,
        losses=losses,
        schedule=tuple(losses),
        evaluate=evaluate,
        summarize=lambda means: means,
        deploy=lambda given: {COMPONENT: (ASYMMETRIC_VIDEO_VAE, models.vae, given[ROLE])},
    )


def lpips_of_clips(params: Params, a: jax.Array, b: jax.Array, config: LPIPSConfig, dtype: Any) -> jax.Array:
    """LPIPS of clips [B, F, H, W, 3] in [-1, 1], a mean over frames: float32 [B]."""
    frames = lambda clip: clip.reshape(-1, *clip.shape[2:])
    return lpips_distance(params, frames(a), frames(b), config, dtype).reshape(a.shape[:2]).mean(1)


def init_decoder(key: jax.Array, config: AsymmetricVideoVAEConfig, native: Params) -> Params:
    """Parameters with a new tiny decoder behind the encoder of `native` (traceable).

    `post_quant_conv` is that of `native`, too: it is a linear map of the latents which a native decoder was trained
    with. The decoder is random but for what `carry_colours` says.
    """
    video = jnp.zeros((1, 1, config.space_factor, config.space_factor, config.encoder_in_channels))
    params = AsymmetricCausalVideoVAE(config).init(key, video)["params"]
    return {**params, "decoder": carry_colours(params["decoder"]), **_kept(native)}


def carry_colours(params: Params) -> Params:
    """A random TAEHV decoder that begins as a linear map from a latent to the colours of its pixels.

    Features lie behind a ReLU, so a colour c takes two of them, its positive part at c and its negative part at C + c,
    C = colours (fewer where the decoder is too narrow). The first convolution makes the pairs, each group passes them
    on, the last convolution takes their differences, and memory blocks begin as the identity. All other features are
    random. A narrow decoder that is random throughout has lost the colours in its first groups, and may settle for
    brightness alone (docs/decoder.md).
    """
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    widths = [kernel.shape[-2] for path, kernel in flat.items() if path.startswith("grow_")]
    last_width, colours = flat["conv_out/kernel"].shape[-2:]
    count = min(colours, min(*widths, last_width) // 2)
    pair = jnp.eye(count)
    for path, kernel in flat.items():
        layer = path.split("/")[0]
        if path.endswith("bias"):
            continue
        if layer.startswith("memory_"):
            flat[path] = jnp.zeros_like(kernel) if "convs_2" in path else kernel
        elif layer == "conv_in":
            flat[path] = _mirror(kernel, count)
        elif layer.startswith("grow_"):
            # The output channels are those of one frame, or of two one after the other.
            for first in range(0, kernel.shape[-1], kernel.shape[-2]):
                kernel = kernel.at[..., first : first + count].set(0.0)
                kernel = kernel.at[..., :count, first : first + count].set(pair)
                kernel = kernel.at[..., count : 2 * count, first : first + count].set(-pair)
            flat[path] = kernel
        elif layer == "conv_out":
            kernel = kernel.at[:, :, : 2 * count].set(0.0)
            flat[path] = kernel.at[1, 1, :count, :count].set(pair).at[1, 1, count : 2 * count, :count].set(-pair)
        else:
            kernel = kernel.at[..., :count].set(0.0)
            flat[path] = _mirror(kernel.at[1, 1, :count, :count].set(pair), count)
    return traverse_util.unflatten_dict(flat, sep="/")


def _mirror(kernel: jax.Array, count: int) -> jax.Array:
    """The `count` outputs behind the first `count` become their negatives."""
    return kernel.at[..., count : 2 * count].set(-kernel[..., :count])


def _kept(native: Params) -> Params:
    return {name: native[name] for name in ("encoder", "quant_conv", "post_quant_conv")}


def grow_time(kernel: jax.Array) -> jax.Array:
    """A growth of a group that did not double the frames, as one that does: both frames start as what the one was.

    `kernel` is [1, 1, C, C] of `grow_{i}` in `nd_jax.models.taehv`; the result is [1, 1, C, 2C].
    """
    return jnp.concatenate([kernel, kernel], axis=-1)


def grow_taehv(params: Params, time_upscale: tuple[bool, ...], wanted: tuple[bool, ...]) -> Params:
    """A public TAEHV decoder as the start of one that makes more frames.

    Every convolution carries over. Where a group shall double the frames and does not, both frames start as copies
    (`grow_time`). In the public checkpoints that is the first group, in front of those that tell frames apart, so at
    first the decoder plays the frames of a latent frame twice. Its videos are in [0, 1] and ours in [-1, 1], so the
    last convolution is mapped.

    Args:
      params: of `TAEHVDecoder`.
      time_upscale: which groups of the checkpoint double the frames.
      wanted: which groups shall.

    Raises:
      ValueError: a group that doubles the frames shall not.
    """
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    for group, (had, wants) in enumerate(zip(time_upscale, wanted, strict=True)):
        if had and not wants:
            raise ValueError(f"group {group} of the TAEHV checkpoint doubles the frames and time_upscale says no")
        if wants and not had:
            flat[f"grow_{group}/kernel"] = grow_time(flat[f"grow_{group}/kernel"])
    flat["conv_out/kernel"] = 2.0 * flat["conv_out/kernel"]
    flat["conv_out/bias"] = 2.0 * flat["conv_out/bias"] - 1.0
    return traverse_util.unflatten_dict(flat, sep="/")


def _over_clips(per_clip: jax.Array) -> Mean:
    return Mean(jnp.sum(per_clip), jnp.float32(len(per_clip)))


def _logits(config: DiscriminatorConfig, params: Params, video: jax.Array, dtype: Any) -> jax.Array:
    """Of every patch of every frame, float32 [B, patches]."""
    frames = video.reshape(-1, *video.shape[2:])
    logits = Discriminator(config, dtype=dtype).apply({"params": params}, frames)
    return logits.astype(jnp.float32).reshape(len(video), -1)
