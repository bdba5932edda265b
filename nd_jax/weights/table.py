"""Weight tables: our parameter path, their state-dict key, and how the array is turned.

A table row with `{}` in its key is a parameter that every block has: theirs are separate tensors `block.0...`,
`block.1...`; ours is one array stacked on axis 0. The same rows serve import (theirs -> ours) and export (ours ->
theirs).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Turn:
    """How an array changes on its way in (`to_ours`) and out (`to_theirs`). Both are axis permutations."""

    to_ours: tuple[int, ...] | None
    to_theirs: tuple[int, ...] | None

    def ours(self, array: np.ndarray) -> np.ndarray:
        return array if self.to_ours is None else array.transpose(self.to_ours)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        return array if self.to_theirs is None else array.transpose(self.to_theirs)

    def their_shape(self, our_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(our_shape) if self.to_theirs is None else tuple(our_shape[i] for i in self.to_theirs)


KEEP = Turn(None, None)
LINEAR = Turn((1, 0), (1, 0))  # torch (out, in) <-> flax (in, out)
CONV2D = Turn((2, 3, 1, 0), (3, 2, 0, 1))  # OIHW <-> HWIO
CONV3D = Turn((2, 3, 4, 1, 0), (4, 3, 0, 1, 2))  # OITHW <-> THWIO


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row.

    Attributes:
      path: our parameter, "/" between names.
      key: their state-dict key; `{}` stands for the block index.
      turn: how one (unstacked) array is turned.
      aliases: other keys that may hold the same tensor (tied weights). A source needs one of the keys.
    """

    path: str
    key: str
    turn: Turn = KEEP
    aliases: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{}" in self.key


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of theirs: its keys, its shape, and the row and block that it belongs to."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    weight: Weight
    block: int | None


WeightTable = tuple[Weight, ...]


def expand(table: WeightTable, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """Every tensor of theirs that the table names.

    Args:
      table: the network's rows.
      shapes: our parameter path -> our shape (stacked), as from `flat_shapes`.

    Raises:
      ValueError: the table and the parameters do not name the same paths.
    """
    paths = {w.path for w in table}
    if paths != set(shapes):
        missing, extra = sorted(set(shapes) - paths), sorted(paths - set(shapes))
        raise ValueError(f"weight table and parameters differ: not in the table {missing}, not in the network {extra}")
    for weight in table:
        shape = tuple(shapes[weight.path])
        keys = (weight.key, *weight.aliases)
        if weight.stacked:
            for block in range(shape[0]):
                yield Tensor(tuple(k.format(block) for k in keys), weight.turn.their_shape(shape[1:]), weight, block)
        else:
            yield Tensor(keys, weight.turn.their_shape(shape), weight, None)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries -> {"a/b/c": leaf}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{path}": leaf for path, leaf in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def to_ours(tensors: Mapping[str, np.ndarray], table: WeightTable, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """State dict in memory -> our parameter tree (for tests and small networks; folders stream, see `folder.py`)."""
    ours: dict[str, Any] = {}
    for tensor in expand(table, shapes):
        key = next(k for k in tensor.keys if k in tensors)
        array = tensor.weight.turn.ours(np.asarray(tensors[key]))
        if tensor.block is None:
            ours[tensor.weight.path] = array
        else:
            ours.setdefault(tensor.weight.path, []).append(array)
    return unflatten({p: np.stack(a) if isinstance(a, list) else np.ascontiguousarray(a) for p, a in ours.items()})


def rows(prefix_ours: str, prefix_theirs: str, *specs: tuple[str, str, Turn]) -> WeightTable:
    """Rows that share a prefix on both sides."""
    return tuple(Weight(prefix_ours + path, prefix_theirs + key, turn) for path, key, turn in specs)


def linear(ours: str, theirs: str, bias: bool = True) -> tuple[tuple[str, str, Turn], ...]:
    """Specs of a linear layer for `rows`."""
    return _with_bias(ours, theirs, LINEAR, bias)


def conv2d(ours: str, theirs: str) -> tuple[tuple[str, str, Turn], ...]:
    """Specs of a 2D convolution for `rows`."""
    return _with_bias(ours, theirs, CONV2D)


def norm(ours: str, theirs: str) -> tuple[tuple[str, str, Turn], ...]:
    """Specs of a norm with scale and bias for `rows`."""
    return (f"{ours}/scale", f"{theirs}.weight", KEEP), (f"{ours}/bias", f"{theirs}.bias", KEEP)


def _with_bias(ours: str, theirs: str, turn: Turn, bias: bool = True) -> tuple[tuple[str, str, Turn], ...]:
    kernel = (f"{ours}/kernel", f"{theirs}.weight", turn)
    return (kernel, (f"{ours}/bias", f"{theirs}.bias", KEEP)) if bias else (kernel,)


TableBuilder = Callable[[Any], WeightTable]
