"""Real processes running `experiments.train`: killed at random moments, moved to another mesh, two instead of one."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nd_jax.train.metrics import read_metrics
from tests.text_encoder_case import CONFIG, arguments, write_prompts

ROOT = Path(__file__).parent.parent
STEPS = 12
MESH_2x4 = {"mesh.data": 2, "mesh.fsdp": 4}
MESH_1x8 = {"mesh.data": 1, "mesh.fsdp": 8}


def start(workdir, prompts, *flags, devices=8, **overrides):
    command = [sys.executable, "-m", "experiments.train", "--config", CONFIG, "--workdir", str(workdir), *flags]
    command += arguments(**{"data.prompts": str(prompts), "num_steps": STEPS} | overrides)
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes):
    """Waits for the processes; their output when one of them failed."""
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def history(workdir):
    """(step, name) -> value of everything but times."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return {(m["step"], k): v for m in lines for k, v in m.items() if k.startswith(("train/", "eval/"))}


def assert_close(got, want):
    assert got.keys() == want.keys()
    np.testing.assert_allclose([got[k] for k in want], [want[k] for k in want], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prompts):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir, prompts, **MESH_2x4))
    return history(workdir)


def kill_after(process, workdir, lines, delay):
    """SIGKILL once the run has logged so many lines, plus a delay in seconds."""
    path = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(path.read_bytes().splitlines()) >= lines:
            break
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait()
    process.stdout.close()


def test_three_kills_change_nothing(tmp_path, prompts, undisturbed):
    draw = random.Random(0)
    for lines in sorted(draw.sample(range(1, STEPS + 2), 3)):
        process = start(tmp_path, prompts, **MESH_2x4)
        kill_after(process, tmp_path, lines, draw.uniform(0.0, 0.2))
        assert process.returncode in (-signal.SIGKILL, 0)
    finish(start(tmp_path, prompts, **MESH_2x4))
    assert history(tmp_path) == undisturbed


def test_killed_on_2x4_and_continued_on_1x8(tmp_path, prompts, undisturbed):
    process = start(tmp_path, prompts, **MESH_2x4)
    kill_after(process, tmp_path, 6, 0.05)
    output = finish(start(tmp_path, prompts, **MESH_1x8))[0]
    assert "resuming from step" in output
    assert_close(history(tmp_path), undisturbed)


def test_two_processes_of_four_devices_equal_one_of_eight(tmp_path, prompts, undisturbed):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = lambda i: ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(i))
    finish(*(start(tmp_path, prompts, *flags(i), devices=4, **MESH_2x4) for i in range(2)))
    assert_close(history(tmp_path), undisturbed)


def test_sigterm_saves_and_exits_0(tmp_path, prompts, undisturbed):
    process = start(tmp_path, prompts, **MESH_2x4)
    path = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_bytes().splitlines()) >= 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    finish(process)
    finish(start(tmp_path, prompts, **MESH_2x4))
    assert history(tmp_path) == undisturbed
