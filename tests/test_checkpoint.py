"""Checkpoint files: as large as their arrays, read whatever version wrote them, refused when they have other names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nd_jax.errors import UserError
from nd_jax.train.checkpoint import Checkpointer, abstract_with_shardings, complete_steps, load_params
from nd_jax.train.sharding import make_mesh, param_shardings, replicated
from nd_jax.train.step import TrainState

META = {"method": "toy", "config": {}, "frozen": {}}
ROWS, COLUMNS = 64, 512


def state_of(value: float) -> TrainState:
    kernel = value + jnp.arange(ROWS * COLUMNS, dtype=jnp.float32).reshape(ROWS, COLUMNS)
    params = {"student": {"layer": {"kernel": kernel}, "scale": jnp.float32(value)}}
    return TrainState(jnp.int32(3), jnp.arange(2, dtype=jnp.uint32), params, {"student": (kernel, ())}, params)


def checkpointer(folder):
    return Checkpointer(folder, keep=2, best_metric="", meta=META)


def everywhere(state):
    """(shapes of a state, kernels split over all devices, and their mesh)"""
    mesh = make_mesh({"data": 1, "fsdp": -1})
    kernel = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
    split = param_shardings({"kernel": kernel}, ((r"kernel$", ("embed", "mlp")),), mesh)["kernel"]
    place = lambda x: split if x.shape == kernel.shape else replicated(mesh)
    return abstract_with_shardings(state, jax.tree.map(place, state)), mesh


def test_arrays_are_not_compressed_and_come_back_sharded(tmp_path):
    state, saver = state_of(0.0), checkpointer(tmp_path)
    zeros = dataclasses.replace(state, params=jax.tree.map(jnp.zeros_like, state.params))
    saver.save(1, zeros, {"position": 5}, {})
    saver.wait()
    size = sum(path.stat().st_size for path in (saver.folder / "1" / "params").rglob("*") if path.is_file())
    assert size > 4 * ROWS * COLUMNS
    abstract, mesh = everywhere(state)
    restored, data = saver.restore(1, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, zeros)
    assert data == {"position": 5}
    kernel = restored.params["student"]["layer"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (ROWS // mesh.size, COLUMNS)


def test_a_compressed_checkpoint_of_an_earlier_version_is_read_and_followed(tmp_path):
    state = state_of(1.0)
    optimizer = {"step": state.step, "rng": state.rng, "opt_state": state.opt_state}
    items = {"params": state.params, "optimizer": optimizer, "ema": state.ema}
    arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    texts = {"data": ocp.args.JsonSave({"position": 7}), "meta": ocp.args.JsonSave(META)}
    with ocp.CheckpointManager((tmp_path / "checkpoints").resolve()) as manager:
        manager.save(3, args=ocp.args.Composite(**arrays, **texts))
    saver = checkpointer(tmp_path)
    assert saver.latest() == 3
    restored, data = saver.restore(3, everywhere(state)[0])
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert data == {"position": 7}
    saver.save(4, state_of(2.0), {"position": 8}, {})
    saver.wait()
    assert complete_steps(saver.folder) == [3, 4]
    for step, value in ((3, 1.0), (4, 2.0)):
        params, meta, _ = load_params(tmp_path, step)
        assert params["student"]["scale"] == value and meta == META


def test_other_parameters_are_refused(tmp_path):
    state, saver = state_of(0.0), checkpointer(tmp_path)
    saver.save(1, state, {}, {})
    saver.wait()
    renamed = {"student": {"layer": {"weight": jnp.zeros((ROWS, COLUMNS))}, "scale": jnp.float32(0)}}
    with pytest.raises(UserError, match=r"checkpoints/1 cannot be read .*remove that folder to start anew"):
        saver.restore(1, everywhere(dataclasses.replace(state, params=renamed))[0])
