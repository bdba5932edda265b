"""Student and teacher of the text-encoder distillation from config values: random, or read from model folders."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.distill import text_encoder as method
from nd_jax.distill.base import Distillation, Params, Role
from nd_jax.distill.folders import folder_config, folders_hash, text_hash
from nd_jax.errors import UserError
from nd_jax.models import context_adapter, t5
from nd_jax.weights import networks
from nd_jax.weights.folder import load_component, read_config

LOGICAL_AXES = t5.LOGICAL_AXES + context_adapter.LOGICAL_AXES


def resolve_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes of the folders that it names filled in.

    A saved config then says everything about the networks: an export needs no teacher folder.

    Raises:
      UserError: a folder is not what it should be.
    """
    teacher, student = dict(config["teacher"]), dict(config["student"])
    if bool(teacher["text_encoder"]) != bool(teacher["mmdit"]):
        raise UserError(
            f"teacher.text_encoder is {teacher['text_encoder']!r} and teacher.mmdit {teacher['mmdit']!r}: "
            "give both folders, or neither for a random teacher"
        )
    if teacher["text_encoder"]:
        _, encoder = folder_config(teacher["text_encoder"], networks.T5_ENCODER)
        embedder = _embedder_config(teacher["mmdit"])
        teacher |= {"encoder": dataclasses.asdict(encoder), "context_dim": embedder.caption_projection_dim}
        if embedder.joint_attention_dim != encoder.d_model:
            raise UserError(
                f"{teacher['mmdit']} embeds {embedder.joint_attention_dim} channels, but {teacher['text_encoder']} has "
                f"d_model {encoder.d_model}: give the text encoder that this denoiser was trained with"
            )
    if student["text_encoder_3"]:
        network, read = folder_config(student["text_encoder_3"], networks.DISTIL_T5, networks.T5_ENCODER)
        if network is networks.DISTIL_T5:
            student |= {"encoder": dataclasses.asdict(read.encoder), "projection_dim": read.projection_dim}
        else:
            student["encoder"] = dataclasses.asdict(read)
    if student["context_adapter"]:
        _, adapter = folder_config(student["context_adapter"], networks.CONTEXT_ADAPTER)
        student["adapter"] = dataclasses.asdict(adapter)
    return dict(config) | {"teacher": teacher, "student": student}


def text_encoder_from_config(config: Mapping[str, Any]) -> Distillation:
    """The method of a resolved config. Reads no file before a role is loaded.

    Raises:
      UserError: an unknown mode, or widths that do not fit together.
    """
    try:
        loss = method.TextEncoderLoss(**config["loss"])
        models = models_from_config(config, loss.mode)
        models.check(loss.mode)
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {error}") from error
    return method.text_encoder_distillation(
        models, loss, _student(config, models, loss), _teacher(config, models), dtype=jnp.dtype(config["dtype"])
    )


def models_from_config(config: Mapping[str, Any], mode: str) -> method.TextEncoderModels:
    """Sizes of the four networks of a resolved config; `mode` says what the adapter stands for."""
    teacher, student = config["teacher"], config["student"]
    teacher_config = t5.T5Config(**teacher["encoder"])
    embedder = context_adapter.ContextEmbedderConfig(teacher_config.d_model, teacher["context_dim"])
    width = embedder.joint_attention_dim if mode == "EM" else embedder.caption_projection_dim
    adapter = {k: tuple(v) if isinstance(v, list) else v for k, v in student["adapter"].items()}
    defaults = {
        "input_dims": student["projection_dim"],
        "output_dims": width,
        "skips": (True,) * len(adapter["layer_depths"]),
    }
    return method.TextEncoderModels(
        student=t5.DistilT5Config(t5.T5Config(**student["encoder"]), student["projection_dim"]),
        adapter=context_adapter.ContextAdapterConfig(**(defaults | adapter)),
        teacher=teacher_config,
        embedder=embedder,
        remat=config["remat"],
    )


def _embedder_config(folder: str) -> context_adapter.ContextEmbedderConfig:
    """Of a folder that holds the teacher's whole transformer; only this part of it has to be readable."""
    network = networks.CONTEXT_EMBEDDER
    _, config, raw = read_config(Path(folder), network)
    found = networks.class_name(raw)
    if found not in network.class_names:
        raise UserError(f"{folder} holds a {found}, but {' or '.join(network.class_names)} is needed there")
    return config


def _student(config: Mapping[str, Any], models: method.TextEncoderModels, loss: method.TextEncoderLoss) -> Role:
    seed = config["seed"]
    init = lambda: method.init_student(jax.random.key(seed), models, loss)
    folders = {k: config["student"][k] for k in ("text_encoder_3", "context_adapter") if config["student"][k]}
    common = dict(abstract=jax.eval_shape(init), logical_axes=LOGICAL_AXES)
    if not folders:
        sizes = json.dumps({k: v for k, v in config["student"].items()}, sort_keys=True, default=list)
        return Role(source=f"random, seed {seed}", sha256=lambda: text_hash(sizes + str(seed)), init=init, **common)

    def load() -> Params:
        # What no folder gives (an adapter from scratch, a projection behind flan-t5-base) starts random.
        params = jax.device_get(jax.jit(init)())
        for name, folder in folders.items():
            component = load_component(Path(folder), dtype="float32")
            if component.network is networks.T5_ENCODER:
                params[name]["encoder"] = component.params
            else:
                params[name] = component.params
        return params

    return Role(source=", ".join(folders.values()), sha256=lambda: folders_hash(folders.values()), load=load, **common)


def _teacher(config: Mapping[str, Any], models: method.TextEncoderModels) -> Role:
    teacher = config["teacher"]
    seed, dtype = teacher["seed"], jnp.dtype(teacher["param_dtype"])
    init = lambda: method.init_teacher(jax.random.key(seed), models, dtype)
    common = dict(abstract=jax.eval_shape(init), logical_axes=LOGICAL_AXES)
    folders = {k: teacher[k] for k in ("text_encoder", "mmdit") if teacher[k]}
    if not folders:
        sizes = json.dumps({k: v for k, v in teacher.items()}, sort_keys=True, default=list)
        return Role(source=f"random, seed {seed}", sha256=lambda: text_hash(sizes), init=init, **common)

    def load() -> Params:
        return {
            "text_encoder": load_component(Path(folders["text_encoder"]), networks.T5_ENCODER, dtype).params,
            "context_embedder": load_component(Path(folders["mmdit"]), networks.CONTEXT_EMBEDDER, dtype).params,
        }

    return Role(source=", ".join(folders.values()), sha256=lambda: folders_hash(folders.values()), load=load, **common)
