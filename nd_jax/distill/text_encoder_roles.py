"""Student and teacher of the text-encoder distillation from config values: random, or read from model folders."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from nd_jax.distill import text_encoder as method
from nd_jax.distill.base import Distillation, Params, Role
from nd_jax.errors import UserError
from nd_jax.models import context_adapter, t5
from nd_jax.weights import networks
from nd_jax.weights.folder import component_hash, load_component, read_config

LOGICAL_AXES = t5.LOGICAL_AXES + context_adapter.LOGICAL_AXES


def text_encoder_from_config(config: Mapping[str, Any]) -> Distillation:
    """Reads sizes from the folders that the config names, from the config itself where none is named.

    Raises:
      UserError: a folder is not what it should be, or widths do not fit together.
    """
    try:
        loss = method.TextEncoderLoss(**config["loss"])
        models = _models(config, loss.mode)
        models.check(loss.mode)
    except (TypeError, ValueError) as error:
        raise UserError(f"config: {error}") from error
    return method.text_encoder_distillation(
        models, loss, _student(config, models, loss), _teacher(config, models), dtype=jnp.dtype(config["dtype"])
    )


def _models(config: Mapping[str, Any], mode: str) -> method.TextEncoderModels:
    teacher, student = config["teacher"], config["student"]
    teacher_config = t5.T5Config(**teacher["encoder"])
    if teacher["text_encoder"]:
        _, teacher_config = _folder_config(teacher["text_encoder"], networks.T5_ENCODER)
    embedder = context_adapter.ContextEmbedderConfig(teacher_config.d_model, teacher["context_dim"])
    if teacher["mmdit"]:
        _, embedder = _folder_config(teacher["mmdit"], networks.CONTEXT_EMBEDDER)
    student_config = t5.DistilT5Config(t5.T5Config(**student["encoder"]), student["projection_dim"])
    if student["text_encoder_3"]:
        network, read = _folder_config(student["text_encoder_3"], networks.DISTIL_T5, networks.T5_ENCODER)
        student_config = read if network is networks.DISTIL_T5 else t5.DistilT5Config(read, student["projection_dim"])
    width = embedder.joint_attention_dim if mode == "EM" else embedder.caption_projection_dim
    adapter = context_adapter.ContextAdapterConfig(
        input_dims=student_config.projection_dim,
        output_dims=width,
        layer_depths=tuple(student["adapter_layers"]),
        skips=(True,) * len(student["adapter_layers"]),
    )
    if student["context_adapter"]:
        _, adapter = _folder_config(student["context_adapter"], networks.CONTEXT_ADAPTER)
    return method.TextEncoderModels(student_config, adapter, teacher_config, embedder, remat=config["remat"])


def _folder_config(folder: str, *allowed: networks.Network) -> tuple[networks.Network, Any]:
    network, config, _ = read_config(Path(folder))
    if network not in allowed:
        names = " or ".join(n.name for n in allowed)
        raise UserError(f"{folder} holds a {network.name}, but {names} is needed there")
    return network, config


def _student(config: Mapping[str, Any], models: method.TextEncoderModels, loss: method.TextEncoderLoss) -> Role:
    seed = config["seed"]
    init = lambda: method.init_student(jax.random.key(seed), models, loss)
    folders = {k: config["student"][k] for k in ("text_encoder_3", "context_adapter") if config["student"][k]}
    common = dict(abstract=jax.eval_shape(init), logical_axes=LOGICAL_AXES)
    if not folders:
        sizes = json.dumps({k: v for k, v in config["student"].items()}, sort_keys=True, default=list)
        return Role(source=f"random, seed {seed}", sha256=_text_hash(sizes + str(seed)), init=init, **common)

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

    return Role(source=", ".join(folders.values()), sha256=_folders_hash(folders), load=load, **common)


def _teacher(config: Mapping[str, Any], models: method.TextEncoderModels) -> Role:
    teacher = config["teacher"]
    seed, dtype = teacher["seed"], jnp.dtype(teacher["param_dtype"])
    init = lambda: method.init_teacher(jax.random.key(seed), models, dtype)
    common = dict(abstract=jax.eval_shape(init), logical_axes=LOGICAL_AXES)
    folders = {k: teacher[k] for k in ("text_encoder", "mmdit") if teacher[k]}
    if not folders:
        sizes = json.dumps({k: v for k, v in teacher.items()}, sort_keys=True, default=list)
        return Role(source=f"random, seed {seed}", sha256=_text_hash(sizes), init=init, **common)
    if len(folders) == 1:
        given = next(iter(folders))
        other = "mmdit" if given == "text_encoder" else "text_encoder"
        raise UserError(f"teacher.{given} is given and teacher.{other} is not: both folders make up the teacher")

    def load() -> Params:
        return {
            "text_encoder": load_component(Path(folders["text_encoder"]), networks.T5_ENCODER, dtype).params,
            "context_embedder": load_component(Path(folders["mmdit"]), networks.CONTEXT_EMBEDDER, dtype).params,
        }

    return Role(source=", ".join(folders.values()), sha256=_folders_hash(folders), load=load, **common)


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _folders_hash(folders: Mapping[str, str]) -> str:
    return _text_hash("".join(component_hash(Path(f)) for f in folders.values()))


def count_parameters(tree: Params) -> int:
    """Number of values in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in traverse_util.flatten_dict(tree).values())
