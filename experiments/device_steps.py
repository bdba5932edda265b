"""Commands on the way of a graph to a chip, each a process of its own with its time and memory noted.

What a command gave is in FOLDER/steps/NAME.json, what it printed in NAME.log. A step that is done is not run again: its
note has the same command, no error, and is younger than the notes of the steps that it builds on, and none of the files
that it reads was written since.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nd_jax.errors import UserError
from nd_jax.files import state_of_files, write_text


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
      name: of its note.
      command: arguments of the process.
      after: names of the steps that it builds on.
      files: what it leaves for later steps; a step whose files are gone is run again when they are needed.
      limit: seconds, after which the process is ended; None for no limit.
      reads: files, and folders of files, that no step makes.
    """

    name: str
    command: Sequence[str]
    after: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    limit: float | None = None
    reads: tuple[Path, ...] = ()


def python(module: str, *args: Any) -> list[str]:
    """Arguments of `python -m module args`."""
    return [sys.executable, "-m", module, *map(str, args)]


def run_steps(folder: Path, steps: Sequence[Step]) -> None:
    """Runs what is not done, in order.

    Args:
      folder: for the notes and logs; created if needed.
      steps: each after those that it builds on.

    Raises:
      UserError: a step failed or took longer than its limit; the same in its note.
    """
    wanted = [not is_done(folder, step) for step in steps]
    for i in reversed(range(len(steps))):
        lost = not all(path.exists() for path in steps[i].files)
        wanted[i] |= lost and any(wanted[i + 1 :])
    for step, run in zip(steps, wanted, strict=True):
        # A step before it may have run just now.
        if run or not is_done(folder, step):
            _run(folder, step)


def is_done(folder: Path, step: Step) -> bool:
    """Whether a step need not run: it is done, or it took too long and has no more time now."""
    note = read_note(folder, step.name)
    if note is None or note["command"] != _shown(step.command) or note.get("reads") != state_of_files(step.reads):
        return False
    if "error" in note and (note.get("limit") is None or step.limit is None or step.limit > note["limit"]):
        return False
    before = [read_note(folder, name) for name in step.after]
    return all(other is not None and other["finished"] <= note["finished"] for other in before)


def read_note(folder: Path, name: str) -> dict[str, Any] | None:
    """The note of a step, or None: {"command", "reads", "seconds", "cpu_seconds", "peak_bytes", "finished"}.

    With "error" if it failed, and "limit" if that was its limit of seconds. `peak_bytes` is the largest resident memory
    of any process of the step; `reads` is the state of the files that it read.
    """
    path = folder / "steps" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _run(folder: Path, step: Step) -> None:
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    log, begin, late = folder / "steps" / f"{step.name}.log", time.monotonic(), threading.Event()
    reads = state_of_files(step.reads)
    with log.open("w", encoding="utf-8") as out:
        # A session of its own, so that what the process started ends with it.
        child = subprocess.Popen(step.command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)

        def stop() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(step.limit, stop) if step.limit is not None else None
        try:
            if timer:
                timer.start()
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            stop()
            raise
        finally:
            if timer:
                timer.cancel()
    child.returncode = os.waitstatus_to_exitcode(status)  # What it waits for is gone already.
    note = {
        "command": _shown(step.command),
        "reads": reads,
        "seconds": round(time.monotonic() - begin, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    if late.is_set():
        note |= {"error": f"took more than {step.limit:g} s", "limit": step.limit}
    elif child.returncode:
        note["error"] = _reason(child.returncode, log.read_text(encoding="utf-8", errors="replace"))
    write_text(folder / "steps" / f"{step.name}.json", json.dumps(note | {"finished": time.time()}, indent=2) + "\n")
    if "error" in note:
        raise UserError(f"{step.name}: {note['error']}")


def _reason(status: int, log: str) -> str:
    """Why a command failed, in one line: what it says itself, or the signal that ended it."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    if status < 0:
        return f"ended by {signal.Signals(-status).name}, as when memory runs out"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"status {status}"])[-1][:1000]


def _shown(command: Sequence[str]) -> str:
    return shlex.join(["python", *command[1:]])
