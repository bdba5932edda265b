"""Commands in processes of their own, for tests that kill and compare runs."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from nd_jax.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent


def start_command(workdir, config, given, devices):
    """`experiments.train` in a process of its own."""
    return start_module("experiments.train", ["--config", config, "--workdir", str(workdir), *given], devices)


def start_module(name, given, devices):
    """A Python module as a command, with so many CPU devices."""
    # Of a flag that is given twice, XLA takes the last.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", name, *given],
        cwd=ROOT,
        # So many threads make it likely that collectives which nothing orders meet in different orders, and hang.
        env=os.environ | {"XLA_FLAGS": flags, "PJRT_NPROC": "64"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def logged_lines(workdir):
    """How many lines of metrics the run has written."""
    path = workdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def finish(*processes):
    """Waits for the processes; their output when one of them failed."""
    outputs = [p.communicate(timeout=600)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def history(workdir):
    """(step, name) -> value of everything but times."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return {(m["step"], k): v for m in lines for k, v in m.items() if k.startswith(("train/", "eval/"))}


def assert_close(got, want):
    assert got.keys() == want.keys()
    np.testing.assert_allclose([got[k] for k in want], [want[k] for k in want], rtol=1e-5, atol=1e-7)


def kill_after(process, workdir, lines, delay):
    """SIGKILL once the run has logged so many lines, plus a delay in seconds."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and logged_lines(workdir) < lines:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait()
    process.stdout.close()
