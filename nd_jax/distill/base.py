"""What a distillation declares, so that one trainer can run all of them.

A `Distillation` names its roles (student, teacher, fake), gives one loss for each role that trains, and says in which
order the roles are updated. The trainer turns every loss into a sharded step, owns optimisers, meshes and checkpoints,
and never looks inside. docs/extending.md adds a method, step by step.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import traverse_util

Params = dict[str, Any]
Roles = dict[str, Params]
Batch = dict[str, jax.Array]


@flax.struct.dataclass
class Mean:
    """A mean kept as its total and weight, so that microbatches, devices and eval batches add up exactly."""

    total: jax.Array
    weight: jax.Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> jax.Array:
        """total / weight, and 0 where nothing was counted (a batch of empty rows)."""
        return self.total / jnp.maximum(self.weight, 1e-8)


Loss = Callable[[Roles, Batch, jax.Array], tuple[Mean, dict[str, Mean]]]


@dataclasses.dataclass(frozen=True)
class Role:
    """One set of parameters.

    Attributes:
      init: () -> parameter tree, from a seed of its own. Traceable, so that it runs sharded under jit. None when `load`
        gives the weights.
      load: () -> parameter tree of numpy arrays, read from files. None when `init` makes the weights.
      abstract: parameter tree of `jax.ShapeDtypeStruct`, known without allocating anything.
      logical_axes: (path pattern, logical axis names), first match wins; see `nd_jax.train.sharding`.
      trainable: path patterns of the parameters that train. Empty: the role is frozen, it is an input of the step and
        never enters a checkpoint.
      source: where the weights come from, recorded in every checkpoint.
      sha256: () -> hash of that source; resuming with other frozen weights is refused.
    """

    abstract: Params
    logical_axes: tuple
    source: str
    sha256: Callable[[], str]
    init: Callable[[], Params] | None = None
    load: Callable[[], Params] | None = None
    trainable: tuple[str, ...] = ()

    @property
    def frozen(self) -> bool:
        return not self.trainable


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A method, as data.

    Attributes:
      roles: name -> role.
      losses: trained role -> loss(roles, batch, key) -> (loss, metrics). The trainer differentiates it with respect to
        the trainable parameters of that role alone; a loss is a sum with its weight, never a mean of means. The batch
        has `step` (int32 [], steps done) beside the columns of the data.
      schedule: which role is updated at step k: `schedule[k % len(schedule)]`.
      evaluate: (roles, batch) -> metrics on held-out data.
      summarize: metric means of a whole evaluation -> the numbers that are logged.
      deploy: roles -> {component: (network, config, parameters)}, what an export writes to a model folder.
      limits: name of a summarised metric -> (lowest, highest) that a sound run may show; outside of them it is stopped.
    """

    name: str
    roles: Mapping[str, Role]
    losses: Mapping[str, Loss]
    schedule: tuple[str, ...]
    evaluate: Callable[[Roles, Batch], dict[str, Mean]]
    summarize: Callable[[dict[str, float]], dict[str, float]]
    deploy: Callable[[Roles], dict[str, tuple[Any, Any, Params]]]
    limits: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        trained = {name for name, role in self.roles.items() if not role.frozen}
        if set(self.losses) != trained or set(self.schedule) != trained:
            raise ValueError(
                f"{self.name}: trained roles {sorted(trained)}, losses for {sorted(self.losses)} and schedule over "
                f"{sorted(set(self.schedule))} must be the same set"
            )


def partition(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """Splits a tree into (trainable, held) by path patterns (`re.search` on "a/b/c")."""
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = {path for path in flat if any(re.search(pattern, path) for pattern in patterns)}
    if patterns and not chosen:
        raise ValueError(f"no parameter matches {patterns}; the first paths are {sorted(flat)[:5]}")
    unflatten = lambda keep: traverse_util.unflatten_dict({p: x for p, x in flat.items() if keep(p)}, sep="/")
    return unflatten(lambda p: p in chosen), unflatten(lambda p: p not in chosen)


def merge(first: Params, second: Params) -> Params:
    """One tree of both, the inverse of `partition`; where both have a path, that of `second`."""
    flat = traverse_util.flatten_dict(first, sep="/") | traverse_util.flatten_dict(second, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
