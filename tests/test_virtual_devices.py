"""The order of collectives on virtual devices, which without it now and then hung the teacher's step on 2 x 2 x 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nd_jax.train.virtual_devices import ORDERED, order_collectives_of_virtual_devices

ROOT = Path(__file__).parent.parent
COUNT = "--xla_force_host_platform_device_count"
OTHER = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (f"{COUNT}=8", f"{COUNT}=8 {ORDERED}"),
        (f"{COUNT}=1 {COUNT}=2", f"{COUNT}=1 {COUNT}=2 {ORDERED}"),
        (f"{COUNT}=8 {COUNT}=1", f"{COUNT}=8 {COUNT}=1"),
        (f"{COUNT}=8 {OTHER}", f"{COUNT}=8 {OTHER}"),
        ("", ""),
    ],
)
def test_the_flag_is_given_with_virtual_devices_only(monkeypatch, given, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    order_collectives_of_virtual_devices()
    assert os.environ["XLA_FLAGS"] == expected


def test_the_suite_itself_has_the_flag():
    """tests/conftest.py has it as a copy, since it may import nothing of the project."""
    assert ORDERED in os.environ["XLA_FLAGS"].split()


STEP = """
import jax, jax.numpy as jnp
from nd_jax.train.virtual_devices import order_collectives_of_virtual_devices
order_collectives_of_virtual_devices()
print(len(jax.devices()), float(jax.jit(lambda x: x.sum())(jnp.ones(3))))
"""


def test_xla_knows_the_flag():
    environment = os.environ | {"XLA_FLAGS": f"{COUNT}=2"}
    done = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "2 3.0\n", done.stderr
