"""A walk of several commands that continues where it was interrupted.

Every stage is a command that a person could type, or a function for what has no command. What it gave is noted in
WORKDIR/stages/NAME.json with its command, seconds, CPU seconds and peak memory; a stage with such a note is not run
again. On a terminal a bar shows how far the whole walk is, and what commands print goes to WORKDIR/stages/NAME.log.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.stages_bar import Bar
from nd_jax.errors import UserError
from nd_jax.files import write_text

LOCK = "lock"
TICK = 0.2  # seconds between two looks at a command
LOG_LINES = 15  # of a failed command's log that are shown


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a walk.

    Attributes:
      what: what it does, in a few words.
      finish: gives the stage's numbers, once the command is done.
      command: arguments of a process, or None.
      folder: folder below the workdir that is removed when the stage is asked for again; a training run would
        otherwise see that it is finished.
      always: run it every time, such as a report.
      seconds: about how long it takes, for the bar.
    """

    what: str
    finish: Callable[[], Any]
    command: Sequence[str] | None = None
    folder: str | None = None
    always: bool = False
    seconds: float = 1.0


Stages = dict[str, Stage]


def python(module: str, *args: Any) -> list[str]:
    """Arguments of `python -m module args`."""
    return [sys.executable, "-m", module, *map(str, args)]


def reader(workdir: Path, *parts: str) -> Callable[[], Any]:
    """A `Stage.finish` that reads the JSON file which a command left at WORKDIR/PARTS."""
    return lambda: json.loads(workdir.joinpath(*parts).read_text())


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """--only and --from."""
    chosen = parser.add_mutually_exclusive_group()
    say = lambda what: dict(choices=names, metavar="STAGE", help=what)
    chosen.add_argument("--only", **say(f"run this stage alone, again if it was done; stages: {', '.join(names)}"))
    chosen.add_argument("--from", dest="start", **say("run this stage and all after it again"))


def run_walk(what: str, workdir: Path, stages: Stages, only: str | None = None, start: str | None = None) -> None:
    """`run_stages` in a workdir that is made if needed, and a closing line with the place of report.html.

    Raises:
      UserError: as `run_stages`, or the walk has no such stage.
    """
    for name in (only, start):
        if name is not None and name not in stages:
            raise UserError(f"stage {name} is no part of this walk: its stages are {', '.join(stages)}")
    begin = time.monotonic()
    workdir.mkdir(parents=True, exist_ok=True)
    run_stages(workdir, stages, only, start)
    print(f"{what} done in {time.monotonic() - begin:.0f} s, report: {(workdir / 'report.html').resolve()}")


def run_stages(workdir: Path, stages: Stages, only: str | None = None, start: str | None = None) -> None:
    """Runs what is not done.

    Args:
      workdir: of the walk; exists.
      stages: in order.
      only: run this one alone, again if it was done.
      start: run this one and all after it again.

    Raises:
      UserError: a stage failed, or was done before with another command.
    """
    (workdir / "stages").mkdir(exist_ok=True)
    names = list(stages)
    again = {only} if only else set(names[names.index(start) :]) if start else set()
    with _sole_owner(workdir) as lock:
        # All at once: a run that is interrupted then goes on from there without being told so.
        for name in again:
            _forget(workdir, name, stages[name])
        todo = {}
        for name in [only] if only else names:
            if stages[name].always or not _done_before(workdir, name, stages[name]):
                todo[name] = stages[name]
            else:
                print(f"== {name}: done before", flush=True)
        with _exit_on_sigterm(), Bar({name: stage.seconds for name, stage in todo.items()}, TICK) as bar:
            for name, stage in todo.items():
                bar.begin(name, stage.what)
                _run(workdir, name, stage, bar, lock)


