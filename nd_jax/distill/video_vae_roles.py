"""The video VAE of `video_vae` from config values: random, or read from a model folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.distill import video_vae as method
from nd_jax.distill.base import Distillation, Params, Role
from nd_jax.distill.folders import folder_config, folders_hash, text_hash, tuples
from nd_jax.errors import UserError
from nd_jax.models.video_vae import LOGICAL_AXES, CausalVideoVAEConfig
from nd_jax.weights.folder import load_component
from nd_jax.weights.vae import CAUSAL_VIDEO_VAE


def resolve_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes of the folder that it names filled in.

    Raises:
      UserError: the folder is not what it should be.
    """
    model = dict(config["model"])
    if model["folder"]:
        _, read = folder_config(model["folder"], CAUSAL_VIDEO_VAE)
        model["vae"] = dataclasses.asdict(read)
    return dict(config) | {"model": model}


def video_vae_from_config(config: Mapping[str, Any]) -> Distillation:
    """The method of a resolved config. Reads no weights before the role is loaded.

    Raises:
      UserError: sizes that do not fit together, or a bad weight of the loss.
    """
    try:
        vae = CausalVideoVAEConfig(**tuples(config["model"]["vae"]))
        loss = method.VideoVAELoss(**config["loss"])
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {error}") from error
    return method.video_vae_training(vae, loss, _role(config, vae), jnp.dtype(config["dtype"]), config["remat"])


def _role(config: Mapping[str, Any], vae: CausalVideoVAEConfig) -> Role:
    seed, folder = config["seed"], config["model"]["folder"]
    init = lambda: method.init_vae(jax.random.key(seed), vae, config["model"]["initial_logvar"])
    common = dict(abstract=jax.eval_shape(init), logical_axes=LOGICAL_AXES)
    if not folder:
        identity = json.dumps([config["model"], seed], sort_keys=True, default=list)
        return Role(source=f"random, seed {seed}", sha256=lambda: text_hash(identity), init=init, **common)

    def load() -> Params:
        params = load_component(Path(folder), CAUSAL_VIDEO_VAE, "float32").params
        return jax.device_get(method.inflate(params)) if config["model"]["inflate"] else params

    return Role(source=folder, sha256=lambda: folders_hash([folder]), load=load, **common)
