"""Distillation 1: a small text encoder and a ContextAdapter in place of T5-XXL and the context embedder.

    t  = CE(T5XXL(prompt))                     teacher: the context that the denoiser was trained on             (1)
    t' = CA(DT5(prompt))                       student; CE(CA(DT5(prompt))) in mode EM                           (2)
    L  = w_mse ||t - t'||^2 + w_cd (1 - cos(t, t')),   a mean over the real (not padded) tokens                  (3)

Source: Neodragon (arXiv 2511.06055), section on text-encoder distillation. Matching T5-XXL's raw output instead of CE's
was unstable there, and so was training without the cosine term.

Modes:
  RM    replace: DT5 is frozen, CA (4096 -> 1536) trains and replaces CE. The deployed one.
  EM    extend: DT5 is frozen, CA (4096 -> 4096) trains and the teacher's CE stays behind it. The paper does not spell
        out where the adapter sits; in front of CE is our reading.
  TDT5  as RM, and DT5 trains too.
  LoRA  as RM, and low-rank updates of DT5's attention and feed-forward kernels train too.

The paper writes ||.||^2; whether that is a sum or a mean over the 1536 channels is not said, so it is a config value
(`mse_reduction`); "mean" is the default, the convention of the field's `mse_loss`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.distill.base import Batch, Distillation, Mean, Params, Role, Roles
from nd_jax.distill.lora import init_lora, merge_lora
from nd_jax.models import context_adapter, t5
from nd_jax.weights import networks

MODES = ("RM", "EM", "TDT5", "LoRA")
LORA_TARGETS = (r"blocks/attention/(query|key|value|out)/kernel$", r"blocks/mlp/(gate|up|down)/kernel$")
_EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class TextEncoderLoss:
    """Weights of equation 3 and the mode."""

    mode: str = "RM"
    mse_weight: float = 1.0
    cosine_weight: float = 0.1
    mse_reduction: str = "mean"
    lora_rank: int = 16
    lora_alpha: float = 16.0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.mse_reduction not in ("mean", "sum"):
            raise ValueError(f"mse_reduction {self.mse_reduction!r} is neither 'mean' nor 'sum'")


def token_cosine(a_BLD: jax.Array, b_BLD: jax.Array) -> jax.Array:
    """Cosine between corresponding tokens, float32 [B, L]."""
    a, b = a_BLD.astype(jnp.float32), b_BLD.astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(a * a, -1) * jnp.sum(b * b, -1) + _EPS)
    return jnp.sum(a * b, -1) / norms


def distillation_loss(
    student_BLD: jax.Array, teacher_BLD: jax.Array, mask_BL: jax.Array, config: TextEncoderLoss
) -> tuple[Mean, dict[str, Mean]]:
    """Equation 3.

    Args:
      student_BLD, teacher_BLD: [B, L, D]; the gradient flows into the student only if the caller differentiates it.
      mask_BL: 1 for real tokens.
      config: weights and reduction.

    Returns:
      The loss and its parts, as sums over real tokens with the number of tokens as weight.
    """
    mask = mask_BL.astype(jnp.float32)
    count = jnp.sum(mask)
    error = student_BLD.astype(jnp.float32) - teacher_BLD.astype(jnp.float32)
    square = jnp.sum(error * error, axis=-1)
    if config.mse_reduction == "mean":
        square = square / student_BLD.shape[-1]
    cosine = token_cosine(student_BLD, teacher_BLD)
    mse = Mean(jnp.sum(square * mask), count)
    distance = Mean(jnp.sum((1.0 - cosine) * mask), count)
    total = Mean(config.mse_weight * mse.total + config.cosine_weight * distance.total, count)
    return total, {"mse": mse, "cosine_distance": distance}


def cross_prompt_cosine(context_BLD: jax.Array, mask_BL: jax.Array) -> Mean:
    """Collapse meter: mean cosine between tokens of different prompts of the batch.

    It is near 1 when the encoder says the same whatever the prompt. With unit tokens u, the sum over all pairs from
    different prompts is |sum_bl u|^2 - sum_b |sum_l u|^2, so no matrix of pairs is built.
    """
    x = context_BLD.astype(jnp.float32)
    mask = mask_BL.astype(jnp.float32)[..., None]
    unit = x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + _EPS) * mask
    per_prompt = jnp.sum(unit, axis=1)
    count = jnp.sum(mask_BL.astype(jnp.float32), axis=1)
    pairs = jnp.sum(count) ** 2 - jnp.sum(count**2)
    return Mean(jnp.sum(jnp.sum(per_prompt, 0) ** 2) - jnp.sum(per_prompt**2), pairs)


def evaluate_contexts(student_BLD: jax.Array, teacher_BLD: jax.Array, mask_BL: jax.Array) -> dict[str, Mean]:
    """Held-out metrics, each a sum with its weight. `signal` and `noise` give the SNR, see `summarize`."""
    mask = mask_BL.astype(jnp.float32)
    count = jnp.sum(mask)
    teacher = teacher_BLD.astype(jnp.float32)
    error = student_BLD.astype(jnp.float32) - teacher
    return {
        "cosine": Mean(jnp.sum(token_cosine(student_BLD, teacher_BLD) * mask), count),
        "mse": Mean(jnp.sum(jnp.mean(error * error, -1) * mask), count),
        "signal": Mean(jnp.sum(jnp.sum(teacher * teacher, -1) * mask), count),
        "noise": Mean(jnp.sum(jnp.sum(error * error, -1) * mask), count),
        "collapse_student": cross_prompt_cosine(student_BLD, mask_BL),
        "collapse_teacher": cross_prompt_cosine(teacher_BLD, mask_BL),
    }


def summarize(means: dict[str, float]) -> dict[str, float]:
    """SNR = 10 log10(signal / noise) in dB, over all held-out tokens, in place of the two powers."""
    signal, noise = means["signal"], means["noise"]
    rest = {k: v for k, v in means.items() if k not in ("signal", "noise")}
    return rest | {"snr_db": 10.0 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))}


def teacher_context(teacher: Params, batch: Batch, config: "TextEncoderModels", dtype: Any) -> jax.Array:
    """Equation 1, float32 [B, L, D]."""
    encoder = t5.T5Encoder(config.teacher, dtype=dtype)
    embedder = context_adapter.ContextEmbedder(config.embedder, dtype=dtype)
    hidden = encoder.apply({"params": teacher["text_encoder"]}, batch["ids"], batch["mask"]).hidden
    return embedder.apply({"params": teacher["context_embedder"]}, hidden).astype(jnp.float32)


def student_context(
    student: Params, batch: Batch, config: "TextEncoderModels", loss: TextEncoderLoss, dtype: Any, embedder: Params
) -> jax.Array:
    """Equation 2, float32 [B, L, D]. `embedder`: the teacher's context embedder, used by mode EM alone."""
    dt5 = student["text_encoder_3"]
    if loss.mode == "LoRA":
        dt5 = merge_lora(dt5, student["lora"], loss.lora_alpha)
    encoder = t5.DistilT5(config.student, dtype=dtype, remat=config.remat)
    adapter = context_adapter.ContextAdapter(config.adapter, dtype=dtype)
    hidden = encoder.apply({"params": dt5}, batch["ids"], batch["mask"])
    context = adapter.apply({"params": student["context_adapter"]}, hidden)
    if loss.mode == "EM":
        context = context_adapter.ContextEmbedder(config.embedder, dtype=dtype).apply({"params": embedder}, context)
    return context.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TextEncoderModels:
    """Sizes of the four networks. Widths must fit together; the constructor checks them."""

    student: t5.DistilT5Config
    adapter: context_adapter.ContextAdapterConfig
    teacher: t5.T5Config
    embedder: context_adapter.ContextEmbedderConfig
    remat: bool = False

    def check(self, mode: str) -> None:
        """Raises ValueError naming the widths that do not fit."""
        target = self.embedder.joint_attention_dim if mode == "EM" else self.embedder.caption_projection_dim
        pairs = (
            (
                "the student's projection_dim",
                self.student.projection_dim,
                "the adapter's input_dims",
                self.adapter.input_dims,
            ),
            ("the teacher's d_model", self.teacher.d_model, "joint_attention_dim", self.embedder.joint_attention_dim),
            ("the adapter's output_dims", self.adapter.output_dims, f"what mode {mode} needs", target),
        )
        for left, a, right, b in pairs:
            if a != b:
                raise ValueError(f"{left} is {a}, but {right} is {b}: set them equal")


