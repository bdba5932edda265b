"""Denoiser and text networks of teacher training from config values: random, or read from a model folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.data.latents import read_manifest
from nd_jax.distill import teacher as method
from nd_jax.distill.base import Distillation, Params, Role
from nd_jax.distill.folders import folder_config, folders_hash, text_hash
from nd_jax.distill.teacher import TEXT_NETWORKS, TRANSFORMER
from nd_jax.errors import UserError
from nd_jax.models import mmdit, t5, text_conditioning
from nd_jax.models.clip_text import CLIPTextConfig
from nd_jax.pyramid.layout import VideoSize
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.weights import networks
from nd_jax.weights.folder import load_component
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT

LOGICAL_AXES = mmdit.LOGICAL_AXES + text_conditioning.LOGICAL_AXES


def resolve_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes of the latents and of the folders that it names filled in.

    Raises:
      UserError: a folder is not what it should be.
    """
    model = dict(config["model"])
    manifest = read_manifest(Path(config["data"]["latents"]))
    latent_frames, height, width, channels = manifest.latent_shape
    model["video"] = {"latent_frames": latent_frames, "height": height, "width": width}
    model["mmdit"] = {**model["mmdit"], "in_channels": channels}
    if model["transformer_folder"]:
        read = folder_config(model["transformer_folder"], PYRAMID_FLOW_MMDIT)[1]
        if read.in_channels != channels:
            raise UserError(
                f"{model['transformer_folder']} takes latents of {read.in_channels} channels and "
                f"{config['data']['latents']} has {channels}: prepare the latents with the VAE of that model"
            )
        model["mmdit"] = {k: v for k, v in dataclasses.asdict(read).items() if k != "context_embedder"}
    if model["text_folder"]:
        for name in TEXT_NETWORKS:
            _, sizes = folder_config(Path(model["text_folder"]) / name, _network(name))
            model[name] = dataclasses.asdict(sizes)
    return dict(config) | {"model": model}


def teacher_from_config(config: Mapping[str, Any]) -> Distillation:
    """The method of a resolved config. Reads no weights before a role is loaded.

    Raises:
      UserError: sizes that do not fit together.
    """
    model, objective = config["model"], dict(config["objective"])
    try:
        text = text_conditioning.TextEncoders(
            text_encoder=CLIPTextConfig(**model["text_encoder"]),
            text_encoder_2=CLIPTextConfig(**model["text_encoder_2"]),
            text_encoder_3=t5.T5Config(**model["text_encoder_3"]),
        )
        models = method.TeacherModels(
            mmdit=mmdit.MMDiTConfig(**model["mmdit"], context_embedder=True),
            text=text,
            video=VideoSize(**model["video"]),
            text_length=config["data"]["max_length"],
            remat=config["remat"],
            attention=config["attention"],
        )
        objective["stage_ratios"] = tuple(objective["stage_ratios"])
        return method.teacher_training(
            models,
            method.FlowObjective(**objective),
            PyramidSchedule(),
            _denoiser(config, models),
            None if model["train_text"] else _text_role(config, models),
            dtype=jnp.dtype(config["dtype"]),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {error}") from error


def _denoiser(config: Mapping[str, Any], models: method.TeacherModels) -> Role:
    model = config["model"]

    def init() -> Params:
        key, text_key = jax.random.split(jax.random.key(config["seed"]))
        params = {TRANSFORMER: method.init_transformer(key, models.mmdit)}
        return params | (method.init_text(text_key, models.text) if model["train_text"] else {})

    folders = {TRANSFORMER: Path(model["transformer_folder"])} if model["transformer_folder"] else {}
    if model["train_text"] and model["text_folder"]:
        folders |= {name: Path(model["text_folder"]) / name for name in TEXT_NETWORKS}
    return _role(config, folders, init, "float32", trainable=("^",))


def _text_role(config: Mapping[str, Any], models: method.TeacherModels) -> Role:
    model, dtype = config["model"], config["model"]["text_param_dtype"]
    init = lambda: method.init_text(jax.random.key(model["text_seed"]), models.text, jnp.dtype(dtype))
    folders = {name: Path(model["text_folder"]) / name for name in TEXT_NETWORKS} if model["text_folder"] else {}
    return _role(config, folders, init, dtype, trainable=())


def _role(config: Mapping[str, Any], folders: Mapping[str, Path], init, dtype: str, trainable: tuple) -> Role:
    """What a folder gives is read from it; the rest is random."""
    common = dict(abstract=jax.eval_shape(init), logical_axes=LOGICAL_AXES, trainable=trainable)
    if not folders:
        identity = json.dumps([config["model"], config["seed"]], sort_keys=True, default=list)
        return Role(source=f"random, seed {config['seed']}", sha256=lambda: text_hash(identity), init=init, **common)

    def load() -> Params:
        params = {} if set(folders) >= set(common["abstract"]) else jax.device_get(jax.jit(init)())
        for name, folder in folders.items():
            params[name] = load_component(folder, _network(name), dtype).params
        return params

    source = ", ".join(str(folder) for folder in folders.values())
    return Role(source=source, sha256=lambda: folders_hash(folders.values()), load=load, **common)


def _network(name: str) -> networks.Network:
    known = {TRANSFORMER: PYRAMID_FLOW_MMDIT, "text_encoder_3": networks.T5_ENCODER}
    return known.get(name, networks.CLIP_TEXT)
