"""Student, teacher and text networks of `prune` from config values, a model folder and a pruning plan."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from nd_jax.distill import prune as method
from nd_jax.distill.base import Distillation, Role
from nd_jax.distill.pruning_plan import read_plan
from nd_jax.distill.teacher import FlowObjective, TeacherModels
from nd_jax.distill.text_roles import text_encoders, text_role, text_sizes
from nd_jax.distill.transformer_roles import (
    frozen_transformer,
    latent_size,
    network_of,
    trained_transformer,
    transformer_config,
)
from nd_jax.errors import UserError
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.pyramid.layout import VideoSize
from nd_jax.pyramid.schedule import PyramidSchedule


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
    network, sizes = transformer_config(transformer)
    if plan.num_layers != sizes.num_layers:
        raise UserError(
            f"{model['plan']}: plans for {plan.num_layers} blocks and {transformer} has {sizes.num_layers}: "
            "make a plan for this teacher"
        )
    video = latent_size(data["latents"], transformer, sizes)
    if model["student"]:
        kept = dataclasses.replace(sizes, num_layers=len(plan.kept))
        if transformer_config(Path(model["student"])) != (network, kept):
            raise UserError(
                f"{model['student']}: is not the teacher of {transformer} with the {len(plan.kept)} blocks of "
                f"{model['plan']}: give the transformer that stage 1 trained by this plan"
            )
    model |= {"network": network.name, "mmdit": dataclasses.asdict(sizes), "kept": list(plan.kept)} | text_sizes(root)
    model["video"] = video
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
    network, folder = network_of(model["network"]), root / model["transformer"]
    sizes = dataclasses.replace(models.mmdit, num_layers=len(kept))
    roles = {
        # What stage 1 trained, or the blocks of the teacher that the plan keeps.
        method.STUDENT: trained_transformer(Path(model["student"]), network, sizes)
        if model["student"]
        else trained_transformer(folder, network, sizes, kept),
        method.TEXT: text_role(root, models.text, model["frozen_dtype"]),
    }
    if teacher:
        roles[method.TEACHER] = frozen_transformer(folder, network, models.mmdit, model["frozen_dtype"])
    return roles