def text_encoder_distillation(
    models: TextEncoderModels, loss: TextEncoderLoss, student: Role, teacher: Role, dtype: Any = jnp.float32
) -> Distillation:
    """The method as data.

    Args:
      models: network sizes.
      loss: equation 3 and the mode.
      student: parameters {"text_encoder_3", "context_adapter"[, "lora"]}; its `trainable` is set here from the mode.
      teacher: parameters {"text_encoder", "context_embedder"}, frozen.
      dtype: computation dtype of both.
    """
    models.check(loss.mode)
    trainable = {
        "RM": ("^context_adapter/",),
        "EM": ("^context_adapter/",),
        "TDT5": ("^context_adapter/", "^text_encoder_3/"),
        "LoRA": ("^context_adapter/", "^lora/"),
    }[loss.mode]

    def contexts(roles: Roles, batch: Batch) -> tuple[jax.Array, jax.Array]:
        frozen = jax.lax.stop_gradient(roles["teacher"])
        target = teacher_context(frozen, batch, models, dtype)
        return student_context(roles["student"], batch, models, loss, dtype, frozen["context_embedder"]), target

    def student_loss(roles: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        del key  # nothing is random: dropout is off, as in the deployed networks
        return distillation_loss(*contexts(roles, batch), batch["mask"], loss)

    def evaluate(roles: Roles, batch: Batch) -> dict[str, Mean]:
        return evaluate_contexts(*contexts(roles, batch), batch["mask"])

    def deploy(roles: Roles) -> dict[str, tuple[Any, Any, Params]]:
        params = roles["student"]
        dt5 = params["text_encoder_3"]
        if loss.mode == "LoRA":
            dt5 = jax.tree.map(jax.device_get, merge_lora(dt5, params["lora"], loss.lora_alpha))
        return {
            "text_encoder_3": (networks.DISTIL_T5, models.student, dt5),
            "context_adapter": (networks.CONTEXT_ADAPTER, models.adapter, params["context_adapter"]),
        }

    return Distillation(
        name="text_encoder",
        roles={"student": dataclasses.replace(student, trainable=trainable), "teacher": teacher},
        losses={"student": student_loss},
        schedule=("student",),
        evaluate=evaluate,
        summarize=summarize,
        deploy=deploy,
    )


def init_student(key: jax.Array, models: TextEncoderModels, loss: TextEncoderLoss) -> Params:
    """Random student parameters in float32 (traceable)."""
    keys = jax.random.split(key, 3)
    ids = jnp.zeros((1, 8), jnp.int32)
    hidden = jnp.zeros((1, 8, models.adapter.input_dims))
    params = {
        "text_encoder_3": t5.DistilT5(models.student).init(keys[0], ids, ids)["params"],
        "context_adapter": context_adapter.ContextAdapter(models.adapter).init(keys[1], hidden)["params"],
    }
    if loss.mode == "LoRA":
        params["lora"] = init_lora(keys[2], params["text_encoder_3"], LORA_TARGETS, loss.lora_rank)
    return params


def init_teacher(key: jax.Array, models: TextEncoderModels, dtype: Any) -> Params:
    """Random teacher parameters in `dtype` (traceable): for tests and for runs without released weights."""
    keys = jax.random.split(key, 2)
    ids = jnp.zeros((1, 8), jnp.int32)
    hidden = jnp.zeros((1, 8, models.embedder.joint_attention_dim))
    encoder = t5.T5Encoder(models.teacher, param_dtype=dtype).init(keys[0], ids, ids)["params"]
    embedder = context_adapter.ContextEmbedder(models.embedder, param_dtype=dtype).init(keys[1], hidden)["params"]
    return {"text_encoder": encoder, "context_embedder": embedder}