def read_results(workdir: Path, stages: Stages) -> dict[str, dict[str, Any]]:
    """Stage -> {"result", "seconds", "cpu_seconds"[, "command", "peak_bytes"]} of all that note one.

    Raises:
      UserError: one has not been run.
    """
    notes = {name: _read(workdir, name) for name, stage in stages.items() if not stage.always}
    missing = [name for name, note in notes.items() if note is None]
    if missing:
        raise UserError(f"stage {missing[0]} has not been run in {workdir}: run it with --only {missing[0]}")
    return notes


def _run(workdir: Path, name: str, stage: Stage, bar: Bar, lock: int) -> None:
    begin, used = time.monotonic(), time.process_time()
    note: dict[str, Any] = {}
    if stage.command is not None:
        note["command"] = _shown(stage.command)
        if not bar.shown:
            print("   " + note["command"], flush=True)
        status, usage = _execute(stage.command, workdir, name, bar, lock)
        if status:
            raise UserError(
                f"stage {name} failed with status {status}, see above; run the same command to continue there"
            )
        note |= usage
    note["result"] = stage.finish()
    if isinstance(note["result"], dict) and note["result"].get("interrupted"):
        # A training that was told to stop saves and ends well, but it is not done.
        raise UserError(f"stage {name} was interrupted; run the same command to continue there")
    note["seconds"] = time.monotonic() - begin
    note["cpu_seconds"] = note.get("cpu_seconds", 0.0) + time.process_time() - used
    write_text(_file(workdir, name), json.dumps(note, indent=2) + "\n")


def _execute(
    command: Sequence[str], workdir: Path, name: str, bar: Bar, lock: int
) -> tuple[int, Mapping[str, float | int]]:
    """(exit status, CPU seconds and peak memory) of a command. One that is still there when this ends is ended too.

    The peak is never below the memory of this process, which a command is a copy of before it begins.
    """
    # The stages of a walk run the same networks over and over: what one compiled serves the others.
    cache = str(workdir.resolve() / "compilation_cache")
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    log = workdir / "stages" / f"{name}.log"
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(log.open("wb")) if bar.shown else None
        process = subprocess.Popen(
            command,
            env=environment | os.environ,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
            pass_fds=[lock],
        )
        try:
            ended = 0
            while not ended:
                ended, status, used = os.wait4(process.pid, os.WNOHANG)
                if not ended:
                    bar.tick(log if out else None)
                    time.sleep(TICK)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and out:
        bar.message("\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]))
    return process.returncode, {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}


@contextlib.contextmanager
def _sole_owner(workdir: Path) -> Iterator[int]:
    """Holds a workdir; gives the descriptor that holds it. A command inherits it: one that outlives its walk, which was
    killed, keeps the next one waiting until it is done, so that there are never two in one folder."""
    descriptor = os.open(workdir / "stages" / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"{workdir}: another run works there; waiting for its end", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the walk by way of an exception, so that the command which runs is ended as well."""

    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _forget(workdir: Path, name: str, stage: Stage) -> None:
    """Removes what a stage noted and left."""
    _file(workdir, name).unlink(missing_ok=True)
    if stage.folder:
        shutil.rmtree(workdir / stage.folder, ignore_errors=True)


def _done_before(workdir: Path, name: str, stage: Stage) -> bool:
    """Whether a stage is done; one that was done by another command is the user's decision, not ours."""
    note = _read(workdir, name)
    if note is None:
        return False
    command = None if stage.command is None else _shown(stage.command)
    if note.get("command") != command:
        raise UserError(
            f"{workdir}: stage {name} was done with other arguments ({note.get('command')}): "
            f"choose another --workdir, or --from {name} to do it again"
        )
    return True


def _shown(command: Sequence[str]) -> str:
    return shlex.join(["python", *command[1:]])


def _file(workdir: Path, name: str) -> Path:
    return workdir / "stages" / f"{name}.json"


def _read(workdir: Path, name: str) -> dict[str, Any] | None:
    path = _file(workdir, name)
    return json.loads(path.read_text()) if path.exists() else None
