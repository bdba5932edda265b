"""Applying a network that a program calls many times, traced once for all the calls of the same shapes.

Step distillation applies one transformer as student, fake model and teacher, at its own times and at the teacher's, in
three stages, to train and to evaluate: of a start whose programs are compiled already, tracing was half the time.
"""

import functools
from typing import Any

import jax
from flax import linen as nn


def apply_network(module: nn.Module, params: Any, *inputs: Any, **static: Any) -> Any:
    """`module.apply({"params": params}, *inputs, **static)`, for modules without other collections or random numbers.

    Args:
      module: unbound; equal modules share their traces.
      params: its parameter tree.
      inputs: trees of arrays.
      static: hashable keyword arguments of `__call__`.
    """
    # The rules that logical axes follow while tracing are no part of JAX's own key for a trace.
    rules = tuple(nn.get_logical_axis_rules())
    return _apply(module, rules, tuple(sorted(static.items())), params, inputs)


# Inlined: the program is then as if every call had been traced, but as short as it can be. As calls of one function,
# which XLA inlines itself, its schedule of the student's step for v5e:4x4 took 0.2 GiB more.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _apply(module: nn.Module, rules: tuple, static: tuple, params: Any, inputs: tuple) -> Any:
    with nn.logical_axis_rules(rules):
        return module.apply({"params": params}, *inputs, **dict(static))
