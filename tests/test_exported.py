"""Train steps as files: what comes back does what was written, and a damaged file is refused."""

import json

import jax
import numpy as np
import pytest

from experiments import plan
from nd_jax.errors import UserError
from nd_jax.train import ahead, sharding
from nd_jax.train.exported import HEADER, export_step, load_step
from tests.toy_method import WIDTH, toy_config, toy_method

ROW = {"x": jax.ShapeDtypeStruct((WIDTH,), np.float32), "weight": jax.ShapeDtypeStruct((), np.float32)}


@pytest.fixture(scope="module")
def exported():
    """(arguments and steps, their mesh, the student's file for both platforms)."""
    config = toy_config()
    mesh = sharding.make_mesh(config["mesh"])
    arguments = ahead.step_arguments(config, toy_method(), mesh, ROW)
    return arguments, mesh, export_step("student", arguments, mesh, ("tpu", "cpu"))


def random_values(arguments):
    rng = np.random.default_rng(0)
    make = lambda x: jax.device_put((4 * rng.random(x.shape)).astype(x.dtype), x.sharding)
    return jax.tree.map(make, (arguments.state, arguments.frozen, arguments.batch))


def test_the_step_of_a_file_is_the_step_bit_by_bit(exported):
    arguments, mesh, data = exported
    with jax.set_mesh(mesh):
        state, metrics = arguments.train_steps["student"](*random_values(arguments))
        given = random_values(arguments)
        again, metrics_again = load_step(data)(*given)
    jax.tree.map(np.testing.assert_array_equal, (again, metrics_again), (state, metrics))
    assert metrics["grad_norm"] > 0
    equivalent = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(equivalent, again, state)))
    assert given[0].params["student"]["layer"]["kernel"].is_deleted()  # Donated.


def test_damaged_files_are_refused(exported):
    data = exported[2]
    flipped = bytearray(data)
    flipped[-len(data) // 3] ^= 1
    for damaged in (b"", data[:-1], bytes(flipped), data[len(HEADER) :], b"pickle" + data):
        with pytest.raises(UserError, match="not an exported step, or a damaged one"):
            load_step(damaged)


def test_a_plan_exports_the_steps_that_it_plans(tmp_path):
    found = plan.export_steps(toy_config(), toy_method(), ROW, None, jax.devices(), tmp_path)
    assert list(found) == ["fake", "student"] and json.dumps(found)
    for entry in found.values():
        data = (tmp_path / entry["file"]).read_bytes()
        assert len(data) == entry["bytes"]
        load_step(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake.stablehlo", "student.stablehlo"]
    with pytest.raises(SystemExit):
        plan.parse(["--config=a.py", "--topology=cpu", "--sweep", "--export"])
