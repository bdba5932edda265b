"""`experiments.train` in processes of its own, for tests that kill and compare runs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from nd_jax.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent


def start_command(workdir, config, given, devices):
    """`experiments.train` in a process of its own."""
    command = [sys.executable, "-m", "experiments.train", "--config", config, "--workdir", str(workdir), *given]
    # Of a flag that is given twice, XLA takes the last.
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
    path = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(path.read_bytes().splitlines()) >= lines:
            break
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait()
    process.stdout.close()
