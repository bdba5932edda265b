"""LPIPS in a component folder: the keys of torchvision's VGG16 and of the `lpips` package's head files, together.

The two sources have no key in common, so the folder's one weights file holds both as they were spelled.
`converters.import_lpips` makes the folder. It is a measure and no part of a model, so it is not among `NETWORKS` and a
model folder has no place for it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError
from nd_jax.models.lpips import CONVS, LOGICAL_AXES, LPIPS, SMALLEST_SIDE, LPIPSConfig
from nd_jax.weights.folder import load_component
from nd_jax.weights.network import Network, config_fields
from nd_jax.weights.table import CONV2D, KEEP, Weight, WeightTable

CLASS = "LPIPS"
TRUNK, HEADS = "features.", "lin"  # What the keys of either source begin with.


def lpips_table(config: LPIPSConfig) -> WeightTable:
    """Rows of `features.N` (convolution and activation in turn, a pool behind each stage) and of `linN`."""
    table, index = [], 0
    for stage, count in enumerate(CONVS):
        for conv in range(count):
            ours, theirs = f"convs_{stage}_{conv}", f"{TRUNK}{index}"
            table.append(Weight(f"{ours}/kernel", f"{theirs}.weight", CONV2D))
            table.append(Weight(f"{ours}/bias", f"{theirs}.bias", KEEP))
            index += 2
        index += 1
        table.append(Weight(f"heads_{stage}/kernel", f"{HEADS}{stage}.model.1.weight", CONV2D))
    return tuple(table)


def _read(json: Mapping[str, Any]) -> LPIPSConfig:
    if json.get("_class_name", CLASS) != CLASS:
        raise UserError(f"_class_name is {json['_class_name']!r}, {CLASS!r} is needed: run converters.import_lpips")
    return LPIPSConfig(**config_fields(LPIPSConfig, json))


def _inputs(config: LPIPSConfig) -> tuple:
    pictures = jax.ShapeDtypeStruct((1, SMALLEST_SIDE, SMALLEST_SIDE, 3), jnp.float32)
    return pictures, pictures


LPIPS_VGG16 = Network(
    name="lpips",
    class_names=(CLASS,),
    read_config=_read,
    write_config=lambda config: {"_class_name": CLASS, **dataclasses.asdict(config)},
    module=LPIPS,
    inputs=_inputs,
    table=lpips_table,
    logical_axes=LOGICAL_AXES,
    ignored=(r"classifier\..*",),
)


def load_lpips(folder: Path) -> tuple[LPIPSConfig, dict]:
    """(config, float32 parameters for `lpips_distance`) of a folder that `converters.import_lpips` wrote.

    Raises:
      UserError: no such folder, another class, tensors that do not fit, or negative heads.
    """
    component = load_component(Path(folder), LPIPS_VGG16, np.float32)
    check_heads(component.params, str(folder))
    return component.config, component.params


def check_heads(params: Mapping[str, Any], where: str) -> None:
    """Raises UserError when a head holds a negative number or NaN, which trained ones never do."""
    for stage in range(len(CONVS)):
        head = np.asarray(params[f"heads_{stage}"]["kernel"], np.float32)
        if not head.min() >= 0:
            raise UserError(
                f"{where}: {HEADS}{stage}.model.1.weight goes down to {head.min():g}, but heads are 0 or more; "
                "give weights/v0.1/vgg.pth of the lpips package"
            )
