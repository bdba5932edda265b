"""The roles of `decoder` from config values and model folders."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.distill import decoder as method
from nd_jax.distill.base import Distillation, Params, Role
from nd_jax.distill.folders import folder_config, folders_hash, text_hash, tuples
from nd_jax.errors import UserError
from nd_jax.models.discriminator import Discriminator, DiscriminatorConfig
from nd_jax.models.lpips import LPIPSConfig
from nd_jax.models.video_vae import LOGICAL_AXES, AsymmetricVideoVAEConfig, CausalVideoVAEConfig
from nd_jax.weights.folder import load_component, read_config
from nd_jax.weights.lpips import LPIPS_VGG16, load_lpips
from nd_jax.weights.network import abstract_params
from nd_jax.weights.taehv import read_taehv, taehv_sizes
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE, CAUSAL_VIDEO_VAE

_ENCODER_FIELDS = [field.name for field in dataclasses.fields(AsymmetricVideoVAEConfig)]


def resolve_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes of the folders that it names filled in.

    Raises:
      UserError: no folder of a video VAE, LPIPS without its weights, or folders that are not what they should be.
    """
    model, loss = dict(config["model"]), config["loss"]
    if not model["folder"]:
        raise UserError(
            "config.model.folder is empty: name the causal_video_vae folder whose encoder stays, "
            "from experiments/configs/video_vae.py or from a released model"
        )
    network, vae = folder_config(model["folder"], CAUSAL_VIDEO_VAE, ASYMMETRIC_VIDEO_VAE)
    model["network"], model["vae"] = network.name, dataclasses.asdict(vae)
    if loss["perceptual"] == "lpips":
        if not model["lpips"]:
            raise UserError(
                "loss.perceptual is 'lpips', whose weights are not part of this repository: make their folder with "
                "python -m converters.import_lpips and name it by --config.model.lpips=DIR, or choose "
                "--config.loss.perceptual=gradient_ssim, which needs no download and is another loss than the paper's"
            )
        model["lpips_sizes"] = dataclasses.asdict(read_config(Path(model["lpips"]), LPIPS_VGG16)[1])
    if model["taehv"]:
        features, doubles = taehv_sizes(Path(model["taehv"]))
        wanted = (features, tuple(d or w for d, w in zip(doubles, model["decoder"]["time_upscale"], strict=True)))
        if wanted != (tuple(model["decoder"]["num_features"]), tuple(model["decoder"]["time_upscale"])):
            raise UserError(
                f"{model['taehv']}: a decoder of widths {list(features)} that doubles the frames in groups "
                f"{list(doubles)} cannot grow into model.decoder {dict(model['decoder'])}: give it these widths"
            )
    return dict(config) | {"model": model}


def decoder_from_config(config: Mapping[str, Any]) -> Distillation:
    """The method of a resolved config. Reads no weights before a role is loaded.

    Raises:
      UserError: sizes that do not fit together, or a bad weight of the loss.
    """
    model = config["model"]
    try:
        loss = method.DecoderLoss(**config["loss"])
        models = _models(config, loss)
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {error}") from error
    roles = {method.ROLE: _student(config, models.vae)}
    if models.native is not None:
        roles[method.NATIVE] = _frozen(model["folder"], CAUSAL_VIDEO_VAE, models.native, ("decoder", "post_quant_conv"))
    if models.lpips is not None:
        load = lambda: load_lpips(Path(model["lpips"]))[1]
        roles[method.LPIPS] = dataclasses.replace(_frozen(model["lpips"], LPIPS_VGG16, models.lpips), load=load)
    if models.discriminator is not None:
        roles[method.DISCRIMINATOR] = _discriminator(config, models.discriminator)
    return method.decoder_training(models, loss, roles, jnp.dtype(config["dtype"]))


def _models(config: Mapping[str, Any], loss: method.DecoderLoss) -> method.DecoderModels:
    model = config["model"]
    encoder = {k: v for k, v in model["vae"].items() if k in _ENCODER_FIELDS}
    decoder = {f"decoder_{name}": value for name, value in model["decoder"].items()}
    native = model["evaluate_native"] and model["network"] == CAUSAL_VIDEO_VAE.name
    return method.DecoderModels(
        vae=AsymmetricVideoVAEConfig(**tuples(encoder | decoder)),
        native=CausalVideoVAEConfig(**tuples(model["vae"])) if native else None,
        lpips=LPIPSConfig(**tuples(model["lpips_sizes"])) if "lpips_sizes" in model else None,
        discriminator=DiscriminatorConfig(**tuples(model["discriminator"])) if loss.adversarial_weight else None,
    )


def _student(config: Mapping[str, Any], vae: AsymmetricVideoVAEConfig) -> Role:
    """Encoder of the folder; decoder of the folder if it has a tiny one of these sizes, of TAEHV, or random."""
    model, seed = config["model"], config["seed"]
    folder, taehv = model["folder"], model["taehv"]
    network = {n.name: n for n in (CAUSAL_VIDEO_VAE, ASYMMETRIC_VIDEO_VAE)}[model["network"]]

    def load() -> Params:
        source = load_component(Path(folder), network, "float32")
        if source.config == vae and not taehv:
            return source.params
        params = jax.device_get(jax.jit(lambda: method.init_decoder(jax.random.key(seed), vae, source.params))())
        if taehv:
            decoder, had = read_taehv(Path(taehv), vae.decoder)
            params["decoder"] = jax.device_get(method.grow_taehv(decoder, had, vae.decoder.time_upscale))
            params["post_quant_conv"] = _identity(params["post_quant_conv"])
        return params

    identity = json.dumps([model["decoder"], seed], sort_keys=True, default=list)
    files = [folder, *([taehv] if taehv else [])]
    return Role(
        abstract=abstract_params(ASYMMETRIC_VIDEO_VAE, vae),
        logical_axes=LOGICAL_AXES,
        source=", ".join(files),
        sha256=lambda: text_hash(folders_hash([folder]) + taehv + identity),
        load=load,
        trainable=method.TRAINABLE,
    )


def _identity(conv: Params) -> Params:
    """A 1 x 1 x 1 convolution that changes nothing: TAEHV reads latents as they are."""
    kernel = jnp.zeros_like(conv["kernel"]).at[..., :, :].set(jnp.eye(conv["kernel"].shape[-1]))
    return jax.device_get({"kernel": kernel, "bias": jnp.zeros_like(conv["bias"])})


def _frozen(folder: str, network: Any, sizes: Any, keep: tuple[str, ...] = ()) -> Role:
    chosen = lambda params: {name: params[name] for name in keep or params}
    return Role(
        abstract=chosen(abstract_params(network, sizes)),
        logical_axes=network.logical_axes,
        source=folder,
        sha256=lambda: folders_hash([folder]),
        load=lambda: chosen(load_component(Path(folder), network, "float32").params),
    )


def _discriminator(config: Mapping[str, Any], sizes: DiscriminatorConfig) -> Role:
    seed = config["seed"]
    init = lambda: Discriminator(sizes).init(jax.random.key(seed + 1), jnp.zeros((1, 32, 32, 3)))["params"]
    identity = json.dumps([config["model"]["discriminator"], seed], sort_keys=True, default=list)
    return Role(
        abstract=jax.eval_shape(init),
        logical_axes=((r"kernel$", (None, None, None, "embed")),),
        source=f"random, seed {seed + 1}",
        sha256=lambda: text_hash(identity),
        init=init,
        trainable=("^",),
    )
