"""Student, fake model, teacher and text networks of `steps` from config values and model folders."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nd_jax.data.registry import latent_tokenizers
from nd_jax.distill import steps_training as method
from nd_jax.distill.base import Distillation, Role
from nd_jax.distill.folders import tuples
from nd_jax.distill.steps import StepsObjective
from nd_jax.distill.student_history import StudentHistory
from nd_jax.distill.teacher import TeacherModels
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
    """The config with the sizes of folders and latents, and the tokens of the empty prompt, filled in.

    Raises:
      UserError: a folder is not given, is not what it should be, or they do not belong together.
    """
    model, data = dict(config["model"]), dict(config["data"])
    if not model["folder"]:
        raise UserError("config.model.folder is empty: name the teacher's model folder")
    root = Path(model["folder"])
    folder = root / model["transformer"]
    network, sizes = transformer_config(folder)
    model["student"] = model["student"] or str(folder)
    model["fake"] = model["fake"] or model["student"]
    student_network, student_sizes = transformer_config(Path(model["student"]))
    if student_network is not network or dataclasses.replace(student_sizes, num_layers=sizes.num_layers) != sizes:
        raise UserError(
            f"{model['student']} and {folder} differ in more than their number of blocks: "
            "a student starts from the teacher, or from the teacher with blocks taken out"
        )
    if transformer_config(Path(model["fake"])) != (student_network, student_sizes):
        raise UserError(f"{model['fake']} is not of the sizes of {model['student']}: the fake model needs them")
    model |= {
        "network": network.name,
        "mmdit": dataclasses.asdict(sizes),
        "student_mmdit": dataclasses.asdict(student_sizes),
        "video": latent_size(data["latents"], folder, sizes),
        **text_sizes(root),
    }
    data["tokenizers"] = data["tokenizers"] or str(root)
    resolved = dict(config) | {"model": model, "data": data}
    model["negative"] = _tokens(latent_tokenizers(resolved, root), model["negative_prompt"])
    return resolved


def _tokens(tokenizers: Mapping[str, Any], text: str) -> dict[str, list[int]]:
    """Columns of `TEXT_COLUMNS` of one prompt."""
    t5 = tokenizers["tokenize"](text)
    clips = {f"{name}_ids": tokenizers[f"{name}_tokenize"](text)["ids"] for name in ("clip", "clip_2")}
    return {name: column.tolist() for name, column in ({"ids": t5["ids"], "mask": t5["mask"]} | clips).items()}


def networks_from_config(config: Mapping[str, Any]) -> method.StepNetworks:
    """Student, fake model and guided teacher of a resolved config, as functions of their parameters.

    Raises:
      TypeError, ValueError: sizes that do not fit together.
    """
    model = config["model"]
    models = TeacherModels(
        mmdit=MMDiTConfig(**model["mmdit"]),
        text=text_encoders(model),
        video=VideoSize(**model["video"]),
        text_length=config["data"]["max_length"],
        remat=config["remat"],
        attention=config["attention"],
    )
    negative = {name: np.asarray([column], np.int32) for name, column in model["negative"].items()}
    student, dtype = MMDiTConfig(**model["student_mmdit"]), jnp.dtype(config["dtype"])
    return method.StepNetworks(models, student, tuple(model["guidance"]), negative, dtype)


def objective_from_config(config: Mapping[str, Any]) -> StepsObjective:
    """Raises ValueError for numbers that do not fit together."""
    return StepsObjective(**tuples(config["objective"]))


def steps_from_config(config: Mapping[str, Any]) -> Distillation:
    """The method of a resolved config. Reads no weights before a role is loaded.

    Raises:
      UserError: sizes or numbers that do not fit together.
    """
    try:
        networks, chosen = networks_from_config(config), method.StepsMethod(**tuples(config["steps"]))
        return method.steps_training(
            networks,
            objective_from_config(config),
            chosen,
            StudentHistory(**config["student_history"]),
            PyramidSchedule(),
            _roles(config, networks, method.ROLES[chosen.name]),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {error}") from error


def _roles(config: Mapping[str, Any], networks: method.StepNetworks, names: tuple[str, ...]) -> dict[str, Role]:
    model = config["model"]
    root, network, dtype = Path(model["folder"]), network_of(model["network"]), model["frozen_dtype"]
    sizes, student = networks.models.mmdit, networks.student
    make = {
        method.STUDENT: lambda: trained_transformer(Path(model["student"]), network, student),
        method.FAKE: lambda: trained_transformer(Path(model["fake"]), network, student),
        method.TEACHER: lambda: frozen_transformer(root / model["transformer"], network, sizes, dtype),
        method.TEXT: lambda: text_role(root, networks.models.text, dtype),
    }
    return {name: make[name]() for name in names}
