"""The sharded step: equation 2 of step.py for any number of microbatches and devices; only the role trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.distill.base import Mean
from nd_jax.errors import UserError
from nd_jax.train import optimizer, sharding
from nd_jax.train import step as steps
from tests.toy_method import ToyBatches, toy_config, toy_method

AXES_1 = {"data": 1, "fsdp": 1, "tensor": 1}


def run(axes, name="adamw", num=6):
    """Losses and final state of a few steps."""
    config, method = toy_config(), toy_method()
    config["optimizer"]["name"] = name
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = sharding.make_mesh(axes, devices)
    tx = {r: optimizer.make_optimizer(config["optimizer"], num) for r in ("student", "fake")}
    with jax.set_mesh(mesh):
        init = lambda: {n: method.roles[n].init() for n in tx}
        create = lambda: steps.new_state(method, init(), tx, True, 0)
        shardings = steps.state_shardings(jax.eval_shape(create), method, tx, mesh)
        state = jax.jit(create, out_shardings=shardings)()
        frozen_shardings = steps.frozen_shardings(method, mesh)
        frozen = {"teacher": jax.jit(method.roles["teacher"].init, out_shardings=frozen_shardings["teacher"])()}
        fns = {r: steps.make_train_step(method, r, tx[r], shardings, frozen_shardings, mesh, ema_decay=0.9) for r in tx}
        batches, losses = ToyBatches(16), []
        for k in range(num):
            batch = next(batches)
            batch.pop("example")
            state, metrics = fns[method.schedule[k % 3]](state, frozen, sharding.global_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        return np.array(losses), state


@functools.cache
def one_device(name):
    """`run` of a single device."""
    return run(AXES_1, name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_mesh_changes_nothing(axes, name):
    losses, state = one_device(name)
    sharded_losses, sharded = run(axes, name)
    np.testing.assert_allclose(sharded_losses, losses, rtol=2e-6)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    kernel = sharded.params["student"]["layer"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (axes["fsdp"] * axes["tensor"])
    moments = jax.tree.leaves(sharded.opt_state["student"])
    assert any(m.shape == kernel.shape and m.sharding == kernel.sharding for m in moments)


def test_held_parameters_stay_and_ema_follows():
    _, state = one_device("adamw")
    np.testing.assert_array_equal(state.params["student"]["offset"], 1.0)
    assert set(state.ema["student"]) == {"layer"}
    assert not np.array_equal(state.ema["student"]["layer"]["kernel"], state.params["student"]["layer"]["kernel"])


def test_accumulated_gradient_is_that_of_the_whole_batch():
    """Rows have unequal weights, so a mean of microbatch means would differ. No noise: it is drawn per microbatch."""

    def noiseless(roles, batch, key):
        del key
        error = jnp.mean((batch["x"] @ roles["student"]["layer"]["kernel"] - batch["x"]) ** 2, axis=-1)
        mean = Mean(jnp.sum(error * batch["weight"]), jnp.sum(batch["weight"]))
        return mean, {}

    method = toy_method()
    method = dataclasses.replace(method, losses=dict(method.losses, student=noiseless))
    mesh = sharding.make_mesh(AXES_1, jax.devices()[:1])
    tx = {r: optimizer.make_optimizer(toy_config()["optimizer"], 10) for r in ("student", "fake")}
    batch = next(ToyBatches(16))
    batch.pop("example")
    results = []
    with jax.set_mesh(mesh):
        create = lambda: steps.new_state(method, {n: method.roles[n].init() for n in tx}, tx, False, 0)
        shardings = steps.state_shardings(jax.eval_shape(create), method, tx, mesh)
        frozen = {"teacher": method.roles["teacher"].init()}
        for count in (1, 4):
            state = jax.jit(create, out_shardings=shardings)()
            fn = steps.make_train_step(
                method,
                "student",
                tx["student"],
                shardings,
                steps.frozen_shardings(method, mesh),
                mesh,
                microbatches=count,
            )
            _, metrics = fn(state, frozen, sharding.global_batch(batch, mesh))
            results.append({k: float(v) for k, v in metrics.items()})
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)
    assert results[0]["grad_norm"] == pytest.approx(results[1]["grad_norm"], rel=1e-5)


def test_mesh_errors_name_the_axis_and_the_count():
    with pytest.raises(UserError, match="mesh axis 'model' is unknown"):
        sharding.make_mesh({"model": 2})
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh({"data": 3, "fsdp": 1, "tensor": 1})
    assert sharding.make_mesh({"data": 2, "fsdp": -1, "tensor": 2}).shape["fsdp"] == 2


def test_uneven_axes_stay_whole():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    abstract = {
        "a": {"kernel": jax.ShapeDtypeStruct((12, 4), jnp.float32)},
        "b": jax.ShapeDtypeStruct((3,), jnp.float32),
    }
    specs = sharding.param_shardings(abstract, ((r"kernel$", ("embed", "mlp")),), mesh)
    assert specs["a"]["kernel"].is_fully_replicated and specs["b"].is_fully_replicated
