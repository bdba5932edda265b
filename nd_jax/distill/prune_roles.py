"""Student, teacher and text networks of `prune` from config values, a model folder and a pruning plan."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from nd_jax.data.latents import read_manifest
from nd_jax.distill import prune as method
from nd_jax.distill.base import Distillation, Params, Role
from nd_jax.distill.folders import folder_config, folders_hash, text_hash
from nd_jax.distill.pruning_plan import read_plan
from nd_jax.distill.teacher import TRANSFORMER, FlowObjective, TeacherModels
from nd_jax.distill.text_roles import text_encoders, text_role, text_sizes
from nd_jax.errors import UserError
from nd_jax.models.mmdit import LOGICAL_AXES, MMDiTConfig, keep_blocks
from nd_jax.pyramid.layout import VideoSize
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.weights.folder import load_component
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT
from nd_jax.weights.network import Network, abstract_params

NETWORKS = (PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT)


def resolve_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes of folders and latents, and the plan's blocks, filled in.

    Raises:
      UserError: a folder or the plan is not given, is not what it should be, or they do not belong together.
    """
    model, data = dict(config["model"]), dict(config["data"])
    for key, what in (("folder", "the teacher's model folder"), ("plan", "a plan of experiments.prune_plan")):
        if not model[key]:
            raise UserError(f"config.model.{key} is empty: name {what}")
    root, plan = Path(model["folder"]), read_plan(Path(model["plan"]))
    transformer = root / model["transformer"]
    network, sizes = folder_config(transformer, *NETWORKS)
    if plan.num_layers != sizes.num_layers:
        raise UserError(
            f"{model['plan']}: plans for {plan.num_layers} blocks and {transformer} has {sizes.num_layers}: "
            "make a plan for this teacher"
        )
    manifest = read_manifest(Path(data["latents"]))
    latent_frames, height, width, channels = manifest.latent_shape
    if channels != sizes.in_channels:
        raise UserError(
            f"{transformer} takes latents of {sizes.in_channels} channels and {data['latents']} has {channels}: "
            "prepare the latents with the VAE of that model"
        )
    if model["student"]:
        kept = dataclasses.replace(sizes, num_layers=len(plan.kept))
        if folder_config(model["student"], *NETWORKS) != (network, kept):
            raise UserError(
                f"{model['student']}: is not the teacher of {transformer} with the {len(plan.kept)} blocks of "
                f"{model['plan']}: give the transformer that stage 1 trained by this plan"
            )
    model |= {"network": network.name, "mmdit": dataclasses.asdict(sizes), "kept": list(plan.kept)} | text_sizes(root)
    model["video"] = {"latent_frames": latent_frames, "height": height, "width": width}
    data["tokenizers"] = data["tokenizers"] or str(root)
    return dict(config) | {"model": model, "data": data}


def prune_from_config(config: Mapping[str, Any]) -> Distillation:
    """The method of a resolved config. Reads no weights before a role is loaded.

    Raises:
      UserError: sizes that do not fit together, or a bad weight of the loss.
    """
    model, objective = config["model"], dict(config["objective"])
    try:
        models = TeacherModels(
            mmdit=MMDiTConfig(**model["mmdit"]),
            text=text_encoders(model),
            video=VideoSize(**model["video"]),
            text_length=config["data"]["max_length"],
            remat=config["remat"],
            attention=config["attention"],
        )
        objective["stage_ratios"] = tuple(objective["stage_ratios"])
        loss, kept = method.RecoveryLoss(**config["loss"]), tuple(model["kept"])
        return method.recovery_training(
            models,
            kept,
            FlowObjective(**objective),
            loss,
            PyramidSchedule(),
            _roles(config, models, kept, loss.needs_teacher),
            jnp.dtype(config["dtype"]),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {error}") from error


def _roles(config: Mapping[str, Any], models: TeacherModels, kept: tuple[int, ...], teacher: bool) -> dict[str, Role]:
    model = config["model"]
    root = Path(model["folder"])
    network = {n.name: n for n in NETWORKS}[model["network"]]
    folder = root / model["transformer"]
    frozen = model["frozen_dtype"]
    roles = {
        method.STUDENT: _student(model, network, folder, models.mmdit, kept),
        method.TEXT: text_role(root, models.text, frozen),
    }
    if teacher:
        roles[method.TEACHER] = Role(
            abstract={TRANSFORMER: abstract_params(network, models.mmdit, jnp.dtype(frozen))},
            logical_axes=LOGICAL_AXES,
            source=str(folder),
            sha256=lambda: folders_hash([folder]),
            load=lambda: {TRANSFORMER: load_component(folder, network, frozen).params},
        )
    return roles


def _student(
    model: Mapping[str, Any], network: Network, teacher: Path, sizes: MMDiTConfig, kept: tuple[int, ...]
) -> Role:
    """What stage 1 trained, or the blocks of the teacher that the plan keeps."""
    source = Path(model["student"]) if model["student"] else teacher

    def load() -> Params:
        params = load_component(source, network, "float32").params
        return {TRANSFORMER: params if model["student"] else keep_blocks(params, sizes, kept)[0]}

    student = dataclasses.replace(sizes, num_layers=len(kept))
    return Role(
        abstract={TRANSFORMER: abstract_params(network, student)},
        logical_axes=LOGICAL_AXES,
        source=f"{source}, blocks {json.dumps(list(kept))}",
        sha256=lambda: text_hash(folders_hash([source]) + json.dumps(list(kept))),
        load=load,
        trainable=("^",),
    )
