"""`experiments.step_time`: the steps that a plan compiles, run with random weights."""

import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import plan, step_time
from experiments.config_file import load_config, plain
from experiments.plan_sizes import batch_row, fill_folders
from nd_jax.distill.registry import build_method, resolve_config
from nd_jax.errors import UserError
from nd_jax.train import ahead
from nd_jax.train.chips import CHIPS, TPU_KINDS, peak_flops
from nd_jax.train.cost import Flops
from tests.toy_method import ToyBatches, toy_config, toy_method

CONFIG = f"{Path(__file__).parent.parent / 'experiments' / 'configs' / 'text_encoder.py'}:tiny"
SMALL = [
    *("--config.student.encoder.num_layers=1", "--config.teacher.encoder.num_layers=1"),
    *("--config.student.adapter.layer_depths=(128,)", "--config.data.max_length=16", "--config.batch_size=16"),
    *("--config.mesh.data=2", "--config.mesh.fsdp=4"),
]


def test_the_steps_of_a_config_run(tmp_path, capsys):
    """Without any folder; what is planned for them is what `experiments.plan` says."""
    args = ["--config", CONFIG, *SMALL, "--steps=2", "--repeats=2", f"--output={tmp_path / 'out'}"]
    assert step_time.main(args) == 0
    result = json.loads((tmp_path / "out" / step_time.REPORT).read_text())
    (step,) = result["steps"]
    assert step["role"] == "student" and step["finite"] and np.isfinite(step["metrics"]["loss"])
    low, high = step["seconds_range"]
    assert 0 < low <= step["seconds"] <= high and result["seconds_per_step"] == step["seconds"]
    assert result["rows_per_second"] == 16 / step["seconds"]
    assert result["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1} and result["devices"] == 8
    assert result["assumed_released_sizes"] == ["data.prompts", "data.tokenizer"]
    assert step["of_peak"] is None  # Nobody knows the peak of "cpu".

    config, _ = fill_folders(plain(load_config(CONFIG, SMALL)), tmp_path)
    config = resolve_config(config)
    planned = plan.plan_mesh(config, build_method(config), batch_row(config, tmp_path), None, jax.devices(), 1)
    assert step["planned_memory"] == planned["steps"][0]["memory"]
    assert step["flops_per_device"] == planned["steps"][0]["flops"]["per_device"]
    said = capsys.readouterr().out
    assert "on each of 8 x cpu, data 2 x fsdp 4 x tensor 1, batch 16" in said and "prompts/s" in said.splitlines()[-1]


@pytest.fixture
def toy_module(monkeypatch):
    """The toy method as one of the user's own: two trained roles, of which `fake` has two turns in three."""
    module = types.ModuleType("toy_method_of_a_user")
    module.resolve_config = dict
    module.build_method = lambda config: toy_method()
    module.build_data = lambda config, folder: (ToyBatches(config["batch_size"]), None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return toy_config(method=module.__name__)


def test_every_role_counts_as_often_as_its_turn_comes(toy_module, tmp_path):
    begun = []
    found = step_time.measure(toy_module, tmp_path, 2, 3, begun.append)
    seconds = {step["role"]: step["seconds"] for step in found["steps"]}
    assert begun == ["fake", "student"] == list(seconds)
    assert found["seconds_per_step"] == pytest.approx((2 * seconds["fake"] + seconds["student"]) / 3)
    assert all(step["finite"] for step in found["steps"])
    assert [set(step["metrics"]) for step in found["steps"]] == [
        {"fake_error", "grad_norm", "loss"},
        {"student_error", "grad_norm", "loss"},
    ]


def test_a_process_asks_its_own_device():
    class Device:
        device_kind = "NVIDIA H200"

        def __init__(self, peak):
            self.memory_stats = lambda: {"peak_bytes_in_use": peak}

    # The mesh's first device is another process's.
    mesh = types.SimpleNamespace(size=2, devices=None, local_devices=[Device(7)])
    lowered = ahead.LoweredStep(None, Flops({"bfloat16": 989 * 10**12}), unread=0)
    compiled = jax.jit(jnp.square).lower(1.0).compile()
    numbers = step_time.step_numbers("student", [1.0, 3.0, 2.0], lowered, compiled, {"loss": 0.5}, mesh)
    assert numbers["process_peak_bytes"] == 7 and numbers["of_peak"] == 0.25 and numbers["seconds"] == 2.0


def test_metrics_that_are_not_finite_are_said(capsys):
    step = {"role": "student", "seconds": 1.0, "seconds_range": [1.0, 1.0], "flops_per_device": 1.0, "of_peak": 0.4}
    step |= {"flops_per_second": 1.0, "planned_memory": {"peak": 1 << 30}, "process_peak_bytes": None}
    step |= {"compile_seconds": 1.0, "finite": False, "metrics": {"loss": float("nan")}}
    step_time.print_table({"mesh": {"data": 1}, "devices": 1, "device": "x", "batch_size": 1, "steps": [step]})
    said = capsys.readouterr().out
    assert "student: its metrics are not finite" in said and "40%" in said


def test_a_batch_that_does_not_fit_says_what_to_change(toy_module, tmp_path, monkeypatch):
    def fails(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")

    monkeypatch.setattr(step_time, "time_step", fails)
    config = toy_module | {"batch_size": 32}
    with pytest.raises(UserError, match=r"\(cpu\) is too small: .* GiB of it; try .*--config.microbatches=2"):
        step_time.measure(config, tmp_path, 1, 1, lambda name: None)


def test_a_row_of_steps_is_waited_for_once(monkeypatch):
    waited, calls = [], []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)

    def step(state, frozen, batch):
        calls.append((state, frozen, batch))
        return state + 1, {"loss": jnp.float32(state)}

    times, values, arrays = step_time.time_step(step, (0, "frozen", "batch"), repeats=3, length=4)
    assert len(times) == 3 and len(waited) == 4 and len(calls) == step_time.WARM_UP + 3 * 4
    assert arrays == (len(calls), "frozen", "batch") and values == {"loss": len(calls) - 1}


def test_random_weights():
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.bfloat16)
    abstract = {"blocks": {"kernel": shape(2, 64, 64), "bias": shape(2, 64), "norm": {"scale": shape(2, 64)}}}
    got = jax.jit(lambda: step_time.random_weights(abstract, 0))()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert np.std(np.asarray(got["blocks"]["kernel"], np.float32)) == pytest.approx(step_time.WEIGHT_STD, rel=0.05)
    assert np.all(got["blocks"]["bias"] == 0) and np.all(got["blocks"]["norm"]["scale"] == 1)


def test_peaks():
    assert set(TPU_KINDS.values()) == set(CHIPS)
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU7x") == 2307e12 / 2
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("cpu") is None


def test_bad_arguments(capsys):
    for bad in ("--steps=0", "--repeats=0", "--slices=2", "--coordinator=host:1"):
        with pytest.raises(SystemExit):
            step_time.parse(["--config", CONFIG, bad])
    with pytest.raises(UserError, match="has no entry"):
        step_time.main(["--config", CONFIG, "--topology", "v5e:4x4"])
