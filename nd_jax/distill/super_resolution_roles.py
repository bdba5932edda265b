"""The network of `super_resolution` from config values: as it starts, or read from a component folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.distill import super_resolution as method
from nd_jax.distill.base import Distillation, Role
from nd_jax.distill.folders import folder_config, folders_hash, text_hash
from nd_jax.distill.perceptual import WINDOW
from nd_jax.errors import UserError
from nd_jax.models.quicksrnet import COLOURS, QuickSRNet, QuickSRNetConfig, variant_config
from nd_jax.weights.folder import load_component
from nd_jax.weights.quicksrnet import QUICKSRNET


def resolve_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes of its variant, or of the folder that it names, filled in.

    Raises:
      UserError: no such variant or scaling factor, or a folder of something else.
    """
    model = dict(config["model"])
    if model["folder"]:
        _, sizes = folder_config(model["folder"], QUICKSRNET)
    else:
        try:
            sizes = variant_config(model["variant"], model["scaling_factor"])
        except ValueError as error:
            raise UserError(f"config.model: {error}") from error
    model["quicksrnet"] = dataclasses.asdict(sizes)
    return dict(config) | {"model": model}


def super_resolution_from_config(config: Mapping[str, Any]) -> Distillation:
    """The method of a resolved config. Reads no weights before the role is loaded.

    Raises:
      UserError: sides of frames that the scaling factor does not divide, or that are too small to be measured.
    """
    sizes = QuickSRNetConfig(**config["model"]["quicksrnet"])
    _check_sides(config["data"], sizes.scaling_factor)
    return method.super_resolution_training(sizes, _role(config, sizes), jnp.dtype(config["dtype"]))


def _check_sides(data: Mapping[str, Any], scaling_factor: int) -> None:
    for part in ("crop", "eval_crop"):
        for side in ("height", "width"):
            # A size of 0 is the whole side.
            size = data[part][side] or data[side]
            if size % scaling_factor:
                raise UserError(
                    f"data.{part}.{side} is {size} pixels (0 in the config: the whole {side}), which scaling_factor "
                    f"{scaling_factor} does not divide: use a multiple of it"
                )
            if part == "eval_crop" and size < WINDOW:
                raise UserError(f"data.eval_crop.{side} is {size} pixels: SSIM needs {WINDOW} or more")


def _role(config: Mapping[str, Any], sizes: QuickSRNetConfig) -> Role:
    seed, folder = config["seed"], config["model"]["folder"]
    init = lambda: QuickSRNet(sizes).init(jax.random.key(seed), jnp.zeros((1, 8, 8, COLOURS)))["params"]
    common = dict(abstract=jax.eval_shape(init), logical_axes=QUICKSRNET.logical_axes)
    if not folder:
        identity = json.dumps([config["model"], seed], sort_keys=True)
        return Role(source=f"nearest-neighbour, seed {seed}", sha256=lambda: text_hash(identity), init=init, **common)
    load = lambda: load_component(Path(folder), QUICKSRNET, "float32").params
    return Role(source=folder, sha256=lambda: folders_hash([folder]), load=load, **common)
