"""The training state, and the one factory of sharded train steps.

    microbatches:  (l_m, w_m), g_m = value_and_grad of the summed loss over microbatch m                       (1)
    loss = sum_m l_m / sum_m w_m,     g = sum_m g_m / sum_m w_m                                                (2)
    theta <- theta + optimiser(g),    ema <- d ema + (1 - d) theta                                             (3)

Because a loss is a sum with its weight, equation 2 is the gradient of the mean over the whole global batch, whatever
the number of microbatches and devices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from nd_jax.distill.base import Batch, Distillation, Mean, Roles, merge, partition
from nd_jax.train.sharding import RULES, batch_sharding, param_shardings, replicated


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes; float32 master weights.

    Attributes:
      step: int32 [], steps done.
      rng: uint32 key data; step k uses `fold_in(rng, k)`, so a resumed run draws the same numbers.
      params: trained role -> its whole parameter tree.
      opt_state: trained role -> optimiser state of its trainable parameters.
      ema: trained role -> moving average of its trainable parameters; empty when off.
    """

    step: jax.Array
    rng: jax.Array
    params: dict[str, Any]
    opt_state: dict[str, Any]
    ema: dict[str, Any]


Optimizers = Mapping[str, optax.GradientTransformation]


def trained_roles(method: Distillation) -> list[str]:
    return [name for name, role in method.roles.items() if not role.frozen]


def new_state(method: Distillation, params: Roles, optimizers: Optimizers, ema: bool, seed: int) -> TrainState:
    """State at step 0 around the given parameters (traceable)."""
    trainable = {name: partition(params[name], method.roles[name].trainable)[0] for name in trained_roles(method)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(jax.random.key(seed)),
        params=params,
        opt_state={name: optimizers[name].init(trainable[name]) for name in trainable},
        # A copy: donated buffers may not appear twice.
        ema=jax.tree.map(jnp.copy, trainable) if ema else {},
    )


def state_shardings(abstract: TrainState, method: Distillation, optimizers: Optimizers, mesh: Mesh) -> TrainState:
    """Shardings of a state: optimiser moments and averages lie where their parameters lie."""
    params = {n: param_shardings(p, method.roles[n].logical_axes, mesh) for n, p in abstract.params.items()}
    trainable = {n: partition(params[n], method.roles[n].trainable)[0] for n in params}
    masked = lambda moment: isinstance(moment, optax.MaskedNode)
    opt_state = {
        name: optax.tree.map_params(
            optimizers[name],
            # An optimiser may hold moments of some parameters only.
            lambda moment, sharding: moment if masked(moment) else sharding,
            abstract.opt_state[name],
            trainable[name],
            transform_non_params=lambda _: replicated(mesh),
            is_leaf=masked,
        )
        for name in params
    }
    everywhere = replicated(mesh)
    return TrainState(everywhere, everywhere, params, opt_state, trainable if abstract.ema else {})


def frozen_shardings(method: Distillation, mesh: Mesh) -> dict:
    """Shardings of the frozen roles."""
    return {n: param_shardings(r.abstract, r.logical_axes, mesh) for n, r in method.roles.items() if r.frozen}


def _microbatches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...], strided so that each device keeps its own rows."""
    split = lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
    return jax.tree.map(split, batch)


def make_train_step(
    method: Distillation,
    role: str,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    frozen: dict,
    mesh: Mesh,
    *,
    microbatches: int = 1,
    ema_decay: float = 0.0,
    rules: tuple = RULES,
) -> Callable[[TrainState, Roles, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step that updates one role: (state, frozen roles, batch) -> (state, metrics).

    Args:
      method: losses and roles.
      role: the role to update.
      optimizer: for the trainable parameters of that role.
      shardings: of the state, from `state_shardings`.
      frozen: shardings of the frozen roles, from `frozen_shardings`.
      mesh: the mesh of those shardings.
      microbatches: gradient accumulation; must divide the rows that each device holds.
      ema_decay: d of equation 3; used when the state has averages.
      rules: logical axis -> mesh axes for activations.

    Returns:
      A function that donates the state. Metrics are float32 scalars: `loss`, the method's own, and `grad_norm`
      (before clipping).
    """
    loss_fn, patterns = method.losses[role], method.roles[role].trainable

    def step(state: TrainState, frozen_params: Roles, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        trainable, held = partition(state.params[role], patterns)
        others = {name: p for name, p in state.params.items() if name != role} | frozen_params
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def total_loss(trainable, microbatch, microbatch_key):  # equation 1
            loss, metrics = loss_fn(
                others | {role: merge(trainable, held)}, microbatch | {"step": state.step}, microbatch_key
            )
            return loss.total, metrics | {"loss": loss}

        grad_fn = jax.grad(total_loss, has_aux=True)

        def accumulate(sums, item):
            index, microbatch = item
            grads, means = grad_fn(trainable, microbatch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, sums, (grads, means)), None

        with nn.logical_axis_rules(rules):
            if microbatches == 1:
                grads, means = grad_fn(trainable, batch, jax.random.fold_in(key, 0))
            else:
                items = (jnp.arange(microbatches), _microbatches(batch, microbatches))
                shape = jax.eval_shape(lambda: grad_fn(trainable, jax.tree.map(lambda x: x[0], items[1]), key))
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
                (grads, means), _ = jax.lax.scan(accumulate, zeros, items)

        grads = jax.tree.map(lambda g: g / means["loss"].weight.astype(g.dtype), grads)  # equation 2
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step count with floats
            updates, opt_state = optimizer.update(grads, state.opt_state[role], trainable)
        trainable = optax.apply_updates(trainable, updates)  # equation 3
        ema = state.ema
        if ema:
            average = jax.tree.map(lambda e, p: ema_decay * e + (1.0 - ema_decay) * p, ema[role], trainable)
            ema = ema | {role: average}
        state = state.replace(
            step=state.step + 1,
            params=state.params | {role: merge(trainable, held)},
            opt_state=state.opt_state | {role: opt_state},
            ema=ema,
        )
        metrics = {name: mean.value for name, mean in means.items()}
        return state, metrics | {"grad_norm": optax.tree.norm(grads)}

    return jax.jit(
        step,
        in_shardings=(shardings, frozen, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(
    method: Distillation, shardings: TrainState, frozen: dict, mesh: Mesh, rules: tuple = RULES
) -> Callable[[Roles, Roles, Batch], dict[str, Mean]]:
    """The jitted evaluation: (trained roles, frozen roles, batch) -> metrics, replicated."""

    def evaluate(params: Roles, frozen_params: Roles, batch: Batch) -> dict[str, Mean]:
        with nn.logical_axis_rules(rules):
            return method.evaluate(params | frozen_params, batch)

    return jax.jit(
        evaluate,
        in_shardings=(shardings.params, frozen, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
