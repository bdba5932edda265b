"""Real processes running `experiments.train`: killed at random moments, moved to another mesh, two instead of one."""

import random
import signal
import time

import pytest

from tests.process_case import assert_close, finish, free_port, history, kill_after, logged_lines, start_command
from tests.text_encoder_case import CONFIG, arguments, write_prompts

STEPS = 12
MESH_2x4 = {"mesh.data": 2, "mesh.fsdp": 4}
MESH_1x8 = {"mesh.data": 1, "mesh.fsdp": 8}


def start(workdir, prompts, *flags, devices=8, **overrides):
    given = arguments(**{"data.prompts": str(prompts), "num_steps": STEPS} | overrides)
    return start_command(workdir, CONFIG, [*flags, *given], devices)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prompts):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir, prompts, **MESH_2x4))
    return history(workdir)


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
    port = free_port()
    flags = lambda i: ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(i))
    finish(*(start(tmp_path, prompts, *flags(i), devices=4, **MESH_2x4) for i in range(2)))
    assert_close(history(tmp_path), undisturbed)


def test_sigterm_saves_and_exits_0(tmp_path, prompts, undisturbed):
    process = start(tmp_path, prompts, **MESH_2x4)
    while process.poll() is None and logged_lines(tmp_path) < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    finish(process)
    finish(start(tmp_path, prompts, **MESH_2x4))
    assert history(tmp_path) == undisturbed
