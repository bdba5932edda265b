"""The processes of one job: how they join, and how all of them end when one is lost.

A process of a job cannot go on alone: its next collective would wait forever. Who notices a loss depends on the device.

    runtime    The coordination service in process 0 hears heartbeats of all. When one stays out for a given time, or
               process 0 itself is gone, JAX's C++ runtime aborts the process from a thread of its own, in the middle of
               whatever Python does (all devices; the only one that notices on TPUs, whose collectives just wait).
    collective A connection of the CPU backend's collectives is closed: the call raises in the main thread, at once.

Either way the user sees one line, `error: lost contact with ...`, and the exit status is 1. What the runtime wrote
about it, two screens of addresses in C++, goes to the process's log.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax

from nd_jax.errors import UserError, first_line

HEARTBEAT_SECONDS = 60
START_SECONDS = 300

# How exceptions of collectives and barriers begin to say that another process did not take part.
_LOST_WORDS = ("Gloo ", "CoordinationServiceError", "tensorflow.BarrierError")

# C holds no reference to what it may call until the process has ended.
_HANDLERS: list = []


def lost_contact(error: BaseException | None) -> str | None:
    """What an exception, or one that it was raised from, says about another process that is gone; None if nothing."""
    while error is not None:
        if any(word in str(error) for word in _LOST_WORDS):
            # Where in its source the library noticed helps nobody.
            return re.sub(r"\[external/\S+\] ", "", first_line(error))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def joined(
    log: Path,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    start_seconds: int = START_SECONDS,
) -> Iterator[None]:
    """Makes this process one of a job while the block runs. Call it before anything asks JAX for devices.

    From here on this process's standard output and error belong to Python; what C++ prints goes to `log`.

    Args:
      log: file, created with its folder; an existing one is continued.
      coordinator: host:port of process 0. None: JAX finds the processes itself (Cloud TPU pods, Slurm, Open MPI).
      num_processes, process_id: given with `coordinator`.
      heartbeat_seconds: a process that shows no sign of life for so long is lost. It is also how long a process that
        ends waits for the others to end.
      start_seconds: how long the processes wait for one another at the start.

    Raises:
      UserError: the arguments do not describe a job, or the log cannot be written. When a process is lost, or does
        not come, nothing is raised: the process prints one line and exits with status 1.
    """
    if heartbeat_seconds < 1 or start_seconds < 1:
        raise UserError(f"timeouts of {heartbeat_seconds} and {start_seconds} seconds: give at least 1")
    last_words = _LastWords(log, start_seconds)
    # Only the CPU backend reads this; without it CPU processes cannot reduce across hosts.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The loop agrees on a SIGTERM by itself. The runtime's own handler would swallow one that comes before the loop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the processes of the job ({first_line(error)}): give --coordinator, --num-processes and "
            "--process-id, or --distributed where JAX finds the processes itself"
        ) from error
    try:
        yield
    except BaseException as error:
        if reason := lost_contact(error):
            last_words.say_lost(reason)
        # This process failed by itself, and says so. It waits at the end for others that fail alike.
        last_words.said.acquire(blocking=False)
        raise


class _LastWords:
    """Diverts what C++ prints into a log, and turns the runtime's abort into one line and exit status 1.

    Attributes:
      said: held once the reason of this process's end is printed, so that no second one follows.
    """

    def __init__(self, log: Path, start_seconds: int):
        self.said = threading.Lock()
        self._log, self._start_seconds = log, start_seconds
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log_start = log.stat().st_size if log.exists() else 0
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"cannot write to {log} ({error.strerror}): choose another --workdir") from error
        sys.stdout, _ = _divert(sys.stdout, 1, file)
        sys.stderr, self._terminal = _divert(sys.stderr, 2, file)
        os.close(file)
        # A handler of Python's `signal` would not do: it runs when the main thread comes to it, and abort() does not
        # wait for that.
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)
        _HANDLERS.append(handler)
        install = ctypes.CDLL(None).signal
        install.argtypes, install.restype = (ctypes.c_int, type(handler)), ctypes.c_void_p
        install(signal.SIGABRT, handler)

    def say_lost(self, reason: str) -> NoReturn:
        """Ends the process without cleaning up: saves in flight and the runtime's goodbyes wait for all processes."""
        self._leave(
            f"lost contact with another process of this job ({reason}): it was killed, ran out of memory or failed, or "
            "its machine is gone. Start all processes again, any number of them, to continue from the last checkpoint"
        )

    def _on_abort(self, _: int) -> None:
        reason = abort_reason(self._log.read_bytes()[self._log_start :].decode(errors="replace"))
        if reason is None:
            self._leave("the runtime aborted this process")
        if reason == NOT_ALL_CAME:
            self._leave(
                f"the processes of this job did not all come within {self._start_seconds} s: start all of them, with "
                "the same --coordinator and --num-processes, or give --start-timeout more seconds"
            )
        self.say_lost(reason)

    def _leave(self, problem: str) -> NoReturn:
        if self.said.acquire(blocking=False):
            with contextlib.suppress(OSError):
                os.write(self._terminal, f"error: {problem} (details: {self._log})\n".encode())
        else:
            time.sleep(1.0)  # Another thread is about to say it.
        os._exit(1)


def _divert(stream, descriptor: int, file: int):
    """(Python's stream on a copy of the descriptor, the copy); what others write to the descriptor goes to `file`."""
    stream.flush()
    copy = os.dup(descriptor)
    os.dup2(file, descriptor)
    # Lines appear when they are complete, as on a terminal: a process that is lost has no time to flush.
    return os.fdopen(copy, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False), copy


NOT_ALL_CAME = "not all processes came"


def abort_reason(log: str) -> str | None:
    """Why the runtime aborted, from what it wrote; None when it was not for another process."""
    if "JAX distributed service detected fatal errors" not in log:
        return None
    if "RegisterTask" in log:
        return NOT_ALL_CAME
    silent = re.search(r"stopped sending heartbeats\):\s*([\d, ]+)", log) or re.search(
        r"Task (\d+) heartbeat timeout", log
    )
    if silent:
        return f"no heartbeat of process {silent.group(1).strip()}"
    if "Failed to send RPC to coordination service" in log:
        return "process 0 does not answer"
    if "Shutdown barrier" in log:
        return "it did not end with the others"
    return "the coordination service reports an error"
