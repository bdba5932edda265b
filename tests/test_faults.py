"""Jobs of several processes: one of them is killed, silent or told to stop; its examples are counted."""

import signal

import pytest

from nd_jax.errors import UserError
from nd_jax.train.processes import NOT_ALL_CAME, abort_reason, joined, lost_contact
from tests.kill_job import count_examples, kill, kill_and_finish, start_job, wait_for_lines
from tests.process_case import assert_close, finish, history

STEPS = 12
# Seconds; a process that waits for others in a barrier, not in a collective, learns of a loss from the heartbeat alone.
HEARTBEAT = 20


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(*start_job(workdir, 2, STEPS))
    assert count_examples(workdir, STEPS) == (0, 0, 0)
    return history(workdir)


def assert_others_stopped(done):
    """With one line each that says what happened, and without the runtime's screens of C++."""
    assert done.running, done.output
    assert done.statuses == [1] * (done.processes - 1), done.output
    assert len(done.errors) == done.processes - 1, done.output
    assert all("lost contact with another process" in line and "last checkpoint" in line for line in done.errors)
    assert "stack trace" not in done.output and "Gloo] Rank" not in done.output and "Traceback" not in done.output


def test_killed_and_resumed_is_the_same_bit_by_bit(tmp_path, undisturbed):
    (done,) = kill_and_finish(tmp_path, 1, [2], STEPS, 1, HEARTBEAT)
    assert_others_stopped(done)
    assert done.stopped_after < 2 * HEARTBEAT
    assert history(tmp_path) == undisturbed
    assert count_examples(tmp_path, STEPS) == (0, 0, 0)


def test_killed_with_four_and_resumed_with_two(tmp_path, undisturbed):
    (done,) = kill_and_finish(tmp_path, 1, [4, 2], STEPS, 2, HEARTBEAT)
    assert_others_stopped(done)
    assert_close(history(tmp_path), undisturbed)
    assert count_examples(tmp_path, STEPS) == (0, 0, 0)


def test_four_processes_and_one_have_equal_losses(tmp_path, undisturbed):
    for processes in (4, 1):
        workdir = tmp_path / str(processes)
        finish(*start_job(workdir, processes, STEPS))
        assert_close(history(workdir), undisturbed)
        assert count_examples(workdir, STEPS) == (0, 0, 0)


def test_a_silent_process_ends_the_job(tmp_path):
    """Stopped, its connections stay open: only its heartbeat is missing, as on devices whose collectives just wait."""
    job = start_job(tmp_path, 2, 100_000, heartbeat=10)
    wait_for_lines(job, tmp_path, 3)
    assert [p.poll() for p in job] == [None, None]
    done = kill(job, 1, tmp_path, signal.SIGSTOP)
    assert_others_stopped(done)
    assert "no heartbeat of process 1" in done.errors[0]
    log = tmp_path / "logs" / "process_0.txt"
    assert str(log) in done.errors[0] and "stopped sending heartbeats" in log.read_text()


def test_sigterm_of_one_stops_all_at_the_same_step(tmp_path, undisturbed):
    job = start_job(tmp_path, 2, STEPS, pause=0.05)
    wait_for_lines(job, tmp_path, 3)
    job[1].send_signal(signal.SIGTERM)
    outputs = finish(*job)
    assert "interrupted at step" in outputs[0] and "interrupted at step" in outputs[1]
    finish(*start_job(tmp_path, 2, STEPS))
    assert history(tmp_path) == undisturbed
    assert count_examples(tmp_path, STEPS) == (0, 0, 0)


def test_lost_and_duplicated_examples_are_seen(tmp_path):
    """The count that the other tests rely on can fail."""
    folder = tmp_path / "examples"
    folder.mkdir()
    line = '{{"position": {}, "rows": [0, 1], "examples": [{}, {}]}}\n'
    (folder / "a.jsonl").write_text(line.format(0, 5, 6) + line.format(0, 5, 7) + line.format(1, 5, 8) + '{"posi')
    # Of 32 ids 5, 7 and 8 are there; 5 twice; row 1 of batch 0 changed.
    assert count_examples(tmp_path, 2) == (29, 1, 1)


def test_a_lost_process_is_told_from_a_full_disk():
    def chain(cause):
        try:
            raise UserError("could not save") from cause
        except UserError as error:
            return error

    gone = RuntimeError("UNKNOWN: Gloo AllReduce failed: [external/gloo/pair.cc:538] Connection closed by peer\nmore")
    assert lost_contact(chain(gone)) == "UNKNOWN: Gloo AllReduce failed: Connection closed by peer"
    assert lost_contact(chain(OSError("No space left on device"))) is None and lost_contact(None) is None


FATAL = "F1 client.h:80] Terminating process because the JAX distributed service detected fatal errors. absl::Status: "


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("F1 some.cc:1] Check failed: x == y", None),
        (FATAL + "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.CoordinationService/RegisterTask", NOT_ALL_CAME),
        (
            FATAL + "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1, 3\nThe tasks",
            "no heartbeat of process 1, 3",
        ),
        (FATAL + "UNAVAILABLE: Failed to send RPC to coordination service.", "process 0 does not answer"),
        (FATAL + "INTERNAL: Shutdown barrier has failed.", "it did not end with the others"),
        (FATAL + "INTERNAL: something new", "the coordination service reports an error"),
    ],
)
def test_reasons_of_an_abort(log, reason):
    assert abort_reason(log) == reason


def test_a_job_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="at least 1"), joined(tmp_path / "log.txt", "127.0.0.1:1", 2, 0, 0):
        pass
