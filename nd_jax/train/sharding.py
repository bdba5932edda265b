"""Sharding as data: logical axis names on parameters, and one table from names to mesh axes.

Model code names axes ("embed", "heads", "mlp", ...), never a mesh. A mesh has three axes:

    data    copies of the weights; gradients are averaged over it; of several slices each has its own copies
    fsdp    weights and optimiser state are split over it, and so is the batch
    tensor  heads and feed-forward columns are split over it

`logical_axes` of a network is a list of (path pattern, axis names); a parameter that no pattern matches is replicated.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nd_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Activations keep their own names, because a batch already occupies `fsdp`.
RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
    ("length", None),
    ("activation_embed", None),
    ("activation_mlp", "tensor"),
    ("activation_heads", "tensor"),
)


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of the given sizes; one of them may be -1, which takes what is left.

    Devices of several slices are split along `data`, the only axis that the slower network between them can carry.

    Raises:
      UserError: an unknown axis, sizes that do not multiply to the number of devices, or that their network cannot be
        cut into.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = set(axes) - set(MESH_AXES)
    if unknown:
        raise UserError(f"mesh axis {sorted(unknown)[0]!r} is unknown: the axes are {', '.join(MESH_AXES)}")
    sizes = [int(axes.get(name, 1)) for name in MESH_AXES]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(1, -math.prod(sizes))
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        asked = ", ".join(f"{n}={axes.get(n, 1)}" for n in MESH_AXES)
        raise UserError(f"mesh ({asked}) does not fit {len(devices)} devices: the sizes must multiply to that number")
    # Auto axes: linen's logical constraints are hints to the compiler, which Explicit axes would reject.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if sizes[0] % slices:
        raise UserError(f"mesh data={sizes[0]} does not divide among {slices} slices: use a multiple of {slices}")
    try:
        if slices == 1:
            return jax.make_mesh(sizes, MESH_AXES, devices=devices, axis_types=auto)
        inner, outer = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    except NotImplementedError as error:
        shown = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"mesh ({shown}) does not follow the network of these devices: use other sizes") from error
    return Mesh(array, MESH_AXES, axis_types=auto)


def _spec(path: str, shape: tuple[int, ...], logical_axes: tuple, mesh: Mesh, rules: tuple) -> PartitionSpec:
    table = dict(rules)
    for pattern, names in logical_axes:
        if re.search(pattern, path):
            # Patterns are written for stacked blocks; an unstacked kernel has no "layers" axis.
            names = names[len(names) - len(shape) :] if len(names) > len(shape) else names
            if len(names) != len(shape):
                raise ValueError(f"{path}: pattern {pattern!r} names {len(names)} axes, the array has {len(shape)}")
            entries = []
            for name, size in zip(names, shape, strict=True):
                axes = table.get(name)
                axes = (axes,) if isinstance(axes, str) else axes or ()
                split = math.prod(mesh.shape[a] for a in axes)
                # An axis that does not divide evenly stays whole: padding shards would waste more than it saves.
                entries.append(axes if split > 1 and size % split == 0 else None)
            return PartitionSpec(*entries)
    return PartitionSpec()


def param_shardings(abstract: Mapping, logical_axes: tuple, mesh: Mesh, rules: tuple = RULES) -> dict:
    """Tree of `NamedSharding`, one per parameter of the abstract tree."""
    flat = traverse_util.flatten_dict(dict(abstract), sep="/")
    specs = {p: NamedSharding(mesh, _spec(p, leaf.shape, logical_axes, mesh, rules)) for p, leaf in flat.items()}
    return traverse_util.unflatten_dict(specs, sep="/")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows -> global arrays whose rows are split over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def place(params: Mapping, shardings: Mapping) -> dict:
    """Host arrays, the same in every process, -> sharded device arrays."""

    def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, params, shardings)
